"""The HTTP gateway: images in and predictions out, for programs without a Kafka client."""
