"""The demo: the whole loop on real images, each step by the command that a user would run, in its own process.

Train on 1,000 MNIST digits; publish 500 others and five files that are not images; let the stream score them; retrain
on all of it as a separate job, promoting the new model if it is shown to be at most five points worse; publish 100
more, which the running stream scores with the new version.
"""

import os
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
from streaming.images.dataset import digit_images, write_images
from streaming.jobs.demo_home import Confirm, new_demo_home, record_contents
from streaming.platform.broker import running_broker, stop_broker
from streaming.query import query
from streaming.settings import Settings

TRAINING, FIRST, MORE = 1_000, 500, 100
# A few hundred held-out images are too few to show that half as many more digits make a better model. They can show
# that the new one is hardly worse, which is enough to demonstrate that a running stream switches to it.
HAND_OVER_MARGIN = -0.05
STREAM_LOG = "stream.log"
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
    """A completed step of the demo."""

    name: str
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo, read from the Delta tables."""

    settings: Settings  # of the demo
    summary: dict[str, Any]
    steps: list[Step]
    confusion: list[tuple[str, str, int]]  # (true, predicted, images)
    sample: list[dict[str, Any]]  # nine predictions, chosen by the hash of the image


def run_demo(
    settings: Settings, confirm: Confirm, on_step: Callable[[str], None], on_done: Callable[[Step], None]
) -> DemoResult:
    """Run the loop in its own home, `demo/` in the settings' home.

    Args:
        settings: of the parent home.
        confirm: called with a question before an earlier demo is removed.
        on_step: called with the name of a step when it begins.
        on_done: called with the step when it has ended.

    Raises:
        ServiceError: the demo's home has data that no demo made, the removal was not confirmed, or a step failed.
    """
    settings = new_demo_home(settings, confirm)
    steps: list[Step] = []

    @contextmanager
    def step(name: str) -> Iterator[None]:
        on_step(name)
        clock = perf_counter()
        yield
        steps.append(Step(name, perf_counter() - clock))
        on_done(steps[-1])

    images = settings.work_dir / "images"
    with step("write the digits as files"):
        digits = digit_images(TRAINING + FIRST + MORE)
        training = write_images(images / "train", islice(digits, TRAINING))
        first = write_images(images / "publish", islice(digits, FIRST))
        more = write_images(images / "more", digits)
        bad = _write_non_images(images / "not-images")
    try:
        with step("start the embedded broker"):
            _imagestream(settings, "broker", "start")
        with step(f"train on {TRAINING:,} digits"):
            _imagestream(settings, "train", "--images", training)
        with step(f"publish {FIRST} others, and {len(NOT_IMAGES)} files that are not images"):
            _imagestream(settings, "publish", first, "--label-from", "parent")
            _imagestream(settings, "publish", bad)
        with _running_stream(settings) as stream:
            with step("start the stream and let it score them"):
                _wait_for_rows(settings, stream, FIRST + len(NOT_IMAGES))
            with step("retrain on all of it, as a separate job"):
                _imagestream(settings, "retrain", f"--margin={HAND_OVER_MARGIN}")
            with step(f"publish {MORE} more to the running stream"):
                _imagestream(settings, "publish", more, "--label-from", "parent")
                _wait_for_rows(settings, stream, FIRST + len(NOT_IMAGES) + MORE)
            with step("stop the stream"):
                _stop(stream)
    finally:
        stop_broker(settings)
        record_contents(settings)
    return _read_result(settings, steps)


def _write_non_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in NOT_IMAGES.items():
        (folder / name).write_bytes(data)
    return folder


def _environment(settings: Settings) -> dict[str, str]:
    """The environment of the demo's commands, with the demo's own broker instead of the user's."""
    broker = running_broker(settings)
    ours = {"IMAGESTREAM_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"}
    ours["IMAGESTREAM_WORK"] = str(settings.work_dir)
    return os.environ | ours | ({"IMAGESTREAM_BOOTSTRAP_SERVERS": broker.address} if broker else {})


def _command(settings: Settings, *arguments: str | Path) -> list[str]:
    config = ["--config", str(settings.config)] if settings.config else []
    return [sys.executable, "-P", "-m", "imagestream", "--home", settings.home, *config, *map(str, arguments)]


def _imagestream(settings: Settings, *arguments: str | Path) -> None:
    """Run an `imagestream` command; if it fails, its last line on standard error becomes the error."""
    done = subprocess.run(
        _command(settings, *arguments), env=_environment(settings), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        output = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise ServiceError(f"'imagestream {arguments[0]}' failed: {output[-1].removeprefix('error: ')}")


@contextmanager
def _running_stream(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    with (settings.work_dir / STREAM_LOG).open("wb") as file:
        stream = subprocess.Popen(
            _command(settings, "stream"), env=_environment(settings), stdout=file, stderr=file, start_new_session=True
        )
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
            last = (settings.work_dir / STREAM_LOG).read_text(errors="replace").strip().splitlines()
            raise ServiceError(f"the stream ended unexpectedly: {last[-1] if last else 'no output'}")
        if monotonic() > give_up:
            raise ServiceError(f"the stream did not score {rows} messages within {STREAM_TIMEOUT_S:.0f} s")
        sleep(POLL_S)


def _rows_done(settings: Settings) -> int:
    if not settings.place.has_table("batches"):
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
    """Read all figures from the Delta tables."""

    def rows(sql: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = query(settings, sql).to_pylist()
        return found

    (totals,) = rows("""
        SELECT count(*) AS predicted, count(*) - count(DISTINCT (topic, "partition", "offset")) AS duplicates,
               avg((label = label_true)::INT) AS accuracy
        FROM predictions
    """)
    versions = rows("SELECT model_version AS v, count(*) AS n FROM predictions GROUP BY v ORDER BY v")
    (quarantined,) = rows("SELECT count(*) AS n FROM quarantine")
    (batches,) = rows("SELECT sum(input_rows)::BIGINT AS n, sum(element_at(seconds, 'batch')[1]) AS s FROM batches")
    confusion = rows("SELECT label_true, label, count(*) AS n FROM predictions GROUP BY ALL ORDER BY ALL")
    sample = rows("""
        SELECT source, label_true, label, confidence, model_version FROM predictions ORDER BY image_id LIMIT 9
    """)
    summary = {
        "published": FIRST + len(NOT_IMAGES) + MORE,
        "predicted": totals["predicted"],
        "quarantined": quarantined["n"],
        "duplicates": totals["duplicates"],
        "accuracy": totals["accuracy"],
        "images_per_second": batches["n"] / batches["s"],
        "model_versions": {str(row["v"]): row["n"] for row in versions},
        "tables": {name: settings.place.table(name) for name in settings.place.table_names()},
        "seconds": {step.name: round(step.seconds, 2) for step in steps},
    }
    triples = [(row["label_true"], row["label"], row["n"]) for row in confusion]
    return DemoResult(settings, summary, steps, triples, sample)
