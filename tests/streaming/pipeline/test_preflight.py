"""The memory estimate before the stream starts."""

import re
from typing import Any

import pytest

from streaming.errors import ServiceError
from streaming.pipeline.preflight import check_memory, with_fixed_heap
from streaming.settings import Settings
from streaming.sizes import parse_size


@pytest.mark.parametrize(("text", "size"), [("512m", 512 * 1024**2), ("2g", 2 * 1024**3), ("1K", 1024)])
def test_sizes_are_parsed_in_sparks_format(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "g", "2x", "-1g", "1.5g"])
def test_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ServiceError, match="expected a size such as 512m or 2g"):
        parse_size(text)


def test_model_too_large_for_the_machine_is_refused() -> None:
    with pytest.raises(ServiceError, match=r"4 workers of up to [\d,]+ MiB .* need [\d,]+ MiB, [\d,]+ MiB are"):
        check_memory(Settings(), bundle_bytes=1024**4, workers=4)


def test_memory_is_planned_for_the_largest_image() -> None:
    def estimate_mib(**options: Any) -> int:
        with pytest.raises(ServiceError) as refused:
            check_memory(Settings(**options), bundle_bytes=1024**4, workers=1)
        return int(re.search(r"pixels ([\d,]+) MiB", str(refused.value))[1].replace(",", ""))

    assert estimate_mib(max_pixels=24_000_000) == 60 + 8 * 24_000_000 // 1024**2
    assert estimate_mib() == 60 + 8 * 64_000_000 // 1024**2
    assert estimate_mib(decode_memory="256m") == 60 + 256


def test_small_model_fits() -> None:
    check_memory(Settings(driver_memory="64m"), bundle_bytes=1, workers=1)


@pytest.mark.parametrize(
    ("master", "memory", "heap"),
    [
        ("local[2]", "2g", "512m"),
        ("local[8,4]", "2g", "1088m"),
        ("local[64]", "2g", "2048m"),
        ("local[2]", "300m", "300m"),
        ("local[4]", "600m", "600m"),
        ("local", "2g", "512m"),
    ],
)
def test_heap_grows_with_tasks_up_to_the_limit(master: str, memory: str, heap: str) -> None:
    settings, java_options = with_fixed_heap(Settings(master=master, driver_memory=memory))
    assert settings.driver_memory == heap
    assert f"-Xms{heap}" in java_options.split()


def test_heap_on_a_cluster_is_the_configured_one() -> None:
    configured = Settings(master="spark://127.0.0.1:7077", driver_memory="3g")
    settings, java_options = with_fixed_heap(configured)
    assert settings == configured
    assert "-Xms" not in java_options
