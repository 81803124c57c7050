"""The running stream: from a Kafka topic to rows in Delta tables, exactly once."""
