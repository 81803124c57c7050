"""What the service stands on: Java, jars, Kafka, a Spark session."""
