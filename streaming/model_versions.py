"""The registry's verbs for notebooks and scripts: `imagestream.model_versions()`, `promote`, `rollback`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streaming.extras import extras_named
from streaming.registry import CHAMPION, open_registry
from streaming.settings import read_settings
from streaming.storage.registry_objects import Alias, Move


@dataclass(frozen=True)
class RegisteredModel:
    """A version in the registry.

    Attributes:
        aliases: `champion`, `challenger`, both or none.
        backbone: the name of the network that gives the features.
        training_rows: images that it was fitted on.
        metrics: on held-out images, by name.
    """

    version: int
    aliases: tuple[Alias, ...]
    backbone: str
    classes: tuple[str, ...]
    training_rows: int
    metrics: Mapping[str, float]


def model_versions(home: str | Path | None = None) -> list[RegisteredModel]:
    """The versions in the registry of a home, oldest first.

    Args:
        home: a folder or URI; default: the command line's.

    Raises:
        ServiceError: a setting is wrong, or the store does not answer.
        ModelError: an object of the registry is damaged.
    """
    registry = open_registry(read_settings(home).home)
    targets = registry.targets()
    found = []
    for version in registry.versions():
        manifest = registry.manifest(version)
        aliases = tuple(alias for alias, target in targets.items() if target == version)
        rows = manifest.training_data.rows
        found.append(
            RegisteredModel(version, aliases, manifest.backbone.name, manifest.classes, rows, manifest.metrics)
        )
    return found


def promote(
    version: int, *, alias: Alias = CHAMPION, why: str = "promoted by hand", home: str | Path | None = None
) -> Move:
    """Make a version the champion, or the challenger that is scored alongside it; a running stream follows.

    Args:
        why: kept in the alias's history.
        home: a folder or URI; default: the command line's.

    Raises:
        ModelError: the version does not exist, or does not reproduce its recorded results on this machine.
    """
    from models.scorer import check_golden, load_scorer
    from streaming.platform.machine import user_name

    registry = open_registry(read_settings(home).home)
    with extras_named():
        bundle = registry.read(version)
        check_golden(bundle, load_scorer(bundle))
    return registry.promote(version, alias=alias, by=user_name(), why=why)


def rollback(*, alias: Alias = CHAMPION, home: str | Path | None = None) -> Move:
    """Point an alias back at the version before this one.

    Raises:
        ModelError: there is none, or it is refused.
    """
    from streaming.platform.machine import user_name

    return open_registry(read_settings(home).home).rollback(alias=alias, by=user_name())
