"""Capacity planning: from the costs of images and micro-batches to the size of a service."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.backbone import ExportedBackbone
from streaming.jobs.capacity import Costs, images_per_s, measure, most_tasks, overhead_s, plan, sample_jpeg

COSTS = Costs(decode_s=0.0005, backbone_s=0.0095, rest_s=0.001, image_bytes=24_000)  # 11 ms of CPU time


def test_throughput_grows_with_batch_size_up_to_the_cores() -> None:
    limit = 2 / COSTS.per_image_s
    speeds = [images_per_s(COSTS, images, cores=2) for images in (10, 100, 1_000, 100_000)]
    assert speeds == sorted(speeds)
    assert speeds[0] < 0.2 * limit
    assert 0.99 * limit < speeds[-1] < limit
    assert images_per_s(COSTS, 100_000, cores=4) == pytest.approx(2 * speeds[-1], rel=0.02)


@pytest.mark.parametrize("load", [0.5, 20, 2_000, 100_000])
def test_plan_handles_its_load_with_spare_capacity(load: float) -> None:
    found = plan(load, COSTS, n_features=1_280, bundle_bytes=40_000_000)
    each, tasks = load / found.streams, found.cores // found.streams
    assert images_per_s(COSTS, found.images_per_batch, tasks, tasks) > each
    assert overhead_s(tasks) <= 0.1 * found.interval_s + 1e-9
    assert tasks <= most_tasks()
    assert found.partitions >= found.cores
    assert all(used <= limit for used, limit in found.limits.values())
    assert found.first_limit in found.limits


def test_streams_are_added_only_beyond_the_limit_of_one_driver() -> None:
    per_core = 0.7 * 0.9 / COSTS.per_image_s
    assert plan(0.9 * most_tasks() * per_core, COSTS, 1_280, 0).streams == 1
    assert plan(1.2 * most_tasks() * per_core, COSTS, 1_280, 0).streams == 2


def test_measured_costs_reflect_decoding_and_backbone(exported: ExportedBackbone) -> None:
    small, large = (measure(exported.flatbuffer, *size, cores=1) for size in ((300, 300), (2_000, 1_500)))
    assert 0 < small.decode_s < large.decode_s
    assert small.backbone_s > small.decode_s
    assert large.image_bytes == len(sample_jpeg(2_000, 1_500)) > small.image_bytes


def test_command_plans_for_a_load_and_reports_invalid_options(exports: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streaming", "--home", str(tmp_path), "size", "--images-per-second"]
    environment = {"IMAGESTREAM_BACKBONES": str(exports), "PATH": ""}
    summary = tmp_path / "size.json"
    done = subprocess.run(
        [*command, "200", "--cores", "1", "--json", str(summary)], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(summary.read_text())
    assert f"{found['plan']['cores']:,}" in done.stdout
    assert found["first_limit"] in done.stdout
    wrong = subprocess.run(
        [*command, "200", "--pixels", "large"], env=environment, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: --pixels: expected width and height such as 300x300, got 'large'"
