"""Image bombs: each has an expected outcome within the limits, and the next image is decoded."""

import os
import signal
import threading
from contextlib import suppress
from dataclasses import replace

import numpy as np
import psutil
import pytest
from PIL import Image

from models import guarded
from models.decode import DEFAULT_LIMITS, BadImage, Reason, Stage, decode, decode_marked
from models.shrink import shrink
from tests.faults.bombs import BOMBS, Bomb, encode, many_scans, png, small, zeros

SIZE = (224, 224)
GOOD = small("WEBP")  # decoded in the guarded process


def bomb(name: str) -> bytes:
    return next(one for one in BOMBS if one.name == name).make()


def pids() -> list[int]:
    """The idle guarded processes."""
    return [process._process.pid for process in guarded._pool._idle]


def close_idle_processes() -> None:
    for process in guarded._pool._idle:
        process.close()
    guarded._pool._idle.clear()


@pytest.mark.parametrize("one", BOMBS, ids=lambda one: one.name)
def test_bomb_has_expected_outcome_within_limits(one: Bomb) -> None:
    got = decode(one.make(), SIZE)
    assert (got.reason if isinstance(got, BadImage) else None) in one.outcomes, got
    assert isinstance(decode(GOOD, SIZE), np.ndarray)


def test_decoding_stops_at_the_cpu_time_limit() -> None:
    data = many_scans(7_744, 7_744, 100)
    got = decode(data, SIZE, replace(DEFAULT_LIMITS, timeout_s=0.2))
    assert got == BadImage(Stage.DECODE, Reason.DECODE_TIMEOUT, "decoding was stopped after 0.2 s of CPU time")
    assert isinstance(decode(GOOD, SIZE), np.ndarray)


def test_decoding_stops_at_the_memory_limit() -> None:
    data = png(8_000, 8_000, zeros(8_000 * 24_001))
    got = decode(data, SIZE, replace(DEFAULT_LIMITS, memory_bytes=100 * 1024**2))
    assert got == BadImage(Stage.DECODE, Reason.DECODE_MEMORY, "decoding needs more than 100 MiB of memory")
    assert isinstance(decode(GOOD, SIZE), np.ndarray)
    assert isinstance(decode(data, SIZE), np.ndarray), "the default limit suffices"


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_guarded_process_is_restarted(sign: signal.Signals) -> None:
    decode(GOOD, SIZE)
    (*_, pid) = pids()
    os.kill(pid, sign)
    assert isinstance(decode(GOOD, SIZE), np.ndarray)
    assert pid not in pids()


def test_decoder_that_crashes_twice_gives_a_bad_image() -> None:
    ended = threading.Event()

    def crash() -> None:
        while not ended.wait(0.05):
            for child in psutil.Process().children():
                with suppress(psutil.Error):  # it has just exited
                    if guarded.MODULE in child.cmdline() and child.cpu_times().user > 0.2:  # of 0.6
                        child.send_signal(signal.SIGSEGV)

    close_idle_processes()
    crasher = threading.Thread(target=crash)
    crasher.start()
    for _ in range(5):  # on a busy machine, the decoder may finish before the second crash
        got = decode(many_scans(7_744, 7_744, 100), SIZE)
        if isinstance(got, BadImage):
            break
    ended.set()
    crasher.join()
    assert isinstance(got, BadImage)
    assert got == BadImage(Stage.DECODE, Reason.CORRUPT, "the decoder crashed (signal 11)")


def test_threads_decode_concurrently_in_separate_processes() -> None:
    results: list[object] = []
    close_idle_processes()
    threads = [threading.Thread(target=lambda: results.append(decode(GOOD, SIZE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(result, np.ndarray) for result in results)
    assert len(results) == 4
    assert 1 <= len(pids()) <= 4


def test_forked_process_uses_a_separate_guarded_process() -> None:
    decode(GOOD, SIZE)
    before = pids()
    if (child := os.fork()) == 0:
        ok = isinstance(decode(GOOD, SIZE), np.ndarray) and not set(pids()) & set(before)
        guarded._pool.close()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert isinstance(decode(GOOD, SIZE), np.ndarray)
    assert pids() == before


def test_guarded_process_does_not_inherit_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "s3cret")
    close_idle_processes()
    decode(GOOD, SIZE)
    (pid,) = pids()
    with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123
        names = {entry.partition(b"=")[0] for entry in file.read().split(b"\0") if entry}
    assert names == {b"PYTHONPATH", b"OPENBLAS_NUM_THREADS", b"OMP_NUM_THREADS"}


@pytest.mark.parametrize("name", ["tiff of one giant tile", "png of 65 megapixels, complete", "icon of 144 megapixels"])
def test_bomb_is_not_shrunk(name: str) -> None:
    data = bomb(name)
    assert shrink(data, 100) is data


def test_shrinking_has_the_same_limits() -> None:
    data = many_scans(7_744, 7_744, 100)
    assert shrink(data, 100, replace(DEFAULT_LIMITS, timeout_s=0.2)) is data
    assert len(shrink(png(8_000, 8_000, zeros(8_000 * 24_001)), 100)) < 10_000


@pytest.mark.parametrize(("width", "height"), [(4_000, 3_000), (5_712, 4_284), (8_064, 6_048), (8_192, 6_144)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_photographs_of_12_to_50_megapixels_are_decoded(width: int, height: int, options: dict[str, bool]) -> None:
    data = encode(Image.new("RGB", (width, height), (200, 40, 90)), "JPEG", **options)
    got = decode_marked(data, SIZE)
    assert not isinstance(got, BadImage), got
    assert got.damage is None
    assert np.abs(got.pixels.astype(int) - (200, 40, 90)).max() < 8
