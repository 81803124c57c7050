"""Keras on Spark, from Kafka to Delta with Spark's writer: a scalar-iterator pandas UDF, or `predict_batch_udf`.

Runs in the environment of imagestream itself.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import Column
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it
from pyspark.sql.types import ArrayType, FloatType, IntegerType

from streaming.platform.session import spark_session
from streaming.settings import read_settings

IMAGES_PER_BATCH = 500
PREDICT_BATCH = 64


def _model(weights: str, name: str, head: str) -> Any:
    """The backbone and the head in one Keras model."""
    import keras

    from models.backbone import build

    backbone = build(name, weights)
    with np.load(head, allow_pickle=False) as arrays:
        dense = keras.layers.Dense(arrays["matrix"].shape[1], activation="softmax", dtype="float32")
        outputs = dense(backbone.output)
        model = keras.Model(backbone.input, outputs)
        dense.set_weights([arrays["matrix"].astype(np.float32), arrays["offset"].astype(np.float32)])
    return model


def _pixels(value: bytes, height: int, width: int) -> np.ndarray:
    image = Image.open(BytesIO(value))
    image.draft("RGB", (width, height))
    return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


def iterator_udf(options: argparse.Namespace) -> Any:
    """As in published notebooks: the model is loaded once per task, with `predict` on every Arrow batch."""
    weights, name, head = str(options.weights), options.backbone, str(options.head)
    height, width = options.size

    @F.pandas_udf(IntegerType())  # type: ignore[call-overload]
    def score(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        model = _model(weights, name, head)
        for values in batches:
            pixels = np.stack([_pixels(value, height, width) for value in values])
            yield pd.Series(model.predict(pixels, verbose=0).argmax(axis=1).astype("int32"))

    return score


def batch_udf(options: argparse.Namespace) -> Any:
    """`pyspark.ml.functions.predict_batch_udf`, which caches the model for the lifetime of the worker."""
    weights, name, head = str(options.weights), options.backbone, str(options.head)
    height, width = options.size

    def make() -> Any:
        model = _model(weights, name, head)

        def predict(pixels: np.ndarray) -> np.ndarray:
            return model.predict(pixels.astype(np.uint8), verbose=0).argmax(axis=1).astype("int32")

        return predict

    predict = predict_batch_udf(
        make, return_type=IntegerType(), batch_size=PREDICT_BATCH, input_tensor_shapes=[[height, width, 3]]
    )

    @F.pandas_udf(ArrayType(FloatType()))  # type: ignore[call-overload]
    def decode(values: pd.Series) -> pd.Series:
        return pd.Series([_pixels(value, height, width).astype(np.float32).reshape(-1) for value in values])

    def score(value: Column) -> Column:
        return predict(decode(value))

    return score


def main() -> None:
    """Drain the topic and write the committed images per second, from the first commit to the last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=("iterator", "batch"), required=True)
    for name in ("bootstrap", "topic", "backbone"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("weights", "head", "table", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs=2, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    settings = read_settings(options.table.parent)
    conf = {"spark.sql.execution.arrow.maxRecordsPerBatch": str(PREDICT_BATCH)}
    with spark_session(settings, "peer", delta=True, conf=conf) as spark:
        score = iterator_udf(options) if options.way == "iterator" else batch_udf(options)
        messages = (
            spark.readStream.format("kafka")
            .option("kafka.bootstrap.servers", options.bootstrap)
            .option("subscribe", options.topic)
            .option("startingOffsets", "earliest")
            .option("maxOffsetsPerTrigger", IMAGES_PER_BATCH)
            .load()
        )
        rows = messages.select("partition", "offset", "timestamp", score(F.col("value")).alias("label"))
        query = (
            rows.writeStream.format("delta")
            .option("checkpointLocation", str(options.table.parent / "checkpoint"))
            .trigger(availableNow=True)
            .start(str(options.table))
        )
        query.awaitTermination()
        done = [(_ended(one), one["numInputRows"]) for one in query.recentProgress if one["numInputRows"]]
    rows_after = sum(n for _, n in done[1:])
    options.json.write_text(
        json.dumps({"images_per_s": rows_after / (done[-1][0] - done[0][0]), "rows": sum(n for _, n in done)})
    )


def _ended(progress: Any) -> float:
    started = datetime.fromisoformat(progress["timestamp"]).timestamp()
    return started + progress["durationMs"]["triggerExecution"] / 1000


if __name__ == "__main__":
    main()
