"""How many images per second go from Kafka to Delta, compared with other implementations?"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.end_to_end import in_turn
from benchmarks.pairs import Pair
from benchmarks.processes import INSTALL_TIMEOUT_S, PEERS, make_environment, run_json
from benchmarks.service import Service, a_service
from models.backbone import WEIGHTS_FILE
from models.scorer import load_head
from streaming.registry import open_registry
from streaming.settings import Settings, read_settings

PEER_IMAGES, BATCH = 8_000, 2_000
SLOW_IMAGES = 1_500  # for peers that are ten times slower
RUNS = 2

CONSUMER = ("ai-edge-litert==2.3.0", "confluent-kafka==2.16.1", "deltalake==1.6.6", "numpy==2.4.6", "pillow==12.3.0",
            "pyarrow==21.0.0")  # fmt: skip
QUIX = ("quixstreams==3.28.1", "onnxruntime==1.31.1", "deltalake==1.6.6", "numpy==2.4.6", "pillow==12.3.0",
        "pyarrow==21.0.0")  # fmt: skip
CONVERTER = ("tf2onnx==1.17.0", "onnx==1.23.2", "flatbuffers==25.12.19", "protobuf==7.36.2")


def questions() -> Iterator[Pair]:
    with a_service() as service:
        settings = service.home("plain")
        yield _plain_consumer(service, settings)
        yield _quix(service, settings)
        yield _against_spark(service, settings, "iterator", 5.0, "Keras in a pandas UDF, Spark's writer")
        yield _against_spark(service, settings, "batch", 7.0, "predict_batch_udf with Keras, Spark's writer")


def write_head(service: Service, settings: Settings) -> Path:
    """The champion's projection and classifier, both linear, as one matrix and offset."""
    head = load_head(open_registry(settings.home).read(1))
    offset = head.logits(np.zeros((1, _width(settings)), np.float32))[0]
    matrix = head.logits(np.eye(_width(settings), dtype=np.float32)) - offset
    path = service.scratch / "head.npz"
    np.savez(path, matrix=matrix.astype(np.float32), offset=offset.astype(np.float32), classes=np.array(head.classes))
    return path


def _width(settings: Settings) -> int:
    return open_registry(settings.home).read(1).manifest.backbone.n_features


def _against_consumer(service: Service, settings: Settings, python: Path, script: str, model: Path, name: str) -> Pair:
    """Compare ours with a peer that consumes the same number of messages from its own topic."""
    service.publish(script, PEER_IMAGES)
    head = write_head(service, settings)

    def peer(run: int) -> float:
        return float(
            run_json(
                python, PEERS / script, "--bootstrap", service.settings.bootstrap_servers, "--topic", script,
                "--table", service.scratch / f"{script}-{run}", "--model", model, "--head", head,
            )["images_per_s"]
        )  # fmt: skip

    def ours(run: int) -> float:
        topic = f"against-{script}-{run}"
        return service.images_per_s(settings, topic, PEER_IMAGES, BATCH)

    question = f"Kafka → Delta, {PEER_IMAGES:,} images, against {name}"
    return Pair(question, "images/s", 1.0, *in_turn(ours, peer, RUNS))


def _plain_consumer(service: Service, settings: Settings) -> Pair:
    python = make_environment(read_settings().work_dir / "benchmarks" / "consumer", CONSUMER)
    name = "a plain consumer (confluent-kafka, LiteRT, deltalake; at least once)"
    return _against_consumer(service, settings, python, "plain_consumer.py", service.flatbuffer(settings), name)


def _quix(service: Service, settings: Settings) -> Pair:
    home = read_settings().work_dir / "benchmarks"
    python = make_environment(home / "quix", QUIX)
    model = _as_onnx(service.flatbuffer(settings), home / "onnx", service.scratch / "backbone.onnx")
    return _against_consumer(service, settings, python, "quix_onnx.py", model, "Quix Streams with ONNX Runtime")


def _as_onnx(flatbuffer: Path, packages: Path, target: Path) -> Path:
    """Convert the network for ONNX Runtime, in a separate environment because the converter needs another protobuf."""
    uv = Path(sys.executable).with_name("uv")
    install = (
        uv,
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--python",
        sys.executable,
        "--target",
        packages,
        *CONVERTER,
    )
    subprocess.run(list(map(str, install)), check=True, timeout=INSTALL_TIMEOUT_S)
    convert = (sys.executable, "-m", "tf2onnx.convert", "--tflite", flatbuffer, "--output", target, "--opset", "17")
    environment = os.environ | {"PYTHONPATH": str(packages), "CUDA_VISIBLE_DEVICES": "-1"}
    subprocess.run(list(map(str, convert)), check=True, env=environment, capture_output=True, timeout=INSTALL_TIMEOUT_S)
    return target


def _against_spark(service: Service, settings: Settings, way: str, aim: float, name: str) -> Pair:
    """Compare ours, at `BATCH`, with Keras on Spark, at its own batch size; both without the first micro-batch."""
    bundle = service.scratch / f"bundle-{way}"
    backbone = open_registry(settings.home).fetch(1, bundle).manifest.backbone
    head = write_head(service, settings)

    def peer(run: int) -> float:
        topic = f"{way}-{run}"
        service.publish(topic, SLOW_IMAGES)
        return float(
            run_json(
                sys.executable, "-m", "benchmarks.peers.spark_keras", "--way", way, "--bootstrap",
                service.settings.bootstrap_servers, "--topic", topic, "--table", service.scratch / topic / "table",
                "--backbone", backbone.name, "--size", *backbone.input_size, "--weights",
                bundle / WEIGHTS_FILE, "--head", head, environment=service.environment(topic),
            )["images_per_s"]
        )  # fmt: skip

    def ours(run: int) -> float:
        topic = f"against-{way}-{run}"
        return service.images_per_s(settings, topic, PEER_IMAGES, BATCH)

    return Pair(f"Kafka → Delta, against {name}", "images/s", aim, *in_turn(ours, peer, 1))
