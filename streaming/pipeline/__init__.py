"""The running stream: from a Kafka topic to rows in Delta tables, exactly once.

Start with `stream.py`, which runs the Spark query; `commit.py` has the protocol of a micro-batch, step by step.
"""
