"""`imagestream models import` and `models inspect`: models trained elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from streaming.cli.app import JsonOption, settings_of, write_json
from streaming.cli.console import Spinner, err, out
from streaming.cli.models import AliasName, models_app
from streaming.cli.output import print_details
from streaming.errors import UsageError

if TYPE_CHECKING:
    from models.import_file import Inspection
    from streaming.registry import Registry
    from streaming.storage.registry_objects import Alias
    from streaming.training.import_model import ImportResult

FileArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE[:TENSOR]|efficientnet_lite0",
        help="Model file, with the name of the output tensor if it has several; a zip from `models export`; or the "
        "name of the installed ImageNet classifier.",
    ),
]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected a number, or three such as 0.485,0.456,0.406, got {text!r}") from None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().replace("×", "x").partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise typer.BadParameter(f"expected N or HEIGHTxWIDTH in pixels, got {text!r}") from None


PANEL = "Preprocessing (default: the preset's)"


@models_app.command("import")
def import_(
    context: typer.Context,
    file: FileArgument,
    classes: Annotated[
        str,
        typer.Option(
            metavar="FILE|auto",
            help="Class names in the order of the scores: a file with "
            "one name per line, or JSON; auto takes the names in the model file, else numbers.",
        ),
    ] = "auto",
    preset: Annotated[
        Literal["imagenet", "torchvision", "keras", "minus1to1", "zero_to_one", "efficientnet_lite", "raw"] | None,
        typer.Option(
            help="Preprocessing that the model was trained with; default: inferred from the input's layout.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    input_size: Annotated[
        Any,
        typer.Option(
            parser=_size,
            metavar="N|HxW",
            help="Input size in pixels, if the file does not fix it.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    mean: Annotated[
        Any,
        typer.Option(
            parser=_numbers,
            metavar="M[,M,M]",
            help="Mean subtracted from the scaled pixels, per channel.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    std: Annotated[
        Any,
        typer.Option(
            parser=_numbers,
            metavar="S[,S,S]",
            help="Standard deviation by which the result is divided, per channel.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Factor applied to the pixel values, 0 to 255, before the mean is subtracted.", rich_help_panel=PANEL
        ),
    ] = None,
    layout: Annotated[
        Literal["nhwc", "nchw"] | None, typer.Option(help="Order of the input's dimensions.", rich_help_panel=PANEL)
    ] = None,
    channels: Annotated[
        Literal["rgb", "bgr", "gray"] | None, typer.Option(help="Order of the channels.", rich_help_panel=PANEL)
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            metavar="stretch|N",
            help="Resizing: stretch scales the whole image to the input; N scales its shorter side to N pixels and "
            "crops the centre.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    crop: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Side length, from 0 to 1, of a centred crop relative to the largest one; the crop is resized to the "
            "input.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    filter_: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos", "bilinear_sampled", "bicubic_sampled"] | None,
        typer.Option(
            "--filter",
            help="Resampling filter: one of Pillow's, or *_sampled as in tf.image.resize.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    scores: Annotated[
        Literal["logits", "probabilities"] | None,
        typer.Option(help="Type of the model's output; default: determined from two photographs."),
    ] = None,
    alias: Annotated[
        AliasName | None,
        typer.Option(
            help="Alias to assign to the new version; default: champion for the first model of a home, else none."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Register a classifier that was trained elsewhere; the stream serves it like any other version.

    Example: imagestream models import efficientnet_lite0, or: imagestream models import net.onnx --preset imagenet
    """
    from models.bundle_zip import is_bundle_zip
    from models.import_file import split_tensor
    from streaming.registry import open_registry

    registry = open_registry(settings_of(context).home)
    alias_name: Alias | None = None if alias is None else alias.value
    if is_bundle_zip(Path(file)):
        if context.params != context.params | UNSET:
            raise UsageError(f"{file} is an exported model version: expected no preprocessing or class options")
        return _import_bundle(registry, Path(file), alias_name, json_file)

    from streaming.platform.machine import user_name
    from streaming.training.import_model import import_model

    path, tensor = split_tensor(file)
    given = {"mean": mean, "std": std, "scale": scale, "layout": layout, "channels": channels, "filter": filter_}
    changes = {name: value for name, value in given.items() if value is not None} | _fit(resize, crop)
    with Spinner(f"loading {path.name}"):
        result = import_model(
            registry, path, classes=classes, scores=scores, by=user_name(), alias=alias_name, tensor=tensor,
            preset=preset, input_size=input_size, changes=changes,
        )  # fmt: skip
    return _print_result(result, json_file)


# Values of the model options if none is given.
UNSET = {"classes": "auto"} | dict.fromkeys(
    ["preset", "input_size", "mean", "std", "scale", "layout", "channels", "resize", "crop", "filter_", "scores"]
)


def _import_bundle(registry: "Registry", file: Path, alias: "Alias | None", json_file: Path | None) -> None:
    from streaming.platform.machine import user_name
    from streaming.training.import_bundle import import_bundle

    with Spinner(f"checking {file.name}"):
        found = import_bundle(registry, file, by=user_name(), alias=alias)
    out.print(
        f"version {found.version} is {found.alias or 'registered'}: {file}"
        + ("" if found.is_new else "; it was already registered")
    )
    if not found.alias:
        out.print(f"to serve it: imagestream models promote {found.version}")
    summary = {"version": found.version, "bundle_sha256": found.sha256, "new": found.is_new}
    write_json(json_file, summary | {"champion": found.alias == AliasName.CHAMPION.value})


@models_app.command()
def inspect(file: Annotated[Path, typer.Argument(help="Model file.")], json_file: JsonOption = None) -> None:
    """Show a model file's inputs, outputs, operators and size without running or registering it.

    Example: imagestream models inspect resnet18.onnx
    """
    from dataclasses import asdict

    from models.import_file import inspect_file

    found = inspect_file(file)
    _print_inspection(found)
    write_json(json_file, asdict(found))


def _fit(resize: str | None, crop: float | None) -> dict[str, Any]:
    """Return the fields of the preprocessing recipe that `--resize` and `--crop` set."""
    if resize is not None and crop is not None:
        raise UsageError("--resize and --crop are mutually exclusive: a crop is resized to the input")
    if crop is not None:
        return {"fit": "crop", "crop_share": crop}
    if resize is None:
        return {}
    if resize == "stretch":
        return {"fit": "stretch"}
    if not resize.isdecimal():
        raise UsageError(f"--resize: expected stretch or the shorter side in pixels, got {resize!r}")
    return {"fit": "resize_crop", "shorter_side": int(resize)}


def _print_result(result: "ImportResult", json_file: Path | None) -> None:
    network, recipe = result.network.network, result.network.network.recipe
    for name, value in result.guessed.items():
        err.print(f"guessed {name}: {value}")
    out.print(
        f"version {result.version} is {result.alias or 'registered'}: {network.source}, "
        f"{len(result.classes):,} classes, "
        f"{recipe.input_size[0]}×{recipe.input_size[1]} pixels, {result.network.size / 1e6:.1f} MB, "
        f"output {result.scores}"
    )
    if not result.is_new:
        out.print("the same model is already registered")
    if not result.alias:
        out.print(f"to serve it: imagestream models promote {result.version}")
    summary = {
        "version": result.version,
        "bundle_sha256": result.sha256,
        "new": result.is_new,
        "champion": result.alias == AliasName.CHAMPION.value,
        "classes": len(result.classes),
        "scores": result.scores,
        "guessed": dict(result.guessed),
        "network": network.model_dump(mode="json"),
    }
    write_json(json_file, summary)


def _print_inspection(found: "Inspection") -> None:
    details: list[tuple[str, str]] = []
    details.append(("format", found.format + (f" by {found.producer}" if found.producer else "")))
    details.append(("size", f"{found.bytes / 1e6:,.1f} MB, {found.parameters:,} weights"))
    if found.opsets:
        details.append(("operator sets", ", ".join(f"{name or 'ai.onnx'} {n}" for name, n in found.opsets.items())))
    for kind, tensors in (("input", found.inputs), ("output", found.outputs)):
        for one in tensors:
            shape = "unknown shape" if one.shape is None else f"({', '.join(str(n or 'any') for n in one.shape)})"
            details.append((kind, f"{one.name}: {one.dtype} {shape}"))
    details.append(("operators", ", ".join(f"{name} {n}" for name, n in found.operators.items())))
    details.append(("class names", "in the file" if found.classes else "none in the file"))
    for name, value in found.guessed.items():
        details.append((f"guessed {name}", value))
    print_details(details)
