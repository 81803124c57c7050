"""Small images that cost much: each ends within the limits with the right reason, and the next image is decoded."""

import os
import signal
import threading
from dataclasses import replace

import numpy as np
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
    """The guarded processes that wait for work."""
    return [process._process.pid for process in guarded._pool._idle]


@pytest.mark.parametrize("one", BOMBS, ids=lambda one: one.name)
def test_a_bomb_ends_within_the_limits_with_the_right_reason(one: Bomb) -> None:
    got = decode(one.make(), SIZE)
    assert (got.reason if isinstance(got, BadImage) else None) in one.outcomes, got
    assert isinstance(decode(GOOD, SIZE), np.ndarray)


def test_decoding_is_ended_when_its_cpu_time_is_used_up_and_the_next_image_is_decoded() -> None:
    data = many_scans(7_744, 7_744, 100)
    got = decode(data, SIZE, replace(DEFAULT_LIMITS, timeout_s=0.2))
    assert got == BadImage(Stage.DECODE, Reason.DECODE_TIMEOUT, "decoding was stopped after 0.2 s of CPU time")
    assert isinstance(decode(GOOD, SIZE), np.ndarray)


def test_decoding_gets_no_more_memory_than_allowed_and_the_next_image_is_decoded() -> None:
    data = png(8_000, 8_000, zeros(8_000 * 24_001))
    got = decode(data, SIZE, replace(DEFAULT_LIMITS, memory_bytes=100 * 1024**2))
    assert got == BadImage(Stage.DECODE, Reason.DECODE_MEMORY, "decoding needs more than 100 MiB of memory")
    assert isinstance(decode(GOOD, SIZE), np.ndarray)
    assert isinstance(decode(data, SIZE), np.ndarray), "the default limit suffices"


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSEGV])
def test_a_guarded_process_that_was_killed_is_started_again(sign: signal.Signals) -> None:
    decode(GOOD, SIZE)
    (*_, pid) = pids()
    os.kill(pid, sign)
    assert isinstance(decode(GOOD, SIZE), np.ndarray)
    assert pid not in pids()


def test_a_decoder_that_crashes_twice_is_an_answer() -> None:
    crashed = threading.Event()

    def crash() -> None:
        while not crashed.wait(0.05):
            for child in guarded_children():
                os.kill(child, signal.SIGSEGV)

    def guarded_children() -> list[int]:
        import psutil

        mine = psutil.Process().children()
        return [one.pid for one in mine if guarded.MODULE in one.cmdline() and one.cpu_times().user > 0.5]

    decode(GOOD, SIZE)
    for process in guarded._pool._idle:
        process.close()
    guarded._pool._idle.clear()
    killer = threading.Thread(target=crash)
    killer.start()
    for _ in range(5):  # on a busy machine the decoder may be done before it is killed a second time
        got = decode(many_scans(7_744, 7_744, 100), SIZE)
        if isinstance(got, BadImage):
            break
    crashed.set()
    killer.join()
    assert isinstance(got, BadImage)
    assert got == BadImage(Stage.DECODE, Reason.CORRUPT, "the decoder crashed (signal 11)")


def test_threads_decode_side_by_side_each_with_a_process_of_its_own() -> None:
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(decode(GOOD, SIZE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(result, np.ndarray) for result in results)
    assert len(results) == 4
    assert 1 <= len(pids()) <= 5


def test_a_forked_process_has_a_guarded_process_of_its_own() -> None:
    decode(GOOD, SIZE)
    before = pids()
    if (child := os.fork()) == 0:
        ok = isinstance(decode(GOOD, SIZE), np.ndarray) and not set(pids()) & set(before)
        guarded._pool.close()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert isinstance(decode(GOOD, SIZE), np.ndarray)
    assert pids() == before


def test_the_guarded_process_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "s3cret")
    while guarded._pool._idle:
        guarded._pool._idle.pop().close()
    decode(GOOD, SIZE)
    (pid,) = pids()
    with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123
        names = {entry.partition(b"=")[0] for entry in file.read().split(b"\0") if entry}
    assert names == {b"PYTHONPATH", b"OPENBLAS_NUM_THREADS", b"OMP_NUM_THREADS"}


@pytest.mark.parametrize(
    "name", ["tiff of one giant tile", "png of 65 megapixels, all there", "icon of 144 megapixels"]
)
def test_a_bomb_is_published_as_it_is_not_made_smaller(name: str) -> None:
    data = bomb(name)
    assert shrink(data, 100) is data


def test_making_smaller_has_the_same_limits() -> None:
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
