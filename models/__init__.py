"""The numerics of imagestream, on NumPy arrays: from encoded images to pixels, features and class probabilities.

Nothing here depends on Spark or Kafka, and the modules that score (`decode`, `engine`, `projection`, `classifier`,
`scorer`) do not import TensorFlow, so that worker processes stay small.
"""

DISTRIBUTION = "imagestream"  # read without an import, see `imagestream._taken`
