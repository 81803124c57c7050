"""Spark ML stages for the steps from images to classes, for Pipelines, CrossValidator and notebooks.

    Pipeline(stages=[
        DeepImageFeaturizer(inputCol="image", outputCol="features", modelName="InceptionV3"),
        LogisticRegression(maxIter=5, regParam=0.03, elasticNetParam=0.5),
    ])

Names, Params and persistence follow Spark ML; results are those of the stream, which runs the same NumPy code.
"""

from streaming.ml.classifiers import BundleScorer
from streaming.ml.cnn_classifier import DistributedCNNClassifier
from streaming.ml.featurizer import DeepImageFeaturizer
from streaming.ml.projections import ImagePCA, ImagePCAModel, SparseRandomProjection, SparseRandomProjectionModel

__all__ = [
    "BundleScorer",
    "DeepImageFeaturizer",
    "DistributedCNNClassifier",
    "ImagePCA",
    "ImagePCAModel",
    "SparseRandomProjection",
    "SparseRandomProjectionModel",
]
