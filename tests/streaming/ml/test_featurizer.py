"""`DeepImageFeaturizer` on encoded images and Spark's image structs: the engine's features, or null and a reason."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.types import BinaryType, IntegerType, StringType, StructField, StructType

from models.arrays import Features
from models.backbone import ExportedBackbone
from models.engine import LiteRTEngine
from models.errors import ModelError
from models.scorer import decode_all
from streaming.errors import ServiceError
from streaming.images.dataset import digit_images
from streaming.ml import DeepImageFeaturizer
from streaming.ml.featurizer import backbone_name

N = 12


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [data for _, _, data in digit_images(N)]


@pytest.fixture(scope="module")
def expected(images: list[bytes], exported: ExportedBackbone) -> Features:
    engine = LiteRTEngine(exported.flatbuffer)
    return engine(decode_all(images, engine.input_size).images)


@pytest.fixture
def featurizer(exports: Path) -> DeepImageFeaturizer:
    return DeepImageFeaturizer(
        inputCol="image", outputCol="features", modelName="EfficientNetLite0", reasonCol="why", cacheDir=str(exports)
    )


def frame_of(spark: SparkSession, values: list[bytes | None]) -> DataFrame:
    table = pa.table({"id": list(range(len(values))), "image": pa.array(values, pa.binary())})
    return spark.createDataFrame(table).repartition(2)


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def test_encoded_images_get_the_features_of_the_engine(
    spark: SparkSession, featurizer: DeepImageFeaturizer, images: list[bytes], expected: Features
) -> None:
    rows = featurizer.transform(frame_of(spark, images))
    assert rows.schema == featurizer.transformSchema(frame_of(spark, images).schema)
    found = rows.orderBy("id").select(vector_to_array("features", "float32").alias("values"), "why").collect()
    np.testing.assert_array_equal(np.array([row["values"] for row in found], np.float32), expected)
    assert {row["why"] for row in found} == {None}


def test_null_and_bad_images_get_null_features_and_a_reason(
    spark: SparkSession, featurizer: DeepImageFeaturizer, images: list[bytes], expected: Features
) -> None:
    values = [None, images[0], b"", b"not an image", images[1], images[2][: len(images[2]) // 2]]
    found = featurizer.transform(frame_of(spark, values)).orderBy("id").collect()
    reasons = [row["why"] and row["why"].split(":")[0] for row in found]
    assert reasons == ["missing", None, "empty", "not_an_image", None, "truncated"]
    assert [row["features"] is None for row in found] == [True, False, True, True, False, True]
    np.testing.assert_array_equal(found[4]["features"].toArray().astype(np.float32), expected[1])


def test_bad_rows_can_be_skipped(spark: SparkSession, featurizer: DeepImageFeaturizer, images: list[bytes]) -> None:
    rows = featurizer.setParams(handleInvalid="skip").transform(frame_of(spark, [None, images[0], b"text"]))
    assert [row["id"] for row in rows.collect()] == [1]
    featurizer.setParams(handleInvalid="ignore")
    with pytest.raises(ServiceError, match="handleInvalid should be keep or skip, got 'ignore'"):
        featurizer.transform(rows.select("id", "image"))


def test_bad_images_only_and_empty_input_do_not_fail(spark: SparkSession, featurizer: DeepImageFeaturizer) -> None:
    assert featurizer.transform(frame_of(spark, [None, b"x"])).where("features is null").count() == 2
    assert featurizer.transform(frame_of(spark, [])).collect() == []


def test_images_are_computed_once_for_all_columns_and_filters(
    spark: SparkSession, featurizer: DeepImageFeaturizer, images: list[bytes]
) -> None:
    rows = featurizer.transform(frame_of(spark, images)).where("why is null").where("features is not null")
    plan = rows._jdf.queryExecution().executedPlan().toString()
    assert plan.count("ArrowEvalPython") == 1


# --- Spark's image struct


def test_spark_image_source_gives_the_features_of_the_files(
    spark: SparkSession, featurizer: DeepImageFeaturizer, tmp_path: Path, exported: ExportedBackbone
) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 40, 60, 3), np.uint8)
    files = [encoded(Image.fromarray(one)) for one in pixels]
    files.append(encoded(Image.fromarray(pixels[0, :, :, 0])))  # gray
    files.append(encoded(Image.fromarray(np.dstack([pixels[1], pixels[2, :, :, 0]]))))  # transparent
    for number, data in enumerate(files):
        (tmp_path / f"{number}.png").write_bytes(data)
    (tmp_path / "bad.png").write_bytes(b"no image")
    source = spark.read.format("image").option("dropInvalid", "false").load(str(tmp_path))
    rows = featurizer.transform(source.withColumn("id", F.col("image.origin")))
    found = {Path(row["id"]).stem: row for row in rows.select("id", "features", "why").collect()}
    assert found["bad"]["features"] is None
    assert found["bad"]["why"].startswith("not_an_image: ")
    engine = LiteRTEngine(exported.flatbuffer)
    features = engine(decode_all(files, engine.input_size).images)
    for number, row in enumerate(features):
        np.testing.assert_array_equal(found[str(number)]["features"].toArray().astype(np.float32), row)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": b"\0" * 11}, "corrupt"),
        ({"data": None}, "missing"),
        ({"mode": None}, "missing"),
        ({"mode": 5}, "unsupported_mode"),
        ({"nChannels": 1}, "unsupported_mode"),
        ({"height": -1}, "not_an_image"),
        ({"height": 2_000_000_000, "width": 2_000_000_000}, "decompression_bomb"),
    ],
    ids=str,
)
def test_inconsistent_image_structs_are_bad_images(
    reason_of: "ReasonOf", change: dict[str, object], reason: str
) -> None:
    struct = {"origin": "", "height": 2, "width": 2, "nChannels": 3, "mode": 16, "data": b"\0" * 12}
    assert reason_of(struct) is None
    assert str(reason_of(struct | change)).split(":")[0] == reason


class ReasonOf:
    """The reason for which the worker's code rejects an image struct, or None."""

    def __init__(self, flatbuffer: Path) -> None:
        self.engine = LiteRTEngine(flatbuffer)

    def __call__(self, struct: dict[str, object]) -> str | None:
        from streaming.images.ml_worker import from_images

        (found,) = from_images(iter([pa.array([struct])]), self.engine, "stretch", lambda features: features)
        assert found[0]["values"].is_valid == (found[0]["reason"].as_py() is None)
        reason: str | None = found[0]["reason"].as_py()
        return reason


@pytest.fixture(scope="module")
def reason_of(exported: ExportedBackbone) -> ReasonOf:
    return ReasonOf(exported.flatbuffer)


# --- validation before a job starts


def schema_of(**columns: object) -> StructType:
    return StructType([StructField(name, kind) for name, kind in columns.items()])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (schema_of(picture=BinaryType()), "there is no column 'image': expected one of picture"),
        (schema_of(image=StringType()), "column 'image' should contain images .* got string"),
        (schema_of(image=StructType([StructField("height", IntegerType())])), "got struct<height:int>"),
        (schema_of(image=BinaryType(), features=StringType()), "the column 'features' already exists"),
        (schema_of(image=BinaryType(), why=StringType()), "the column 'why' already exists"),
    ],
    ids=["missing", "strings", "another struct", "output exists", "reason exists"],
)
def test_invalid_columns_are_rejected_in_one_line(
    featurizer: DeepImageFeaturizer, schema: StructType, message: str
) -> None:
    with pytest.raises(ServiceError, match=message) as refused:
        featurizer.transformSchema(schema)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("DeepImageFeaturizer: ")


def test_invalid_name_or_size_is_rejected_before_any_export(spark: SparkSession, images: list[bytes]) -> None:
    rows = frame_of(spark, images)
    with pytest.raises(ServiceError, match="needs a modelName: efficientnet_lite0, "):
        DeepImageFeaturizer(inputCol="image", outputCol="features").transform(rows)
    with pytest.raises(ModelError, match=r"unknown backbone 'MobileNet', .*did you mean mobilenet_v2\?"):
        DeepImageFeaturizer(inputCol="image", modelName="MobileNet").transform(rows)
    with pytest.raises(ModelError, match="takes images of .height, width. from 75 to 640"):
        DeepImageFeaturizer(inputCol="image", modelName="InceptionV3", inputSize=[32, 32]).transform(rows)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("InceptionV3", "inception_v3"),
        ("inception_v3", "inception_v3"),
        ("MobileNetV2", "mobilenet_v2"),
        ("ResNet50", "resnet50"),
        ("VGG16", "vgg16"),
        ("Xception", "xception"),
        ("LeNet", "LeNet"),
    ],
)
def test_keras_names_of_backbones_are_accepted(given: str, name: str) -> None:
    assert backbone_name(given) == name


def test_every_param_is_explained_with_its_default() -> None:
    stage = DeepImageFeaturizer(modelName="InceptionV3")
    assert (stage.spec().n_features, stage.spec().input_size) == (2048, (299, 299))
    text = stage.explainParams()
    for name in ("modelName", "weights", "output", "inputSize", "cacheDir", "reasonCol", "handleInvalid"):
        assert f"{name}: " in text
    assert "default: imagenet" in text
    with pytest.raises(TypeError, match="inputSize"):
        DeepImageFeaturizer(modelName="InceptionV3", inputSize=["wide"])  # type: ignore[list-item]


# --- in a pipeline, saved and loaded


def test_pipeline_is_fitted_saved_and_loaded_without_the_export_cache(
    spark: SparkSession, exports: Path, tmp_path: Path
) -> None:
    digits = [(label, data) for _, label, data in digit_images(70) if label in {"0", "1", "7"}]
    table = pa.table({
        "id": range(len(digits)), "label": [int(label) for label, _ in digits], "image": [data for _, data in digits]
    })  # fmt: skip
    rows = spark.createDataFrame(table).unionByName(
        spark.createDataFrame(pa.table({"id": [99], "label": [1], "image": [b"not an image"]}))
    )
    pipeline = Pipeline(
        stages=[
            DeepImageFeaturizer(
                inputCol="image", outputCol="features", modelName="EfficientNetLite0",
                inputSize=[64, 64], handleInvalid="skip", cacheDir=str(exports),
            ),
            LogisticRegression(maxIter=5, regParam=0.03, elasticNetParam=0.5),
        ]
    )  # fmt: skip
    model = pipeline.fit(rows)
    answers = {row["id"]: row["prediction"] for row in model.transform(rows).select("id", "prediction").collect()}
    assert 99 not in answers
    right = sum(answers[number] == int(label) for number, (label, _) in enumerate(digits))
    assert right > 0.9 * len(digits)

    model.write().overwrite().save(str(tmp_path / "model"))
    loaded = PipelineModel.load(str(tmp_path / "model"))
    loaded.stages[0].setParams(cacheDir=str(tmp_path / "nothing here"))
    again = {row["id"]: row["prediction"] for row in loaded.transform(rows).select("id", "prediction").collect()}
    assert again == answers
    assert not (tmp_path / "nothing here").exists()
    (stored,) = (tmp_path / "model" / "stages").glob("0_*/data")
    names = {row["name"] for row in spark.read.parquet(str(stored)).select("name").collect()}
    assert names == {"backbone.tflite", "backbone.json"}

    pipeline.save(str(tmp_path / "pipeline"))
    first = Pipeline.load(str(tmp_path / "pipeline")).getStages()[0]
    assert {p.name: v for p, v in first.extractParamMap().items()} == {
        p.name: v for p, v in pipeline.getStages()[0].extractParamMap().items()
    }


def test_modified_or_foreign_saved_stage_is_rejected(
    spark: SparkSession, featurizer: DeepImageFeaturizer, tmp_path: Path
) -> None:
    path = tmp_path / "stage"
    featurizer.save(str(path))
    assert DeepImageFeaturizer.load(str(path)).uid == featurizer.uid
    (line,) = (path / "metadata").glob("part-*")
    metadata = json.loads(line.read_text())
    for change, message in (
        ({"class": "streaming.ml.projections.ImagePCAModel"}, "got streaming.ml.projections.ImagePCAModel"),
        ({"files": dict.fromkeys(metadata["files"], "0" * 64)}, "was modified"),
        ({"paramMap": {"nonsense": 1}}, "is not a saved DeepImageFeaturizer"),
    ):
        line.with_name(f".{line.name}.crc").unlink(missing_ok=True)
        line.write_text(json.dumps(metadata | change))
        with pytest.raises(ServiceError, match=message):
            DeepImageFeaturizer.load(str(path))


def test_output_column_is_a_spark_ml_vector(spark: SparkSession, featurizer: DeepImageFeaturizer) -> None:
    assert featurizer.transformSchema(schema_of(image=BinaryType()))["features"].dataType == VectorUDT()
