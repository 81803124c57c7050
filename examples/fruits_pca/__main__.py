"""Fruits-360: MobileNetV2 features, PCA to 90 % of the variance, and one CSV; then a model and the stream.

Example: python -m examples.fruits_pca fruits-360/Test
"""

from pathlib import Path
from typing import Annotated

import typer

from examples.fruit_images import write_fruits
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

ORIGINAL = "k = 185 for 90 % of the variance, fitted twice; no classifier"
SHARE = 0.9


def main(
    images: Annotated[Path | None, typer.Argument(help="Folder Test of Fruits-360; default: generated images.")] = None,
    home: HomeOption = None,
    backbone: BackboneOption = "mobilenet_v2",
    weights: WeightsOption = "imagenet",
    per_class: PerClassOption = 30,
    json_file: JsonOption = None,
) -> None:
    """Write the features of a folder of images as CSV and Parquet; then train a model and score the images with it."""
    service = Service.new("fruits_pca", home)
    images = images or write_fruits(service.home / "images" / "Test", per_class)
    network = ("--backbone", backbone, "--weights", weights, "--explained-variance", SHARE)

    table = service.home / "features.csv"
    written = service.run("features", "--images", images, "--output", table, *network)
    service.run(
        "features", "--images", images, "--output", table.with_suffix(".parquet"), *network
    )  # from stored features, without the CNN

    trained = service.run("train", "--images", images, *network)
    scored = service.score(images, "--label-from", "parent")
    page = service.home / "report.html"
    report = service.run("report", "--model", trained["version"], "--output", page)
    Outcome(
        example="fruits_pca",
        rows_in=written["dataset"]["images"],
        rows_out=written["rows"],
        metric=f"accuracy on held-out images, {backbone} ({weights}) + PCA + logistic regression",
        value=trained["metrics"]["accuracy"],
        original=ORIGINAL,
        published=scored.published,
        streamed=scored.predicted,
        plots=[Path(one) for one in report["figures"] if "variance" in one or "samples" in one],
        details={
            "components": written["n_components"],
            "variance kept": written["variance_kept"],
            "classes": len(written["dataset"]["classes"]),
            "features": table,
        },
    ).print_summary(json_file)


if __name__ == "__main__":
    script(main)
