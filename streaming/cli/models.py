"""`imagestream models`: the registry."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import JsonOption, app, err, out, settings_of, write_json

if TYPE_CHECKING:
    from streaming.registry import Registry

models_app = typer.Typer(
    name="models", help="Show, promote, roll back and verify model versions.", no_args_is_help=True
)
app.add_typer(models_app)


class AliasName(StrEnum):
    """What a version can be promoted to."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"


AliasOption = Annotated[AliasName, typer.Option(help="Which alias to move.")]
VersionArgument = Annotated[int, typer.Argument(min=1, help="A version, as 'models list' shows them.")]


@models_app.command("list")
def list_(context: typer.Context, json_file: JsonOption = None) -> None:
    """List the versions with their metrics and aliases.

    Example: imagestream models list
    """
    from rich.table import Table

    from streaming.registry import open_registry

    registry = open_registry(settings_of(context).home)
    aliases = registry.targets()
    table = Table("version", "alias", "backbone", "components", "classes", "rows", "accuracy", "log loss", box=None)
    rows = []
    for version in registry.versions():
        manifest = registry.read(version).manifest
        of_version = [alias for alias, target in aliases.items() if target == version]
        metrics = manifest.metrics
        table.add_row(
            str(version),
            " ".join(of_version),
            manifest.backbone.name,
            str(manifest.projection.n_out),
            str(len(manifest.classes)),
            f"{manifest.training_data.rows:,}",
            *(f"{metrics[name]:.4f}" if name in metrics else "–" for name in ("accuracy", "log_loss")),
        )
        rows.append({"version": version, "aliases": of_version, "metrics": metrics})
    out.print(table if rows else f"no models in {registry.place} yet; make one with 'imagestream train'")
    write_json(json_file, {"versions": rows})


@models_app.command()
def show(context: typer.Context, version: VersionArgument) -> None:
    """Print the manifest of a version, and on standard error which engine runs it on this machine, and why.

    Example: imagestream models show 1
    """
    from streaming.platform.engines import Engines
    from streaming.registry import open_registry

    settings = settings_of(context)
    bundle = open_registry(settings.home).read(version)
    out.print_json(bundle.manifest.model_dump_json())
    chosen = Engines(settings).known(bundle.manifest)
    err.print(f"engine here: {chosen or f'not measured yet: `imagestream models verify {version}`'}", highlight=False)


@models_app.command()
def promote(
    context: typer.Context,
    version: VersionArgument,
    alias: AliasOption = AliasName.CHAMPION,
    why: Annotated[str, typer.Option(help="Kept in the alias's history.")] = "promoted by hand",
    json_file: JsonOption = None,
) -> None:
    """Make a version the champion, or the challenger that is scored beside it; a running stream follows.

    Example: imagestream models promote 2 --why "more labels"
    """
    from streaming.platform.machine import user_name
    from streaming.registry import open_registry

    registry = open_registry(settings_of(context).home)
    _check(registry, version)
    move = registry.promote(version, alias=alias.value, by=user_name(), why=why)
    out.print(f"{alias.value}: version {move.version} (before: {move.previous or 'none'})", highlight=False)
    write_json(json_file, move.model_dump(mode="json"))


@models_app.command()
def rollback(context: typer.Context, alias: AliasOption = AliasName.CHAMPION, json_file: JsonOption = None) -> None:
    """Go back to the version before this one.

    Example: imagestream models rollback
    """
    from streaming.platform.machine import user_name
    from streaming.registry import open_registry

    move = open_registry(settings_of(context).home).rollback(alias=alias.value, by=user_name())
    out.print(f"{alias.value}: version {move.version} (before: {move.previous})", highlight=False)
    write_json(json_file, move.model_dump(mode="json"))


@models_app.command()
def verify(context: typer.Context, version: VersionArgument, json_file: JsonOption = None) -> None:
    """Check a version: every file's hash, all dimensions, its golden predictions, and each engine that can run it.

    Example: imagestream models verify 1
    """
    from streaming.platform.engines import Engines
    from streaming.registry import open_registry

    settings = settings_of(context)
    registry = open_registry(settings.home)
    sha256 = _check(registry, version)
    chosen = Engines(settings).choose(registry.read(version))
    out.print(f"version {version} is whole and computes what it should; SHA-256 {sha256}", highlight=False)
    out.print(f"engine here: {chosen}", highlight=False)
    write_json(json_file, {"version": version, "bundle_sha256": sha256, "engine": chosen.engine})


def _check(registry: "Registry", version: int) -> str:
    from models.scorer import check_golden, load_scorer

    bundle = registry.read(version)
    check_golden(bundle, load_scorer(bundle))
    return bundle.sha256
