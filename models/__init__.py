"""Numerics of image classification, for imagestream: bytes to pixels to features to probabilities.

NumPy arrays in, NumPy arrays out. Nothing here knows Spark or Kafka, and importing a module for scoring (`decode`,
`engine`, `projection`, `classifier`, `scorer`) never imports TensorFlow: a worker process stays small.
"""
