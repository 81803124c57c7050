"""The service on Spark: Kafka to scored rows to Delta tables, training, and everything around the running stream."""
