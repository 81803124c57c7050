"""CIFAR-10 as published: an MLP on the pixels of all 60,000 images in bounded memory, compared with CNN features.

The stream scores the test images with the MLP as champion and the CNN as challenger in one pass.

Example: python -m examples.cifar10_mlp cifar-10-batches-py/
"""

from pathlib import Path
from typing import Annotated

import typer

from examples.cifar10_mlp.batches import SIDE, open_cifar10, write_parquet
from examples.cifar10_mlp.generated import Version, write_cifar10
from examples.service import HomeOption, JsonOption, Outcome, Service, script
from streaming.images.dataset import read_dataset, write_images

ORIGINAL = "accuracy 0.4384 on 5,000 of CIFAR-10, fitted on 30,000; more did not fit in 12 GB"
LAYERS, BLOCK_SIZE, SEED = "512,128", 64, 614
FOLDERS = ("train", "test")
ON_TEST = """
SELECT count(*) AS images, avg((champion_label = label_true)::INT) AS mlp, avg((label = label_true)::INT) AS cnn
FROM shadow
"""


def main(
    batches: Annotated[
        Path | None,
        typer.Argument(
            help="CIFAR-10's python or binary version, unpacked, or a folder with train/CLASS/ and test/CLASS/ of "
            "image files; default: drawn images."
        ),
    ] = None,
    *,
    home: HomeOption = None,
    backbone: Annotated[
        str, typer.Option(help="Backbone of the CNN that the MLP is compared with.")
    ] = "efficientnet_lite0",
    weights: Annotated[str, typer.Option(help="Weights of the backbone: imagenet, random, or a file.")] = "imagenet",
    input_size: Annotated[int, typer.Option(help="Input size of the CNN, in pixels per side.")] = 96,
    max_iter: Annotated[int, typer.Option(min=1, help="Maximum number of iterations of the MLP.")] = 100,
    holdout: Annotated[
        float, typer.Option(help="Share of the training images held out to compare the two models.")
    ] = 0.1,
    per_batch: Annotated[
        int, typer.Option(min=10, help="Number of images to generate per batch if no folder is given.")
    ] = 500,
    version: Annotated[Version, typer.Option(help="Version of the layout to generate.")] = "python",
    json_file: JsonOption = None,
) -> None:
    """Train an MLP on scaled pixels and a classifier on CNN features; then score the test images with the stream."""
    service = Service.new("cifar10_mlp", home)
    training, test, training_rows = prepare(
        batches or write_cifar10(service.home / "batches", per_batch, version), service.home
    )

    pixels = ("--backbone", "pixels", "--projection", "none")
    vectors = service.run("features", "--images", training, "--output", service.home / "vectors.parquet", *pixels)
    fit = ("--holdout", holdout, "--seed", SEED)
    mlp = ("--classifier", "mlp", "--layers", LAYERS, "--max-iter", max_iter, "--block-size", BLOCK_SIZE)
    fitted = service.run("train", "--images", training, "--input-size", SIDE, *pixels, *mlp, *fit)
    network = ("--backbone", backbone, "--weights", weights, "--input-size", input_size)
    compared = service.run("train", "--images", training, *network, *fit)
    service.run("models", "promote", fitted["version"])
    service.run("models", "promote", compared["version"], "--alias", "challenger")
    scored = service.score(test, "--label-from", "parent")
    live = service.run("report", "--live", "--output", service.home / "report.html")
    (on_test,) = service.query(ON_TEST)
    features = f"{backbone} ({weights}) + PCA + logistic regression"
    Outcome(
        example="cifar10_mlp",
        rows_in=training_rows + scored.published,
        rows_out=vectors["rows"] + scored.predicted,
        metric="accuracy on the test batch, MLP [3072, 512, 128, 10] on pixels",
        value=live["metrics"]["accuracy"],
        original=ORIGINAL,
        published=scored.published,
        streamed=scored.predicted,
        plots=[Path(one) for one in live["figures"] if "samples" in one],
        details={
            "training images": training_rows,
            "values of a vector": vectors["n_components"],
            "on the same held-out images": {
                "MLP on pixels": fitted["metrics"]["accuracy"],
                features: compared["metrics"]["accuracy"],
            },
            f"on the same {int(on_test['images']):,} test images": {
                "MLP on pixels": round(float(on_test["mlp"]), 4),
                features: round(float(on_test["cnn"]), 4),
            },
            "vectors": vectors["output"],
        },
    ).print_summary(json_file)


def prepare(batches: Path, into: Path) -> tuple[Path, Path, int]:
    """Convert batches into `into`, one at a time; folders of image files are used unchanged.

    Returns:
        (training images, folder of test images, number of training images).

    Raises:
        ServiceError: the data is not CIFAR-10.
    """
    training, test = (batches / name for name in FOLDERS)
    if training.is_dir() and test.is_dir():
        return training, test, read_dataset(training).n_images
    cifar = open_cifar10(batches)
    training, test = into / "training.parquet", into / "test"
    rows = write_parquet(cifar.images(cifar.training), training)
    write_images(test, ((name, label, data) for name, label, data in cifar.images(cifar.test)))
    return training, test, rows


if __name__ == "__main__":
    script(main)
