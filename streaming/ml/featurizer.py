"""`DeepImageFeaturizer`: a Spark ML Transformer from images to a CNN's features."""

# ruff: noqa: N802, N803, N815  Spark ML's way of naming
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pyspark.ml import Transformer
from pyspark.ml.linalg import VectorUDT
from pyspark.ml.param import TypeConverters
from pyspark.ml.param.shared import HasInputCol, HasOutputCol
from pyspark.sql import DataFrame
from pyspark.sql.types import StringType, StructType

from models.architectures import BACKBONES, BackboneSpec, find_backbone
from models.backbone import FLATBUFFER_FILE, export_backbone
from models.engine import LiteRTEngine
from streaming.errors import ConfigurationError
from streaming.images.ml_worker import RESULT_DDL, from_images
from streaming.images.model_cache import cached_model
from streaming.ml.columns import IMAGES, as_vector, check_input, check_outputs, column, computed
from streaming.ml.params import FromImages, given, input_of, param
from streaming.ml.storage import StoredStage
from streaming.settings import read_settings

WANTED_FILE = "backbone.json"
_BY_LETTERS = {re.sub(r"[^a-z0-9]", "", name): name for name in BACKBONES}


def backbone_name(text: str) -> str:
    """Return the name of a backbone in this project's or Keras's spelling, e.g. `inception_v3` for `InceptionV3`."""
    return _BY_LETTERS.get(re.sub(r"[^a-z0-9]", "", text.lower()), text)


@dataclass(frozen=True)
class _Flatbuffer:
    """An exported backbone and the Params that it was exported for."""

    wanted: tuple[Any, ...]
    content: bytes
    sha256: str


class DeepImageFeaturizer(Transformer, HasInputCol, HasOutputCol, FromImages, StoredStage):
    """Images to the features of a pretrained CNN.

    | column      | in or out | type |
    |-------------|-----------|------|
    | `inputCol`  | in        | encoded images as bytes, or the struct that `spark.read.format("image")` gives |
    | `outputCol` | out       | vector of D features; null where the image is null or cannot be read           |
    | `reasonCol` | out       | string, optional: why there are no features                                    |

    The backbone is exported on first use (`models.backbone.export_backbone`) to `cacheDir`, by default the folder of
    the service. Saving the stage includes the export, so a loaded stage gives the same features on machines without the
    weights.

    Example:
        Pipeline(stages=[
            DeepImageFeaturizer(inputCol="image", outputCol="features", modelName="InceptionV3", handleInvalid="skip"),
            LogisticRegression(maxIter=5, regParam=0.03, elasticNetParam=0.5),
        ])
    """

    modelName = param(
        "modelName",
        f"name of the backbone: {', '.join(BACKBONES)}, or its name in Keras, such as InceptionV3",
        TypeConverters.toString,
    )
    weights = param("weights", "weights: imagenet, random, or a weights file saved by Keras", TypeConverters.toString)
    output = param(
        "output",
        "output: pooled (channel means of the last feature map) or flat (all its values)",
        TypeConverters.toString,
    )
    inputSize = param(
        "inputSize", "input size [height, width] in pixels; the backbone's own if not set", TypeConverters.toListInt
    )
    cacheDir = param(
        "cacheDir",
        "folder of exported backbones; default: that of the home (IMAGESTREAM_HOME, .imagestream)",
        TypeConverters.toString,
    )

    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        modelName: str | None = None,
        weights: str | None = None,
        output: str | None = None,
        inputSize: list[int] | None = None,
        reasonCol: str | None = None,
        handleInvalid: str | None = None,
        cacheDir: str | None = None,
    ) -> None:
        named = given(locals())
        super().__init__()
        self._setDefault(weights="imagenet", output="pooled")
        self._flatbuffer: _Flatbuffer | None = None
        self._set(**named)

    def spec(self) -> BackboneSpec:
        """Return the specification of the backbone; its `n_features` is the length of the vectors.

        Raises:
            ServiceError: modelName is not set.
            ModelError: the name, output or input size is not supported.
        """
        if not self.isDefined(self.modelName):
            raise ConfigurationError(f"DeepImageFeaturizer needs a modelName: {', '.join(BACKBONES)}")
        params = {param.name: value for param, value in self.extractParamMap().items()}
        size = tuple(params["inputSize"]) if "inputSize" in params else None
        return find_backbone(backbone_name(params["modelName"]), params["output"], size)

    def transformSchema(self, schema: StructType) -> StructType:
        """Return the schema of the output of `transform`.

        Raises:
            ServiceError: the input column is missing or contains no images, or an output column already exists.
        """
        stage = type(self).__name__
        check_input(stage, schema, input_of(self), IMAGES)
        reason = self.getReasonCol()
        check_outputs(stage, schema, [self.getOutputCol(), *([reason] if reason else [])])
        result = StructType(list(schema.fields)).add(self.getOutputCol(), VectorUDT())
        return result.add(reason, StringType()) if reason else result

    def _transform(self, dataset: DataFrame) -> DataFrame:
        self.transformSchema(dataset.schema)
        backbone = self._exported()
        broadcast = dataset.sparkSession.sparkContext.broadcast(backbone.content)
        sha256 = backbone.sha256

        def featurize(images: Iterator[pa.Array]) -> Iterator[pa.Array]:
            engine = cached_model("engine", sha256, lambda: LiteRTEngine(broadcast.value))
            return from_images(images, engine, "stretch", lambda features: features)

        values = computed(featurize, column(input_of(self)), RESULT_DDL)
        return self._with_results(dataset, values, {self.getOutputCol(): as_vector})

    def _exported(self) -> _Flatbuffer:
        """Return the backbone for the current Params; export it if necessary."""
        spec = self.spec()
        weights = self.getOrDefault(self.weights)
        wanted = (spec.name, weights, spec.output, spec.input_size)
        if self._flatbuffer is None or self._flatbuffer.wanted != wanted:
            chosen = self.getOrDefault(self.cacheDir) if self.isDefined(self.cacheDir) else None
            folder = Path(chosen) if chosen else read_settings().backbones_dir
            exported = export_backbone(spec.name, weights, folder, output=spec.output, input_size=spec.input_size)
            self._flatbuffer = _Flatbuffer(wanted, exported.flatbuffer.read_bytes(), exported.sha256)
        return self._flatbuffer

    def to_files(self) -> Mapping[str, bytes]:
        backbone = self._exported()
        return {FLATBUFFER_FILE: backbone.content, WANTED_FILE: json.dumps(backbone.wanted).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        name, weights, output, (height, width) = json.loads(files[WANTED_FILE])
        content = files[FLATBUFFER_FILE]
        stage = cls()
        wanted = (name, weights, output, (height, width))
        stage._flatbuffer = _Flatbuffer(wanted, content, hashlib.sha256(content).hexdigest())
        return stage
