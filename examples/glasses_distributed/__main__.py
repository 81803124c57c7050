"""Faces with and without glasses: a small CNN, trained in every distributed mode; the best one serves the stream.

Example: python -m examples.glasses_distributed published/faces published/labels.csv
"""

import csv
import shutil
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.table import Table

from examples.glasses_distributed.faces import FACES, SEED, WITH, WITHOUT, write_original_layout
from examples.service import HomeOption, JsonOption, Outcome, Service, script
from streaming.errors import ServiceError

ORIGINAL = "test accuracy .9969, log loss .0118, on other pictures"
MODES, FREQUENCIES = ("synchronous", "asynchronous", "hogwild"), ("batch", "epoch")
SIDE, BATCH_SIZE = 128, 128
WIDTH = 140  # of the table
CLASSES = {"1": WITH, "0": WITHOUT}


@dataclass(frozen=True)
class ModeResult:
    """A training mode and its result. `stable` log losses are computed from logits, the others from probabilities.

    Attributes:
        threshold: the probability from which "no glasses" is predicted: the one with the best F1 on validation.
        test_accuracy, test_f1: with this threshold.
        test_accuracy_at_half: with a threshold of 0.5.
        staleness: changes by other workers between a worker's read and its push, on average.
        lost: weights whose change another worker overwrote.
    """

    mode: str
    frequency: str
    version: int
    threshold: float
    train_accuracy: float
    test_accuracy: float
    test_f1: float
    test_accuracy_at_half: float | None
    train_log_loss: float
    test_log_loss: float
    train_stable_log_loss: float
    test_stable_log_loss: float
    seconds: float
    images_per_second: float
    staleness: float
    lost: int
    megabytes: float

    @classmethod
    def of(cls, summary: dict[str, Any]) -> Self:
        """From the output of `imagestream train-cnn --json`."""
        history, train, test = summary["history"], summary["training_metrics"], summary["metrics"]
        staleness = {int(late): times for late, times in history["staleness"].items()}
        return cls(
            mode=history["mode"],
            frequency=history["frequency"],
            version=summary["version"],
            threshold=summary["threshold"],
            train_accuracy=train["accuracy"],
            test_accuracy=test["accuracy"],
            test_f1=test["macro_f1"],
            test_accuracy_at_half=summary.get("metrics_at_half", {}).get("accuracy"),
            train_log_loss=train["log_loss"],
            test_log_loss=test["log_loss"],
            train_stable_log_loss=train["log_loss_from_logits"],
            test_stable_log_loss=test["log_loss_from_logits"],
            seconds=history["seconds"],
            images_per_second=history["images_per_second"],
            staleness=sum(late * times for late, times in staleness.items()) / max(1, sum(staleness.values())),
            lost=history["lost"]["values"],
            megabytes=history["bytes_moved"] / 1e6,
        )


def write_labels(labels_csv: Path, faces: Path, file: Path) -> tuple[int, int]:
    """Join labels.csv (id, glasses) with the files face-ID.png into a CSV (name, label) for `imagestream`.

    Returns:
        (pictures, those whose label is undefined), which `imagestream` then leaves out.

    Raises:
        ServiceError: the CSV has other columns, or there are no pictures.
    """
    try:
        with labels_csv.open(encoding="utf-8-sig", newline="") as rows:
            reader = csv.DictReader(rows, restval="")
            if not {"id", "glasses"} <= set(reader.fieldnames or ()):
                raise ServiceError(f"{labels_csv}: expected the columns id and glasses, got {reader.fieldnames}")
            labels = {row["id"]: CLASSES.get(row["glasses"].strip().removesuffix(".0"), "") for row in reader}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ServiceError(f"{labels_csv} is not a CSV in UTF-8: {error}") from error
    pictures = {picture.stem.removeprefix("face-"): picture.name for picture in sorted(faces.glob("face-*.png"))}
    if not pictures:
        raise ServiceError(f"{faces} contains no face-N.png")
    with file.open("w", encoding="utf-8", newline="") as rows:
        writer = csv.writer(rows)
        writer.writerow(["name", "label"])
        writer.writerows((name, labels.get(number, "")) for number, name in pictures.items())
    return len(pictures), sum(not labels.get(number) for number in pictures)


def write_table(ways: list[ModeResult], file: Path) -> Path:
    """Write the results as CSV and to the terminal; unknown values are empty."""
    names = [field.name for field in fields(ModeResult)]
    with file.open("w", encoding="utf-8", newline="") as rows:
        writer = csv.DictWriter(rows, names)
        writer.writeheader()
        writer.writerows(asdict(way) for way in ways)
    table = Table(
        "", *(f"{way.mode} per {way.frequency}" for way in ways), box=None, title="\nresults by training mode"
    )
    for name in names[2:]:
        table.add_row(name.replace("_", " "), *(_formatted(getattr(way, name)) for way in ways))
    Console(width=WIDTH).print(table)
    return file


def best_of(ways: list[ModeResult]) -> ModeResult:
    """The result with the highest accuracy on held-out images; of several, the one with the lowest log loss."""
    return max(ways, key=lambda way: (way.test_accuracy, -way.test_stable_log_loss))


def _formatted(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.4f}" if isinstance(figure, float) else f"{figure}"


def main(  # noqa: PLR0917  the options of a command
    images: Annotated[Path | None, typer.Argument(help="Folder of face-N.png; default: generated faces.")] = None,
    labels: Annotated[Path | None, typer.Argument(help="CSV with the columns id and glasses.")] = None,
    home: HomeOption = None,
    faces: Annotated[int, typer.Option(min=20, help="Number of faces to generate if no folder is given.")] = 2_000,
    size: Annotated[int, typer.Option(min=16, help="Size of generated faces, in pixels per side.")] = 1_024,
    mode: Annotated[list[str] | None, typer.Option(help="Run only this mode; repeatable.")] = None,
    frequency: Annotated[list[str] | None, typer.Option(help="Run only this frequency; repeatable.")] = None,
    workers: Annotated[int, typer.Option(help="Number of workers that train concurrently.")] = 4,
    epochs: Annotated[int, typer.Option(help="Number of epochs per training run.")] = 10,
    json_file: JsonOption = None,
) -> None:
    """Train the CNN on labelled images in every mode, per batch and per epoch; use the best one in the stream."""
    service = Service.new("glasses_distributed", home)
    if images is None:
        typer.echo(f"drawing {faces:,} faces of {size}×{size} …")
        labels = write_original_layout(service.home / "images", faces, size, SEED)
        images = labels.parent / FACES
    labels = labels or images.parent / "labels.csv"
    joined = service.home / "labels.csv"
    pictures, undefined = write_labels(labels, images, joined)
    typer.echo(f"{pictures:,} pictures; {undefined:,} of them left out, since their label is undefined")

    given = ("--images", images, "--labels", joined, "--workers", workers, "--threshold", "f1", "--seed", SEED)
    network = ("--architecture", "cnn_gray", "--input-size", SIDE, "--epochs", epochs, "--batch-size", BATCH_SIZE)
    ways, plots = [], []
    for how, often in product(mode or MODES, frequency or FREQUENCIES):
        trained = service.run("train-cnn", *given, *network, "--mode", how, "--frequency", often)
        ways.append(ModeResult.of(trained))
        plots.append(Path(shutil.copy(trained["learning_curves"], service.home / f"curves-{how}-{often}.png")))
    table = write_table(ways, service.home / "ways.csv")

    best = best_of(ways)
    service.run("models", "promote", best.version)
    scored = service.score(images)
    Outcome(
        example="glasses_distributed",
        rows_in=pictures - undefined,
        rows_out=trained["training_rows"] + int(trained["metrics"]["holdout_rows"]),
        metric=f"accuracy on held-out images, trained {best.mode}, per {best.frequency}, by {workers} workers",
        value=best.test_accuracy,
        original=ORIGINAL,
        published=scored.published,
        streamed=scored.predicted,
        plots=plots,
        details={
            "pictures": pictures,
            "undefined labels, left out": undefined,
            "best version": best.version,
            "log loss": best.test_log_loss,
            "threshold": best.threshold,
            "every way": table,
        },
    ).print_summary(json_file)


if __name__ == "__main__":
    script(main)
