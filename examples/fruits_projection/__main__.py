"""Fruits with unaltered names: flat MobileNetV2 features, a sparse random projection, and Parquet for other tools.

Example: python -m examples.fruits_projection fruits/
"""

from pathlib import Path
from typing import Annotated

import typer

from examples.fruit_images import write_fruits
from examples.fruits_projection.readers import READERS, write_labels
from examples.service import (
    BackboneOption,
    HomeOption,
    JsonOption,
    Outcome,
    PerClassOption,
    Service,
    WeightsOption,
    script,
)
from streaming.errors import ServiceError

ORIGINAL = "features only: k = 9,468, where 22,688 images need 8,596; folders had to be renamed"
LABEL_PATTERN = r"^(?:.*/)?([^/]+?)(?:_\d+)?/[^/]+$"  # the name of the folder without a suffix _1, _2, …
EPS = 0.1


def main(
    images: Annotated[
        Path | None, typer.Argument(help="Folder with one folder per fruit; default: generated images.")
    ] = None,
    home: HomeOption = None,
    backbone: BackboneOption = "mobilenet_v2",
    weights: WeightsOption = "imagenet",
    per_class: PerClassOption = 30,
    json_file: JsonOption = None,
) -> None:
    """Write projected flat features as Parquet, read them with three tools, and train a model for the stream."""
    service = Service.new("fruits_projection", home)
    images = images or write_fruits(service.home / "images", per_class)
    labels = ("--label-pattern", LABEL_PATTERN)
    network = ("--backbone", backbone, "--weights", weights, "--projection", "random", "--eps", EPS)

    parquet = service.home / "features" / "features.parquet"
    written = service.run("features", "--images", images, "--output", parquet, "--flat", *labels, *network)
    read = {name: reader(parquet) for name, reader in READERS.items()}
    expected = (written["rows"], len(written["dataset"]["classes"]), written["n_components"])
    for name, found in read.items():
        if found != expected:
            raise ServiceError(f"{name} reads (rows, labels, width) {found}, expected {expected}")

    trained = service.run("train", "--images", images, "--flat", *labels, *network)
    scored = service.score(images)
    service.run("label", write_labels(parquet, service.home / "labels.csv"))  # by the images' hashes
    live = service.run("report", "--live", "--output", service.home / "report.html")
    Outcome(
        example="fruits_projection",
        rows_in=written["dataset"]["images"],
        rows_out=written["rows"],
        metric=f"accuracy on held-out images, {backbone} ({weights}) flat + random projection + logistic regression",
        value=trained["metrics"]["accuracy"],
        original=ORIGINAL,
        published=scored.published,
        streamed=scored.predicted,
        plots=[Path(one) for one in live["figures"] if "samples" in one],
        details={
            "read back (rows, labels, width)": read,
            "components": written["n_components"],
            "labels of folders": len(written["dataset"]["classes"]),
            "accuracy of the stream, on images it was fitted on, too": live["metrics"]["accuracy"],
            "features": parquet,
        },
    ).print_summary(json_file)


if __name__ == "__main__":
    script(main)
