"""The dashboard: what the service does, in a browser, read from the tables without a JVM."""
