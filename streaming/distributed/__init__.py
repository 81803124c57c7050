"""Training a CNN on Spark's workers: synchronously, asynchronously, or without locks, with a server on the driver."""
