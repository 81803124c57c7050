"""The registry's verbs for notebooks and scripts: `imagestream.model_versions()`, `promote`, `export_version`, …"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming.errors import UsageError
from streaming.extras import extras_named
from streaming.platform.machine import user_name
from streaming.registry import CHAMPION, Registry, open_registry
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
    registry = _registry(home)
    targets = registry.targets()
    return [_registered(registry, version, targets) for version in registry.versions()]


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

    registry = _registry(home)
    with extras_named():
        bundle = registry.read(version)
        check_golden(bundle, load_scorer(bundle))
    return registry.promote(version, alias=alias, by=user_name(), why=why)


def rollback(*, alias: Alias = CHAMPION, home: str | Path | None = None) -> Move:
    """Point an alias back at the version before this one.

    Raises:
        ModelError: there is none, or it is refused.
    """
    return _registry(home).rollback(alias=alias, by=user_name())


def clear_challenger(*, why: str = "cleared by hand", home: str | Path | None = None) -> Move:
    """Have no version scored beside the champion any more; a running stream follows.

    Raises:
        ModelError: there is no challenger.
    """
    return _registry(home).clear(by=user_name(), why=why)


def delete_version(version: int, *, home: str | Path | None = None) -> None:
    """Delete a version that no alias points at; its manifest stays, and its number is not given again.

    Raises:
        ModelError: there is no such version, or an alias points at it.
    """
    _registry(home).delete(version, by=user_name())


def export_version(version: int, file: str | os.PathLike[str], *, home: str | Path | None = None) -> Path:
    """Write a version into one file, a zip of its bundle with all hashes, which `import_model` takes again.

    Raises:
        ModelError: there is no such version, its bundle is refused, or it is larger than a zip holds (4 GiB).
    """
    path = Path(file)
    _registry(home).export(version, path)
    return path


def import_model(
    file: str | os.PathLike[str], *, alias: Alias | None = None, home: str | Path | None = None, **options: Any
) -> RegisteredModel:
    """Register a classifier that was made elsewhere, or a version that `export_version` wrote.

    The first model of a home becomes the champion. A model that is already registered keeps its version.

    Args:
        file: an ONNX, TensorFlow Lite, Keras or SavedModel file, as `FILE:TENSOR` if it has several outputs; what
            `export_version` wrote; or `efficientnet_lite0`, the installed ImageNet classifier.
        alias: to move to the version.
        options: of a classifier that was made elsewhere: `classes`, a file of their names; `scores`, "logits" or
            "probabilities"; and those of `models.import_file.import_network`, such as `preset="imagenet"` and
            `input_size=(224, 224)`.

    Raises:
        ModelError: the file is refused, or does not compute here what it computed when it was exported.
        UsageError: options were given with what `export_version` wrote, which needs none.
    """
    from models.bundle_zip import is_bundle_zip
    from models.import_file import split_tensor

    registry, user = _registry(home), user_name()
    with extras_named():
        if is_bundle_zip(Path(file)):
            if options:
                raise UsageError(f"{file} is a whole model version: expected no options, got {', '.join(options)}")
            from streaming.training.import_bundle import import_bundle

            version = import_bundle(registry, Path(file), by=user, alias=alias).version
        else:
            from streaming.training.import_model import import_model as register

            path, tensor = split_tensor(os.fspath(file))
            version = register(registry, path, by=user, tensor=tensor, **options).version
            if alias is not None:
                registry.promote(version, alias=alias, by=user, why="imported")
    return _registered(registry, version, registry.targets())


def _registry(home: str | Path | None) -> Registry:
    return open_registry(read_settings(home).home)


def _registered(registry: Registry, version: int, targets: Mapping[Alias, int | None]) -> RegisteredModel:
    manifest = registry.manifest(version)
    aliases = tuple(alias for alias, target in targets.items() if target == version)
    rows = manifest.training_data.rows
    return RegisteredModel(version, aliases, manifest.backbone.name, manifest.classes, rows, manifest.metrics)
