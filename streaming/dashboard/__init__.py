"""The dashboard: a Streamlit application that monitors and operates the service. It reads the Delta tables with DuckDB,
without a JVM."""
