"""`imagestream train` and `imagestream retrain`: the batch jobs that create model versions."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from models.architectures import DEFAULT_BACKBONE
from streaming.cli.app import JsonOption, app, settings_of, usage_errors, write_json
from streaming.cli.backbone_options import BackboneOption, PresetOption, WeightsOption
from streaming.cli.command_line import MODELS, SPARK, Deprecated
from streaming.cli.console import Spinner, out, warn
from streaming.cli.dataset_options import (
    DEPRECATED_OUTPUT,
    DatasetOption,
    FlatOption,
    ImagesOption,
    LabelsOption,
    LimitOption,
    PatternOption,
    choose_dataset,
    pooling_of,
)
from streaming.cli.fit_options import with_fit_options, with_inherited_options
from streaming.cli.interrupts import stopping_cleanly
from streaming.training.fit_options import FitOptions, GateOptions

if TYPE_CHECKING:
    from streaming.training.job import TrainResult


GATE = GateOptions()
MarginOption = Annotated[
    float,
    typer.Option(
        help="Gain in --metric that a candidate must exceed to be promoted; a negative value tolerates that loss. "
        "Accuracy and F1 are fractions from 0 to 1, cost is per image, log loss is in nats."
    ),
]
PromoteOption = Annotated[
    bool, typer.Option("--promote/--no-promote", help="Promote the version if it passes the gate.")
]
ConfidenceOption = Annotated[
    float,
    typer.Option(
        help="Confidence, from 0 to 1, that no candidate without that gain replaces the champion, over all "
        "comparisons with it."
    ),
]


@app.command(
    panel=MODELS,
    settings=SPARK,
    deprecated=(
        DEPRECATED_OUTPUT,
        Deprecated("--engine", "--runtime {}"),
        Deprecated("--augment", "--augmented-copies {}"),
    ),
)
@with_fit_options
def train(
    context: typer.Context,
    options: FitOptions,
    images: ImagesOption = None,
    labels: LabelsOption = None,
    label_pattern: PatternOption = None,
    dataset: DatasetOption = None,
    limit: LimitOption = 1_000,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    weights: WeightsOption = "imagenet",
    flat: FlatOption = False,
    input_size: Annotated[
        int | None, typer.Option(metavar="N", help="Input size N×N in pixels; default: the backbone's own size.")
    ] = None,
    runtime: Annotated[
        Literal["litert", "keras"],
        typer.Option(help="Runtime of the backbone; keras is the reference implementation and supports GPUs."),
    ] = "litert",
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Quantise the backbone to 8-bit integers, unless that costs more than one percentage point of "
            "accuracy.",
        ),
    ] = False,
    preset: PresetOption = None,
    augmented_copies: Annotated[
        int, typer.Option(min=0, max=20, metavar="N", help="Number of augmented copies of each training image.")
    ] = 0,
    promote: PromoteOption = True,
    margin: MarginOption = GATE.margin,
    confidence: ConfidenceOption = GATE.confidence,
    json_file: JsonOption = None,
) -> None:
    """Train a model on labelled images and register it; the first one becomes the champion.

    A later version replaces the champion only if it is significantly better, by --metric, on the same held-out images.

    Example: imagestream train --images photos/ (one folder per class), or: imagestream train --dataset digits
    """
    settings = settings_of(context)
    settings.place.check()  # before images are read
    found = choose_dataset(settings, images, dataset, limit, label_pattern, labels)

    from streaming.training.backbones import BackboneOptions  # slow to import: usage errors above are reported first
    from streaming.training.train import train as run

    with usage_errors():
        network = BackboneOptions(backbone, weights, pooling_of(flat), input_size, runtime, int8, preset)
        gate = GateOptions(margin, confidence, promote)
    with stopping_cleanly(), Spinner("starting") as spinner:
        result = run(settings, found, network, options, gate, augment=augmented_copies, on_step=spinner.update)
    warn(*result.warnings, *(f"left out {path}: {why}" for path, why in result.bad.items()))
    print_result(result, json_file)


@app.command(panel=MODELS, settings=SPARK)
@with_inherited_options
def retrain(
    context: typer.Context,
    given: Mapping[str, Any],
    margin: MarginOption = GATE.margin,
    confidence: ConfidenceOption = GATE.confidence,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Fit and compare without registering or promoting a version.")
    ] = False,
    promote: PromoteOption = True,
    augmented: Annotated[
        bool | None,
        typer.Option(
            "--augmented/--no-augmented",
            help="Also fit on the augmented copies that training stored; default: as for the champion.",
        ),
    ] = None,
    every: Annotated[
        str | None, typer.Option(metavar="TIME", help="Interval between retrainings, e.g. 24h; runs until stopped.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Fit a new version on all labelled features stored so far and promote it if it beats the champion.

    Options that are not given are those of the champion. Both versions are evaluated by --metric on the same held-out
    images, on which neither was fitted. No image is read and no feature recomputed. A running stream loads the new
    champion at its next micro-batch.

    Example: imagestream retrain --every 24h --margin 0.005
    """
    with usage_errors():
        gate = GateOptions(margin, confidence, promote)
    if every is not None:
        _retrain_every(every, settings_of(context).log_format)
        return
    from streaming.training.train import retrain as run

    with stopping_cleanly(), Spinner("starting") as spinner:
        settings = settings_of(context)
        result = run(settings, given, gate, dry_run=dry_run, augmented=augmented, on_step=spinner.update)
    warn(*result.warnings)
    print_result(result, json_file)


def _retrain_every(every: str, log_format: str) -> None:
    """Run this command without `--every` at the interval, each time in a new process, and log each result."""
    from streaming.pipeline.observe import open_log
    from streaming.training.schedule import parse_interval, run_every

    interval = parse_interval(every)
    log = open_log(log_format)
    arguments = iter(sys.argv[1:])
    # The option may be spelled `--every TIME` or `--every=TIME`.
    kept = [one for one in arguments if not (one == "--every" and next(arguments)) and not one.startswith("--every=")]

    def on_run(code: int, last_line: str) -> None:
        if code == 0:
            log.info("retrained", result=last_line)
        else:
            log.error("retraining failed", why=last_line.removeprefix("error: "))

    log.info("retraining", every=every)
    run_every(interval, [sys.executable, "-P", "-m", "imagestream", *kept], on_run)
    log.info("stopped")


def summary_of(result: "TrainResult") -> dict[str, Any]:
    """Return the summary of a training run for `--json`."""
    verdict, paired = result.verdict, result.verdict.paired
    return {
        "version": result.version,
        "bundle_sha256": result.sha256,
        "promoted": result.promoted,
        "why": result.why,
        "metric": str(result.objective),
        "inherited": dict(result.inherited),
        "paired_counts": asdict(paired.counts) if paired else None,
        "gain": paired.gain.value if paired else None,
        "gain_above": verdict.low,
        "gain_confidence": verdict.confidence,
        "look": verdict.look if paired else None,
        "images_needed": verdict.needed,
        "training_rows": result.training_rows,
        "fingerprint": result.fingerprint,
        "left_out": result.n_bad,
        "warnings": result.warnings,
        "n_components": result.n_components,
        "variance_kept": result.variance_kept,
        "threshold": result.threshold,
        "metrics": result.metrics,
        "champion_metrics": result.champion.as_metrics() if result.champion else None,
    }


def print_result(result: "TrainResult", json_file: Path | None) -> None:
    found = result.evaluation
    name = "the candidate" if result.version is None else f"version {result.version}"
    out.print(
        f"{name}: {result.training_rows:,} images, {result.n_components} components"
        + (f" ({result.variance_kept:.1%} of the variance)" if result.variance_kept else "")
        + (f", threshold {result.threshold:.6g}" if result.threshold is not None else "")
        + f", accuracy {found.accuracy:.4f}, macro F1 {found.macro_f1:.4f}, log loss {found.log_loss:.4f}"
        f" on {found.rows:,} held-out images"
    )
    if kept := changed_by(result.inherited):
        out.print(f"as the champion: {kept}")
    verdict = ("would be " if result.version is None else "is ") + ("champion" if result.promoted else "not promoted")
    out.print(f"{name} {verdict}: {result.why}")
    write_json(json_file, summary_of(result))


def changed_by(inherited: Mapping[str, Any]) -> str:
    """Describe the inherited options that differ from the defaults of `train`."""
    usual = {field.name: field.default for field in fields(FitOptions)}
    changed = {name: value for name, value in inherited.items() if value != usual[name]}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changed.items())
