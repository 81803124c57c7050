"""`imagestream models`: manage the model registry."""

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import MODELS, App
from streaming.cli.console import err, out, printable
from streaming.cli.output import FormatOption, OutputOption, list_rows
from streaming.cli.output_formats import Format
from streaming.errors import ServiceError

if TYPE_CHECKING:
    from streaming.registry import Registry

models_app = App(name="models", help="Show, promote, roll back, verify, import, export and delete model versions.")
app.add_typer(models_app, rich_help_panel=MODELS)
COLUMNS = {
    "version": int,
    "alias": str,
    "backbone": str,
    "components": int,
    "classes": int,
    "rows": int,
    "accuracy": float,
    "log_loss": float,
}


class AliasName(StrEnum):
    """An alias that a version can be promoted to."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"


AliasOption = Annotated[AliasName, typer.Option(help="Alias to move.")]
VersionArgument = Annotated[int, typer.Argument(min=1, help="Model version, as shown by 'models list'.")]


@models_app.command("list")
def list_(
    context: typer.Context,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """List the versions with their metrics and aliases.

    Example: imagestream models list
    """
    registry = _registry(context)
    aliases = registry.targets()
    rows, summary = [], []
    for version in registry.versions():
        manifest = registry.read(version).manifest
        of_version = [alias for alias, target in aliases.items() if target == version]
        metrics = manifest.metrics
        rows.append(
            {
                "version": version,
                "alias": " ".join(of_version),
                "backbone": manifest.backbone.name,
                "components": manifest.projection.n_out,
                "classes": len(manifest.classes),
                "rows": manifest.training_data.rows,
                "accuracy": metrics.get("accuracy"),
                "log_loss": metrics.get("log_loss"),
            }
        )
        summary.append({"version": version, "aliases": of_version, "metrics": metrics})
    list_rows(rows, COLUMNS, format_, output)
    if not rows:
        err.print(f"no models in {registry.place} yet; create one with 'imagestream train'")
    write_json(json_file, {"versions": summary})


@models_app.command()
def show(context: typer.Context, version: VersionArgument) -> None:
    """Print a version's manifest, and on standard error the engine that runs it here and whether it fails.

    Example: imagestream models show 1
    """
    from streaming.pipeline.status import last_refusal
    from streaming.platform.engines import Engines

    settings = settings_of(context)
    bundle = _registry(context).read(version)
    out.print_json(bundle.manifest.model_dump_json())
    chosen = Engines(settings).known(bundle.manifest)
    err.print(f"engine here: {chosen or f'not measured yet: `imagestream models verify {version}`'}")
    with suppress(ServiceError):  # the manifest does not depend on the tables
        if why := last_refusal(settings, version):
            err.print(f"not used in the last micro-batch: {printable(why)}", style="yellow")


@models_app.command()
def promote(
    context: typer.Context,
    version: VersionArgument,
    alias: AliasOption = AliasName.CHAMPION,
    why: Annotated[str, typer.Option(help="Reason recorded in the alias's history.")] = "promoted by hand",
    json_file: JsonOption = None,
) -> None:
    """Promote a version to champion, or to the challenger scored alongside it; a running stream switches to it.

    Example: imagestream models promote 2 --why "more labels"
    """
    from streaming.platform.machine import user_name

    registry = _registry(context)
    _check(registry, version)
    move = registry.promote(version, alias=alias.value, by=user_name(), why=why)
    out.print(f"{alias.value}: version {move.version} (before: {move.previous or 'none'})")
    write_json(json_file, move.model_dump(mode="json"))


@models_app.command()
def rollback(context: typer.Context, alias: AliasOption = AliasName.CHAMPION, json_file: JsonOption = None) -> None:
    """Move an alias back to its previous version.

    Example: imagestream models rollback
    """
    from streaming.platform.machine import user_name

    move = _registry(context).rollback(alias=alias.value, by=user_name())
    out.print(f"{alias.value}: version {move.version} (before: {move.previous})")
    write_json(json_file, move.model_dump(mode="json"))


@models_app.command()
def verify(context: typer.Context, version: VersionArgument, json_file: JsonOption = None) -> None:
    """Check a version's file hashes, dimensions and golden predictions, and every engine that can run it.

    Example: imagestream models verify 1
    """
    from streaming.platform.engines import Engines

    settings = settings_of(context)
    registry = _registry(context)
    sha256 = _check(registry, version)
    chosen = Engines(settings).choose(registry.read(version))
    out.print(f"version {version} is intact and reproduces its golden predictions; SHA-256 {sha256}")
    out.print(f"engine here: {chosen}")
    write_json(json_file, {"version": version, "bundle_sha256": sha256, "engine": chosen.engine})


@models_app.command()
def clear(
    context: typer.Context,
    why: Annotated[str, typer.Option(help="Reason recorded in the alias's history.")] = "cleared by hand",
    json_file: JsonOption = None,
) -> None:
    """Clear the challenger, so that only the champion is scored; a running stream follows.

    Example: imagestream models clear
    """
    from streaming.platform.machine import user_name

    move = _registry(context).clear(by=user_name(), why=why)
    out.print(f"{move.alias}: none (before: {move.previous})")
    write_json(json_file, move.model_dump(mode="json"))


@models_app.command()
def delete(context: typer.Context, version: VersionArgument, json_file: JsonOption = None) -> None:
    """Delete a version that no alias points at; its manifest stays and its number is never reused.

    This cannot be undone; use `models export` to keep a copy. Rows predicted by the version are not changed.

    Example: imagestream models delete 3
    """
    from streaming.platform.machine import user_name

    _registry(context).delete(version, by=user_name())
    out.print(f"version {version} is deleted")
    write_json(json_file, {"deleted": version})


@models_app.command()
def export(
    context: typer.Context,
    version: VersionArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, such as model.zip.")],
    json_file: JsonOption = None,
) -> None:
    """Export a version to a zip file of its bundle with all hashes, which `models import` reads.

    Example: imagestream models export 2 model-2.zip
    """
    bundle = _registry(context).export(version, file)
    size = file.stat().st_size
    out.print(f"{file}: version {version}, {size / 1e6:,.1f} MB; SHA-256 of its bundle {bundle.sha256}")
    write_json(json_file, {"version": version, "file": str(file), "bytes": size, "bundle_sha256": bundle.sha256})


def _registry(context: typer.Context) -> "Registry":
    from streaming.registry import open_registry

    return open_registry(settings_of(context).home)


def _check(registry: "Registry", version: int) -> str:
    from models.scorer import check_golden, load_scorer

    bundle = registry.read(version)
    check_golden(bundle, load_scorer(bundle))
    return bundle.sha256
