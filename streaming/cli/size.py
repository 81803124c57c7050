"""`imagestream size`: capacity planning for a load."""

import os
import re
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.backbone_options import WeightsOption
from streaming.cli.command_line import START
from streaming.cli.console import Spinner, new_table, out
from streaming.errors import UsageError

if TYPE_CHECKING:
    from streaming.jobs.capacity import CapacityPlan, Costs
    from streaming.settings import Settings

PIXELS = re.compile(r"^([1-9][0-9]{0,4})[x×]([1-9][0-9]{0,4})$")


@app.command(panel=START)
def size(
    context: typer.Context,
    images_per_second: Annotated[float, typer.Option(min=0.001, help="Peak load in images per second.")],
    pixels: Annotated[str, typer.Option(metavar="WxH", help="Width and height of the images in pixels.")] = "300x300",
    backbone: Annotated[
        str | None, typer.Option(help="Backbone; default: the champion's, else efficientnet_lite0.")
    ] = None,
    weights: WeightsOption = "imagenet",
    input_size: Annotated[
        int | None, typer.Option(metavar="N", help="Input size N×N in pixels; default: the backbone's own size.")
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(min=1, help="Number of cores to measure on at once; default: all cores of this machine."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Estimate the cores, partitions and memory that a load needs, and the first bottleneck if it grows.

    Decoding and the CNN are measured for some seconds on all cores at once; run it on a machine like those of the
    deployment. The overhead of a micro-batch is taken from docs/scale.md.

    Example: imagestream size --images-per-second 2000 --pixels 1024x768
    """
    found = PIXELS.match(pixels)
    if found is None:
        raise UsageError(f"--pixels: expected width and height such as 300x300, got {pixels!r}")
    from streaming.jobs.capacity import measure, plan

    settings = settings_of(context)
    with Spinner("measuring"), TemporaryDirectory(prefix="imagestream-") as scratch:
        flatbuffer, n_features, bundle_bytes = _network(settings, backbone, weights, input_size, Path(scratch))
        costs = measure(flatbuffer, int(found[1]), int(found[2]), cores or os.cpu_count() or 1)
    answer = plan(images_per_second, costs, n_features, bundle_bytes)
    _print(images_per_second, costs, answer)
    write_json(json_file, {"costs": asdict(costs), "plan": asdict(answer), "first_limit": answer.first_limit})


def _network(
    settings: "Settings", backbone: str | None, weights: str, input_size: int | None, scratch: Path
) -> tuple[Path, int, int]:
    """Return the flatbuffer to measure, its number of features, and the approximate size of its bundle in bytes."""
    from models.backbone import DEFAULT_BACKBONE, FLATBUFFER_FILE, export_backbone
    from streaming.registry import CHAMPION, open_registry

    registry = open_registry(settings.home)
    champion = registry.target(CHAMPION)
    if backbone is None and input_size is None and champion is not None:
        bundle = registry.fetch(champion, scratch / "bundle")
        if bundle.manifest.backbone.network is None and bundle.manifest.backbone.engine == "litert":
            size = sum(len(content) for content in bundle.files.values())
            return scratch / "bundle" / FLATBUFFER_FILE, bundle.manifest.backbone.n_features, size
    square = None if input_size is None else (input_size, input_size)
    exported = export_backbone(backbone or DEFAULT_BACKBONE, weights, settings.backbones_dir, input_size=square)
    return exported.flatbuffer, exported.spec.n_features, exported.flatbuffer.stat().st_size


def _print(load: float, costs: "Costs", plan: "CapacityPlan") -> None:
    from streaming.jobs.capacity import gigabytes

    per_core = 1 / costs.per_image_s
    out.print(
        f"an image of {costs.image_bytes / 1e3:,.0f} KB takes {1000 * costs.per_image_s:.2f} ms of CPU time:"
        f" decoding {1000 * costs.decode_s:.2f}, CNN {1000 * costs.backbone_s:.2f}, other"
        f" {1000 * costs.rest_s:.2f}; {per_core:,.0f} images/s per core"
    )
    table = new_table(f"for {load:,.0f} images/s", "")
    rows = {
        "streams, each with its own topic and home": f"{plan.streams:,}",
        "cores for Python workers": f"{plan.cores:,}",
        "partitions": f"{plan.partitions:,} or a multiple",
        "a micro-batch": f"{plan.images_per_batch:,} images, one every {plan.interval_s:.1f} s",
        "publish → committed row": f"about {plan.latency_s:.1f} s",
        "memory of the Python workers": f"{gigabytes(plan.worker_memory_bytes)} in total",
        "memory of each driver": gigabytes(plan.driver_memory_bytes),
        "growth of the topics": f"{gigabytes(plan.topic_bytes_per_day)} per day",
        "growth of the tables": f"{gigabytes(plan.table_bytes_per_day)} per day",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)
    used, limit = plan.limits[plan.first_limit]
    out.print(f"first bottleneck as the load grows: {plan.first_limit} ({used:,.4g} of {limit:,.4g})")
