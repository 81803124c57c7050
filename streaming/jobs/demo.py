"""The whole loop on real images, each step by the command that a user would type, each in a process of its own.

Train on 1,000 MNIST digits; publish 500 others and five files that are no images; let the stream answer; retrain on
all of it as a separate job, handing over unless the new model may be five points worse; publish 100 more, which the
running stream answers with the new version.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

from streaming.errors import ServiceError
from streaming.home import make_dir
from streaming.images.dataset import digit_images, write_images
from streaming.query import query
from streaming.settings import Settings
from streaming.tables import SCHEMAS

TRAINING, FIRST, MORE = 1_000, 500, 100
# A few hundred held-out images cannot show that half as many more digits make a better model. They can show that the
# new one is hardly worse; and it has seen more, and is here to show that a running stream takes it up.
HAND_OVER_MARGIN = -0.05
MADE_BY_DEMO = ("tables", "checkpoints", "models", "broker", "demo", "spark.log", "log4j2.properties")
STREAM_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
POLL_S = 0.3

NOT_IMAGES = {
    "notes.txt": b"this is text\n",
    "empty.png": b"",
    "page.jpg": b"<!doctype html><title>404</title>",
    "noise.png": bytes(range(256)) * 16,
    "header-only.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
}


@dataclass(frozen=True)
class Step:
    """One step of the demo that has ended."""

    name: str
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found in the Delta tables."""

    summary: dict[str, Any]
    steps: list[Step]
    confusion: list[tuple[str, str, int]]  # (true, predicted, images)
    sample: list[dict[str, Any]]  # nine predictions, picked by the hash of the image


def run_demo(settings: Settings, on_step: Callable[[str], None], on_done: Callable[[Step], None]) -> DemoResult:
    """Run the loop in the settings' home; a former demo there is removed first.

    Args:
        on_step: called with the name of a step when it begins.
        on_done: called with the step when it has ended.

    Raises:
        ServiceError: the home holds tables that no demo made, or a step failed.
    """
    folder = make_dir(settings.home) / "demo"
    steps: list[Step] = []

    @contextmanager
    def step(name: str) -> Iterator[None]:
        on_step(name)
        clock = perf_counter()
        yield
        steps.append(Step(name, perf_counter() - clock))
        on_done(steps[-1])

    with step("clear the home and write the digits as files"):
        _start_over(settings, folder)
        digits = digit_images(TRAINING + FIRST + MORE)
        training = write_images(folder / "train", islice(digits, TRAINING))
        first = write_images(folder / "publish", islice(digits, FIRST))
        more = write_images(folder / "more", digits)
        bad = _write_non_images(folder / "not-images")
    try:
        with step("start the embedded broker"):
            _imagestream(settings, "broker", "start")
        with step(f"train on {TRAINING:,} digits"):
            _imagestream(settings, "train", "--images", training)
        with step(f"publish {FIRST} others, and {len(NOT_IMAGES)} files that are no images"):
            _imagestream(settings, "publish", first, "--label-from", "parent")
            _imagestream(settings, "publish", bad)
        with _running_stream(settings, folder / "stream.log") as stream:
            with step("start the stream and let it answer"):
                _wait_for_rows(settings, stream, FIRST + len(NOT_IMAGES))
            with step("retrain on all of it, as a separate job"):
                _imagestream(settings, "retrain", f"--margin={HAND_OVER_MARGIN}")
            with step(f"publish {MORE} more to the running stream"):
                _imagestream(settings, "publish", more, "--label-from", "parent")
                _wait_for_rows(settings, stream, FIRST + len(NOT_IMAGES) + MORE)
            with step("stop the stream"):
                _stop(stream)
    finally:
        _imagestream(settings, "broker", "stop")
    return _read_result(settings, steps)


def _start_over(settings: Settings, folder: Path) -> None:
    """Remove what a former demo made in this home; refuse a home where somebody else's tables lie."""
    if settings.tables_dir.exists() and not folder.exists():
        raise ServiceError(
            f"{settings.home} holds tables that the demo did not make, and it starts from none; "
            "give it a home of its own: imagestream --home DIR demo"
        )
    if settings.broker_dir.exists():
        _imagestream(settings, "broker", "stop")
    for name in MADE_BY_DEMO:
        path = settings.home / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True)


def _write_non_images(folder: Path) -> Path:
    folder.mkdir()
    for name, data in NOT_IMAGES.items():
        (folder / name).write_bytes(data)
    return folder


def _command(settings: Settings, *arguments: str | Path) -> list[str]:
    config = ["--config", str(settings.config)] if settings.config else []
    return [sys.executable, "-m", "streaming", "--home", str(settings.home), *config, *map(str, arguments)]


def _imagestream(settings: Settings, *arguments: str | Path) -> None:
    """Run one command of `imagestream`; its last line on standard error becomes our error."""
    done = subprocess.run(_command(settings, *arguments), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
        raise ServiceError(f"'imagestream {arguments[0]}' failed: {said[-1].removeprefix('error: ')}")


@contextmanager
def _running_stream(settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        stream = subprocess.Popen(_command(settings, "stream"), stdout=file, stderr=file, start_new_session=True)
    try:
        yield stream
    finally:
        if stream.poll() is None:
            stream.kill()
            stream.wait()


def _wait_for_rows(settings: Settings, stream: subprocess.Popen[bytes], rows: int) -> None:
    give_up = monotonic() + STREAM_TIMEOUT_S
    while _rows_done(settings) < rows:
        if stream.poll() is not None:
            last = (settings.home / "demo" / "stream.log").read_text(errors="replace").strip().splitlines()
            raise ServiceError(f"the stream ended by itself: {last[-1] if last else 'no word'}")
        if monotonic() > give_up:
            raise ServiceError(f"the stream did not answer {rows} messages within {STREAM_TIMEOUT_S:.0f} s")
        sleep(POLL_S)


def _rows_done(settings: Settings) -> int:
    if not (settings.tables_dir / "batches" / "_delta_log").is_dir():
        return 0  # the stream has only just been started
    done = query(settings, "SELECT coalesce(sum(input_rows), 0)::BIGINT AS n FROM batches")
    return int(done.column("n")[0].as_py())


def _stop(stream: subprocess.Popen[bytes]) -> None:
    stream.send_signal(signal.SIGTERM)
    try:
        code = stream.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"the stream did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM") from error
    if code != 0:
        raise ServiceError(f"the stream ended with exit code {code} instead of 0")


def _read_result(settings: Settings, steps: list[Step]) -> DemoResult:
    """All figures come from the Delta tables."""
    totals = query(
        settings,
        """
        SELECT count(*) AS predicted,
               count(*) - count(DISTINCT (topic, "partition", "offset")) AS duplicates,
               avg((label = label_true)::INT) AS accuracy
        FROM predictions
        """,
    ).to_pylist()[0]
    versions = query(settings, "SELECT model_version AS v, count(*) AS n FROM predictions GROUP BY v ORDER BY v")
    quarantined = query(settings, "SELECT count(*) AS n FROM quarantine").to_pylist()[0]["n"]
    batches = query(
        settings, "SELECT sum(input_rows)::BIGINT AS n, sum(element_at(seconds, 'batch')[1]) AS s FROM batches"
    ).to_pylist()[0]
    confusion = query(
        settings,
        "SELECT label_true, label, count(*) AS n FROM predictions GROUP BY ALL ORDER BY ALL",
    )
    sample = query(
        settings,
        """
        SELECT source, label_true, label, confidence, model_version
        FROM predictions ORDER BY image_id LIMIT 9
        """,
    )
    summary = {
        "published": FIRST + len(NOT_IMAGES) + MORE,
        "predicted": totals["predicted"],
        "quarantined": quarantined,
        "duplicates": totals["duplicates"],
        "accuracy": totals["accuracy"],
        "images_per_second": batches["n"] / batches["s"],
        "model_versions": {str(row["v"]): row["n"] for row in versions.to_pylist()},
        "tables": {name: str(directory) for name in SCHEMAS if (directory := settings.tables_dir / name).is_dir()},
        "seconds": {step.name: round(step.seconds, 2) for step in steps},
    }
    triples = [(row["label_true"], row["label"], row["n"]) for row in confusion.to_pylist()]
    return DemoResult(summary, steps, triples, sample.to_pylist())
