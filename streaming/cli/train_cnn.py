"""`imagestream train-cnn`: train a CNN end to end on Spark's workers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import MODELS, SPARK, seconds
from streaming.cli.console import Spinner, err, out, warn
from streaming.cli.dataset_options import (
    DatasetOption,
    ImagesOption,
    LabelsOption,
    LimitOption,
    PatternOption,
    choose_dataset,
)
from streaming.cli.fit_options import METRIC, OPTIONS
from streaming.cli.interrupts import stoppable, stopping_cleanly
from streaming.cli.output import print_table
from streaming.cli.train import GATE, ConfidenceOption, MarginOption, PromoteOption, print_result, summary_of
from streaming.distributed.options import Frequency, Mode, TrainerOptions
from streaming.errors import UsageError
from streaming.training.fit_options import GateOptions
from streaming.wording import counted

if TYPE_CHECKING:
    from models.evaluation import Evaluation
    from streaming.distributed.history import EpochRecord
    from streaming.distributed.training_run import WorkerProgress
    from streaming.training.train_cnn import CNNResult

DEFAULTS = TrainerOptions()
LEARNING = "Learning"
WORKERS = "Workers"


@app.command("train-cnn", panel=MODELS, settings=SPARK)
def train_cnn(
    context: typer.Context,
    images: ImagesOption = None,
    labels: LabelsOption = None,
    label_pattern: PatternOption = None,
    dataset: DatasetOption = None,
    limit: LimitOption = 1_000,
    architecture: Annotated[
        str, typer.Option(help="Architecture: cnn_gray, cnn_color, or a backbone, which gets a new head.")
    ] = "cnn_gray",
    weights: Annotated[str, typer.Option(help="Initial weights: random, imagenet, or a weights file.")] = "random",
    input_size: Annotated[
        int | None, typer.Option(metavar="N", help="Input size N×N in pixels; default: the network's own size.")
    ] = None,
    unfreeze: Annotated[
        int, typer.Option(min=-1, help="Number of the backbone's last blocks to train besides the head; -1 for all.")
    ] = 0,
    mode: Annotated[
        Mode, typer.Option(help="Mode in which the workers' updates are combined.", rich_help_panel=WORKERS)
    ] = DEFAULTS.mode,
    frequency: Annotated[
        Frequency,
        typer.Option(
            help="Interval at which the workers' updates are combined: every batch or every epoch.",
            rich_help_panel=WORKERS,
        ),
    ] = DEFAULTS.frequency,
    workers: Annotated[
        int, typer.Option(help="Number of Spark tasks that train in parallel.", rich_help_panel=WORKERS)
    ] = DEFAULTS.workers,
    threads: Annotated[
        int, typer.Option(help="Number of threads of each worker.", rich_help_panel=WORKERS)
    ] = DEFAULTS.threads,
    timeout: Annotated[
        Any,
        typer.Option(
            parser=seconds,
            metavar="TIME",
            help="Time without a message after which a worker is considered lost, e.g. 5m.",
            rich_help_panel=WORKERS,
        ),
    ] = DEFAULTS.timeout_s,
    epochs: Annotated[int, typer.Option(help="Maximum number of epochs.", rich_help_panel=LEARNING)] = DEFAULTS.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Number of images per step, over all workers.", rich_help_panel=LEARNING)
    ] = DEFAULTS.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Initial learning rate.", rich_help_panel=LEARNING)] = (
        DEFAULTS.learning_rate
    ),
    optimizer: Annotated[
        str, typer.Option(help="Name of the Keras optimizer: adam, sgd, …", rich_help_panel=LEARNING)
    ] = "adam",
    schedule: Annotated[
        Literal["constant", "cosine", "plateau"],
        typer.Option(
            help="Learning-rate schedule: cosine decays to 0, plateau halves the rate when validation stops improving.",
            rich_help_panel=LEARNING,
        ),
    ] = "constant",
    patience: Annotated[
        int | None,
        typer.Option(
            help="Number of epochs without improvement on validation after which training stops; default: never.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            metavar="P|f1|cost:FP:FN",
            help="Decision threshold for two classes: a probability, or the best value on validation by F1 or cost.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    metric: Annotated[str | None, METRIC] = None,
    class_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=W", help="Weight of a class's images in the loss; may be repeated.", rich_help_panel=LEARNING
        ),
    ] = None,
    augment: Annotated[
        bool,
        typer.Option(
            "--augment",
            help="Flip, rotate, crop and brighten or darken images at random in each epoch.",
            rich_help_panel=LEARNING,
        ),
    ] = False,
    mirror: Annotated[
        bool, typer.Option(help="Allow --augment to flip images horizontally.", rich_help_panel=LEARNING)
    ] = True,
    mixed_precision: Annotated[
        bool, typer.Option("--mixed-precision", help="Compute in bfloat16 on GPUs.", rich_help_panel=LEARNING)
    ] = False,
    holdout: Annotated[float, typer.Option(help="Fraction of the images, from 0 to 1, held out for evaluation.")] = 0.2,
    group_by: Annotated[str | None, OPTIONS["group_by"]] = None,
    validation: Annotated[
        float, typer.Option(help="Fraction of the remaining images, from 0 to 1, used for validation.")
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of initial weights, image order and splits.")
    ] = DEFAULTS.seed,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted training after its last complete epoch.")
    ] = False,
    margin: MarginOption = GATE.margin,
    confidence: ConfidenceOption = GATE.confidence,
    promote: PromoteOption = True,
    json_file: JsonOption = None,
) -> None:
    """Train a CNN on Spark's workers and register it as a model; the first one becomes the champion.

    Synchronous workers wait for one another: per batch they take the same step as a single process, per epoch they
    average their weights. Asynchronous workers apply their updates to the server's weights as soon as they are ready,
    hogwild workers without a lock. Only the synchronous mode is reproducible.

    Example: imagestream train-cnn --images faces/ --workers 4 --epochs 20 --patience 5
    """
    settings = settings_of(context)
    settings.place.check()  # before images are read
    gate = GateOptions(margin, confidence, promote)
    options = TrainerOptions(
        mode=mode,
        frequency=frequency,
        workers=workers,
        batch_size=batch_size,
        epochs=epochs,
        learning_rate=learning_rate,
        optimizer=optimizer,
        class_weights=_class_weights(class_weight),
        augment=augment,
        mirror=mirror,
        mixed_precision=mixed_precision,
        threads=threads,
        timeout_s=timeout,
        seed=seed,
    )
    found = choose_dataset(settings, images, dataset, limit, label_pattern, labels)

    from streaming.training.train_cnn import CNNOptions  # slow to import: usage errors above are reported first
    from streaming.training.train_cnn import train_cnn as run

    network = CNNOptions(
        architecture,
        weights,
        input_size,
        unfreeze,
        holdout,
        validation,
        schedule,
        patience,
        threshold,
        metric,
        group_by,
    )
    hint = "run it again with --resume to continue after the last complete epoch"
    with stoppable(hint), stopping_cleanly(), _Live(options) as live:
        result = run(
            settings,
            found,
            network,
            options,
            gate,
            resume=resume,
            on_step=live.step,
            on_epoch=live.epoch,
            on_progress=live.progress,
        )
    _print_result(result, json_file)


class _Live:
    """Shows the workers' progress next to a spinner, and a line per epoch."""

    def __init__(self, options: TrainerOptions) -> None:
        self._options = options
        self._rows: dict[int, WorkerProgress] = {}
        self._spinner = Spinner("starting")

    def __enter__(self) -> "_Live":
        self._spinner.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._spinner.__exit__()

    def step(self, step: str) -> None:
        self._spinner.update(step)

    def progress(self, progress: "WorkerProgress") -> None:
        self._rows[progress.worker] = progress
        of_all = [self._rows.get(worker) for worker in range(self._options.workers)]
        counts = (f"{one.rows:,}" if one is not None else "–" for one in of_all)
        reading = any(one is None or one.epoch < 0 for one in of_all)
        where = (
            "reading images"
            if reading
            else f"epoch {min(one.epoch for one in of_all if one) + 1}/{self._options.epochs}"
        )
        self._spinner.update(f"{where}: images by worker {' · '.join(counts)}")

    def epoch(self, record: "EpochRecord") -> None:
        training, validation = record.training, record.validation
        watched = f", validation {validation.log_loss:.4f} and {validation.accuracy:.4f}" if validation.rows else ""
        err.print(
            f"epoch {record.epoch + 1}/{self._options.epochs}: {record.seconds:.1f} s, "
            f"log loss {training.log_loss:.4f}, accuracy {training.accuracy:.4f}{watched}"
        )


def _class_weights(given: list[str] | None) -> dict[str, float] | None:
    weights = {}
    for one in given or ():
        name, equals, value = one.rpartition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not 0 < weights[name] < float("inf"):
            raise UsageError(f"--class-weight: expected CLASS=WEIGHT with a weight above 0, got {one!r}")
    return weights or None


def _print_result(result: "CNNResult", json_file: Path | None) -> None:
    history = result.history
    warn(*(f"{event}; it was restarted" for event in history.events))
    warn(*result.model.warnings, *(f"left out {path}: {why}" for path, why in result.bad.items()))
    sides = (("trained on", result.training), ("held out", result.model.evaluation))
    print_table("", [_row(name, found) for name, found in sides], "images rows accuracy log_loss log_loss_from_logits")
    stale = f", staleness {history.mean_staleness:.1f}" if history.staleness else ""
    lost = f", {history.lost.values:,} weights lost updates" if history.mode == Mode.HOGWILD else ""
    out.print(
        f"{history.mode}, per {history.frequency}, {counted(history.workers, 'worker')}: "
        f"{counted(len(history.epochs), 'epoch')} in {history.seconds:.1f} s, "
        f"{history.images_per_second:,.0f} images/s, {history.bytes_moved / 1e6:,.0f} MB moved{stale}{lost}"
    )
    from streaming.reports.curves import learning_curves
    from streaming.reports.plots import png

    curves = result.history_file.with_name("learning-curves.png")
    curves.write_bytes(png(lambda: learning_curves(history)))
    out.print(f"learning curves: {curves}")
    print_result(result.model, None)
    summary: dict[str, Any] = summary_of(result.model) | {
        "history": history.as_record() | {"images_per_second": history.images_per_second},
        "training_metrics": result.training.as_metrics(),
        "metrics_at_half": result.at_half.as_metrics(),
        "learning_curves": str(curves),
        "left_out": result.n_bad,
    }
    write_json(json_file, summary)


def _row(name: str, found: "Evaluation") -> dict[str, Any]:
    figures = ("rows", "accuracy", "log_loss", "log_loss_from_logits")
    return {"images": name} | {figure: getattr(found, figure) for figure in figures}
