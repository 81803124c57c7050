"""How many images per second go from Kafka to Delta exactly once, compared with the machine's limit?"""

import sys
from collections.abc import Callable, Iterator

from benchmarks.commits import a_bucket
from benchmarks.pairs import Pair
from benchmarks.processes import PEERS, run_json
from benchmarks.service import CORES, Service, a_service
from models.bundle import EngineName
from models.tflite_to_onnx import to_onnx
from streaming.platform.engines import Engines
from streaming.registry import open_registry
from streaming.settings import Settings
from tests.object_store import BUCKET, WEED

IMAGES, FEWER_IMAGES, QUICK_IMAGES = 20_000, 10_000, 4_000
BATCH, SMALL_BATCH = 2_000, 1_000
BARE_S = 25
RUNS = 3
PER_TRANSACTION = 100  # messages; each transaction writes a marker to every partition it used
SMALLER, INTEGERS = ("--input-size", 192), ("--int8",)  # each costs at most a point of accuracy on the digits


def questions() -> Iterator[Pair]:
    with a_service() as service:
        plain = service.home("plain")
        yield _against_bare(service, plain, plain, IMAGES, BATCH, 1.0, "")
        yield _against_bare(service, plain, plain, FEWER_IMAGES, SMALL_BATCH, 0.95, "")
        for name, gain in (("smaller", SMALLER), ("int8", INTEGERS)):
            quicker = service.home(name, *gain)
            accuracies = f"accuracy {service.accuracy[name]:.3f}, the loop's {service.accuracy['plain']:.3f}"
            how = f" with {' '.join(map(str, gain))} ({accuracies})"
            yield _against_bare(service, quicker, plain, FEWER_IMAGES, BATCH, 1.3, how, runs=1)
        yield _transactional(service, plain, FEWER_IMAGES, BATCH)
        if WEED.exists():
            with a_bucket(service.scratch):
                yield _in_bucket(service, plain, FEWER_IMAGES)


def quick_questions() -> Iterator[Pair]:
    with a_service() as service:
        plain = service.home("plain")
        yield _against_bare(service, plain, plain, QUICK_IMAGES, SMALL_BATCH, 0.95, "", runs=1)
        yield _transactional(service, plain, QUICK_IMAGES, SMALL_BATCH, runs=1)


def in_turn(ours: Callable[[int], float], peer: Callable[[int], float], runs: int) -> tuple[list[float], list[float]]:
    """Alternate peer and ours, starting and ending with the peer, so that ours is compared with both neighbours."""
    found: tuple[list[float], list[float]] = ([], [])
    before = peer(0)
    for run in range(runs):
        found[0].append(ours(run))
        after = peer(run + 1)
        found[1].append((before + after) / 2)
        before = after
    return found


def _against_bare(
    service: Service, ours: Settings, bare: Settings, images: int, batch: int, aim: float, how: str, runs: int = RUNS
) -> Pair:
    def stream(run: int) -> float:
        topic = f"{ours.work_dir.name}-{batch}-{run}"
        return service.images_per_s(ours, topic, images, batch)

    def loop(_: int) -> float:
        return bare_loop(service, bare)

    engine = chosen_engine(bare)
    question = f"Kafka → Delta, {images:,} images in micro-batches of {batch:,}{how}, against the bare loop on {engine}"
    return Pair(question, "images/s", aim, *in_turn(stream, loop, runs))


def _in_bucket(service: Service, bare: Settings, images: int, runs: int = RUNS) -> Pair:
    """Compare a home in a SeaweedFS bucket on loopback, which runs on the same cores, with the bare loop."""
    bucket = service.home("bucket", uri=f"s3://{BUCKET}/home")
    return _against_bare(service, bucket, bare, images, BATCH, 1.0, " with the home in a bucket", runs)


def _transactional(service: Service, settings: Settings, images: int, batch: int, runs: int = RUNS) -> Pair:
    """Compare a topic written in transactions with a plain one that has the same images."""

    def stream(kind: str, per_transaction: int | None) -> Callable[[int], float]:
        def drained(run: int) -> float:
            topic = f"{kind}-{batch}-{run}"
            service.publish(topic, images, per_transaction)
            return service.drain(settings, topic, batch).images_per_s

        return drained

    question = (
        f"Kafka → Delta, {images:,} images in transactions of {PER_TRANSACTION}, micro-batches of {batch:,}, against "
        "the same without transactions"
    )
    transactional, plain = stream("transactional", PER_TRANSACTION), stream("without", None)
    return Pair(question, "images/s", 0.97, *in_turn(transactional, plain, runs))


def bare_loop(service: Service, settings: Settings) -> float:
    """Images per second of one process per core that only decodes and runs the model on the chosen engine."""
    engine, model = chosen_engine(settings), service.flatbuffer(settings)
    if engine == "onnx":
        translated = model.with_suffix(".onnx")
        translated.write_bytes(to_onnx(model.read_bytes()))
        model = translated
    return float(
        run_json(
            sys.executable, PEERS / "bare_loop.py", "--images", service.write_images(), "--engine", engine,
            "--model", model, "--processes", CORES, "--seconds", BARE_S,
        )["images_per_s"]
    )  # fmt: skip


def chosen_engine(settings: Settings) -> EngineName:
    """The engine that the stream of a home uses on this machine."""
    return Engines(settings).choose(open_registry(settings.home).read(1)).engine
