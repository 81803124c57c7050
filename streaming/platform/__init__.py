"""The platform that the service runs on: Java, jars, Spark sessions, Kafka connections and the embedded broker.

`doctor.py` checks all of it; nothing here depends on the pipeline.
"""
