"""Bring your own model: a file becomes a version of the registry, whole, with its own head as the classifier."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bloom_filter import BloomFilter, FittedOn
from models.bundle import BackboneEntry, TrainingData
from models.class_list import AUTO, numbered, parse_classes, read_classes
from models.classifier import OwnHead, Scores
from models.errors import ModelError
from models.import_file import Imported, import_network
from models.projection import NoProjection
from models.scorer import Head
from streaming.registry import CHAMPION, Registry
from streaming.training.candidate import BackboneParts, write_model
from streaming.training.fit import Fitted

IMPORTED = "imported"  # the weights, as a manifest calls them
SUMS_TO_ONE = 0.02  # how far the sum of quantised probabilities may be from it
SAMPLES = ("china.jpg", "flower.jpg")  # of scikit-learn's photographs


@dataclass(frozen=True)
class ImportResult:
    """A model that was imported.

    Attributes:
        guessed: what the file does not say and was not given, by name.
        is_new: False if the registry held the very same model before.
    """

    version: int
    sha256: str
    is_new: bool
    network: Imported
    classes: tuple[str, ...]
    scores: Scores
    champion: bool
    guessed: Mapping[str, str]


def import_model(
    registry: Registry,
    file: Path,
    *,
    classes: str = AUTO,
    scores: Scores | None = None,
    by: str,
    **options: Any,
) -> ImportResult:
    """Register the model in a file; it becomes the champion if there is none.

    Args:
        classes: a file with their names, or `auto` for those that the model's file holds, else numbers.
        scores: what it answers; found out from sample images if not given.
        options: of `models.import_file.import_network`.

    Raises:
        ModelError: the file is refused, or names and scores do not fit together.
    """
    names = None if classes == AUTO else read_classes(Path(classes))
    with TemporaryDirectory(prefix="imagestream-") as scratch:
        folder = Path(scratch)
        imported = import_network(file, folder, sample_images(), **options)
        guessed = dict(imported.guessed)
        n = imported.n_features
        names = names or _names(imported, guessed)
        if scores is None:
            scores = kind_of(imported.scores)
            guessed["scores"] = f"{scores} (by its answers to sample images; --scores sets it)"
        if len(names) != n and (n, len(names)) != (1, 2):
            raise ModelError(f"{file.name} gives {n:,} scores, and {len(names):,} classes are named")
        head = Head(names, NoProjection(n), OwnHead(scores, n, len(names)))
        version, sha256, is_new = _register(registry, head, imported, folder)
    first = registry.target(CHAMPION) is None
    if first:
        registry.promote(version, by=by, why="the first model")
    return ImportResult(version, sha256, is_new, imported, names, scores, first, guessed)


def sample_images() -> list[Path]:
    """Photographs that are installed, to try a model on."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / name for name in SAMPLES]


def kind_of(scores: NDArray[np.float32]) -> Scores:
    """What scores (N, C) look like: probabilities lie from 0 to 1, and those of all classes sum to 1."""
    within = bool((scores >= 0).all() and (scores <= 1 + SUMS_TO_ONE).all())
    sums = scores.sum(axis=1)
    return (
        "probabilities" if within and (scores.shape[1] == 1 or bool((abs(sums - 1) < SUMS_TO_ONE).all())) else "logits"
    )


def entry_of(imported: Imported, output: str = "flat") -> BackboneEntry:
    """What a manifest says of an imported network."""
    network = imported.network
    return BackboneEntry.model_validate(
        {
            "name": Path(network.source).stem,
            "weights": IMPORTED,
            "engine": "onnx" if network.format == "onnx" else "litert",
            "input_size": network.recipe.input_size,
            "scale": 1.0,
            "offset": 0.0,
            "output": output,
            "n_features": imported.n_features,
            "parity": 0.0,
            "network": network,
        }
    )


def _names(imported: Imported, guessed: dict[str, str]) -> tuple[str, ...]:
    if imported.classes is not None:
        return parse_classes(imported.classes, f"the metadata of {imported.network.source}")
    n = max(2, imported.n_features)
    guessed["classes"] = f"{n:,} numbers (the file names none; --classes FILE sets them)"
    return numbered(n)


def _register(registry: Registry, head: Head, imported: Imported, folder: Path) -> tuple[int, str, bool]:
    parts = BackboneParts(
        entry_of(imported), {imported.network.file: imported.file}, [path.read_bytes() for path in sample_images()]
    )
    # Nobody knows here what it was trained on; no image of this home was used.
    data = TrainingData(rows=0, holdout_rows=0, fingerprint=imported.network.source_sha256)
    seen = FittedOn(BloomFilter.empty(0, 0))
    written = folder / "bundle"
    sha256 = write_model(written, Fitted(head, 0, data.fingerprint), parts, data, seen=seen)
    version = registry.find(sha256)
    if version is not None:
        return version, sha256, False
    return registry.register(lambda directory: shutil.move(written, directory)), sha256, True
