"""Training of a small CNN by Keras in one process, or by Elephas; a script that runs in the peer's environment.

Example: python benchmarks/cnn_peer.py elephas --data faces.npz --json figures.json --mode hogwild
"""

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

SEED = 614


def build(side: int) -> Any:
    """The grayscale CNN of the published system: images (N, side, side, 1) in 0..1 to the probability of class 1."""
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((side, side, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(16, activation="relu"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="binary_crossentropy", metrics=["accuracy"])
    return model


def train_elephas(model: Any, x: Any, y: Any, asked: argparse.Namespace) -> Any:
    """Train with Elephas as documented; its `SparkModel` is always synchronous and averages after every epoch."""
    from elephas.spark_model import AsynchronousSparkModel, SparkModel  # type: ignore[import-not-found]
    from elephas.utils.rdd_utils import to_simple_rdd  # type: ignore[import-not-found]
    from pyspark.sql import SparkSession

    # One slot per worker, so that all of them train concurrently.
    builder = SparkSession.builder.master(f"local[{asked.workers}]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.memory", "4g").config("spark.driver.maxResultSize", "0").getOrCreate()
    rows = to_simple_rdd(spark.sparkContext, x, y)
    if asked.mode == "synchronous":
        trainer = SparkModel(model, num_workers=asked.workers, batch_size=asked.batch_size)
    else:
        with socket.create_server(("", 0)) as one:
            port = one.getsockname()[1]
        trainer = AsynchronousSparkModel(
            model, num_workers=asked.workers, batch_size=asked.batch_size, mode=asked.mode, frequency=asked.frequency,
            parameter_server_mode="http", port=port,
        )  # fmt: skip
    trainer.fit(rows, epochs=asked.epochs, batch_size=asked.batch_size, verbose=0, validation_split=0.0)
    return trainer.master_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=("keras", "elephas"))
    parser.add_argument("--data", type=Path, required=True, help="an .npz: x_train, x_test (N, side, side), y_…")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--mode", default="synchronous")
    parser.add_argument("--frequency", default="epoch")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    asked = parser.parse_args()

    import keras

    keras.utils.set_random_seed(SEED)
    with np.load(asked.data, allow_pickle=False) as data:
        x_train, x_test = (data[name][..., None].astype(np.float32) / 255 for name in ("x_train", "x_test"))
        y_train, y_test = (data[name].astype(np.float32) for name in ("y_train", "y_test"))
    model = build(x_train.shape[1])
    clock = perf_counter()
    if asked.library == "keras":
        model.fit(x_train, y_train, batch_size=asked.batch_size, epochs=asked.epochs, verbose=0)
    else:
        os.environ["PYSPARK_PYTHON"] = sys.executable
        model = train_elephas(model, x_train, y_train, asked)
    seconds = perf_counter() - clock
    answers = model.predict(x_test, verbose=0)[:, 0].astype(np.float64)
    sure = np.where(y_test == 1, answers, 1 - answers).clip(1e-7, 1)
    figures = {
        "seconds": seconds,
        "test_accuracy": float(((answers >= 0.5) == (y_test == 1)).mean()),  # noqa: PLR2004
        "test_log_loss": float(-np.log(sure).mean()),
    }
    asked.json.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
