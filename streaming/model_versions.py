"""The operations of the registry for notebooks and scripts: `model_versions()`, `promote`, `export_version`, …"""

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
        backbone: the name of the network that computes the features.
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
        ServiceError: a setting is invalid, or the store does not respond.
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
        why: reason recorded in the alias's history.
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
    """Move an alias back to its previous version.

    Raises:
        ModelError: there is no previous version, or its bundle is rejected.
    """
    return _registry(home).rollback(alias=alias, by=user_name())


def clear_challenger(*, why: str = "cleared by hand", home: str | Path | None = None) -> Move:
    """Clear the challenger, so that only the champion is scored; a running stream follows.

    Raises:
        ModelError: there is no challenger.
    """
    return _registry(home).clear(by=user_name(), why=why)


def delete_version(version: int, *, home: str | Path | None = None) -> None:
    """Delete a version that no alias points at; its manifest stays, and its number is never reused.

    Raises:
        ModelError: there is no such version, or an alias points at it.
    """
    _registry(home).delete(version, by=user_name())


def export_version(version: int, file: str | os.PathLike[str], *, home: str | Path | None = None) -> Path:
    """Export a version to a zip file of its bundle with all hashes, which `import_model` reads.

    Raises:
        ModelError: there is no such version, its bundle is rejected, or it exceeds the limit of a zip file (4 GiB).
    """
    path = Path(file)
    _registry(home).export(version, path)
    return path


def import_model(
    file: str | os.PathLike[str], *, alias: Alias | None = None, home: str | Path | None = None, **options: Any
) -> RegisteredModel:
    """Register a classifier that was trained elsewhere, or a version exported by `export_version`.

    The first model of a home becomes the champion. A model that is already registered keeps its version.

    Args:
        file: an ONNX, TensorFlow Lite, Keras or SavedModel file, as `FILE:TENSOR` if it has several outputs; a file
            written by `export_version`; or `efficientnet_lite0`, the installed ImageNet classifier.
        alias: alias to assign to the version.
        options: for a classifier that was trained elsewhere: `classes`, a file with the class names; `scores`, "logits"
            or "probabilities"; and those of `models.import_file.import_network`, such as `preset="imagenet"` and
            `input_size=(224, 224)`.

    Raises:
        ModelError: the file is rejected, or does not reproduce its recorded results on this machine.
        UsageError: options were given for an exported version, which does not accept any.
    """
    from models.bundle_zip import is_bundle_zip
    from models.import_file import split_tensor

    registry, user = _registry(home), user_name()
    with extras_named():
        if is_bundle_zip(Path(file)):
            if options:
                raise UsageError(f"{file} is an exported model version: expected no options, got {', '.join(options)}")
            from streaming.training.import_bundle import import_bundle

            version = import_bundle(registry, Path(file), by=user, alias=alias).version
        else:
            from streaming.training.import_model import import_model as register

            path, tensor = split_tensor(os.fspath(file))
            version = register(registry, path, by=user, alias=alias, tensor=tensor, **options).version
    return _registered(registry, version, registry.targets())


def _registry(home: str | Path | None) -> Registry:
    return open_registry(read_settings(home).home)


def _registered(registry: Registry, version: int, targets: Mapping[Alias, int | None]) -> RegisteredModel:
    manifest = registry.manifest(version)
    aliases = tuple(alias for alias, target in targets.items() if target == version)
    rows = manifest.training_data.rows
    return RegisteredModel(version, aliases, manifest.backbone.name, manifest.classes, rows, manifest.metrics)
