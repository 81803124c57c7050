"""Import of a complete classifier from a model file; its own output layer is the classifier of the new version."""

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
from streaming.registry import Registry
from streaming.storage.registry_objects import Alias
from streaming.training.candidate import BackboneParts, write_model
from streaming.training.fit import Fitted
from streaming.training.import_bundle import promote_import

IMPORTED = "imported"  # value of `weights` in a manifest
SUMS_TO_ONE = 0.02  # tolerance of the sum of quantised probabilities
SAMPLES = ("china.jpg", "flower.jpg")  # of scikit-learn's photographs


@dataclass(frozen=True)
class ImportResult:
    """An imported model.

    Attributes:
        is_new: whether the model was not registered yet.
        classes: class names in the order of the scores.
        scores: type of the model's output.
        alias: the alias assigned to it.
        guessed: name → value of properties that were inferred.
    """

    version: int
    sha256: str
    is_new: bool
    network: Imported
    classes: tuple[str, ...]
    scores: Scores
    alias: Alias | None
    guessed: Mapping[str, str]


def import_model(
    registry: Registry,
    file: Path,
    *,
    classes: str = AUTO,
    scores: Scores | None = None,
    by: str,
    alias: Alias | None,
    **options: Any,
) -> ImportResult:
    """Register the model in a file; the first model of a home becomes the champion.

    Args:
        classes: a file with class names, or `auto` for those in the model file, else numbers.
        scores: type of the model's output; None to determine it from sample images.
        by: name recorded in the alias's history.
        alias: alias to assign; None for none unless it is the first model.
        options: further options of `models.import_file.import_network`.

    Raises:
        ModelError: the file is invalid, or the numbers of classes and scores differ.
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
            guessed["scores"] = f"{scores} (from its output for sample images; override with --scores)"
        if len(names) != n and (n, len(names)) != (1, 2):
            raise ModelError(f"{file.name} outputs {n:,} scores: expected as many class names, got {len(names):,}")
        head = Head(names, NoProjection(n), OwnHead(scores, n, len(names)))
        version, sha256, is_new = _register(registry, head, imported, folder)
    alias = promote_import(registry, version, alias, by=by)
    return ImportResult(version, sha256, is_new, imported, names, scores, alias, guessed)


def sample_images() -> list[Path]:
    """Return installed photographs to test a model with."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / name for name in SAMPLES]


def kind_of(scores: NDArray[np.float32]) -> Scores:
    """Return the type of scores (N, C): probabilities are between 0 and 1 and sum to 1 over the classes."""
    within = bool((scores >= 0).all() and (scores <= 1 + SUMS_TO_ONE).all())
    sums = scores.sum(axis=1)
    return (
        "probabilities" if within and (scores.shape[1] == 1 or bool((abs(sums - 1) < SUMS_TO_ONE).all())) else "logits"
    )


def entry_of(imported: Imported, output: str = "flat") -> BackboneEntry:
    """Return the manifest entry of an imported network."""
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
    guessed["classes"] = f"{n:,} numbers (the file contains no names; override with --classes FILE)"
    return numbered(n)


def _register(registry: Registry, head: Head, imported: Imported, folder: Path) -> tuple[int, str, bool]:
    parts = BackboneParts(
        entry_of(imported), {imported.network.file: imported.file}, [path.read_bytes() for path in sample_images()]
    )
    # Its training data are unknown; no image of this home was used.
    data = TrainingData(rows=0, holdout_rows=0, fingerprint=imported.network.source_sha256)
    seen = FittedOn(BloomFilter.empty(0, 0))
    written = folder / "bundle"
    sha256 = write_model(written, Fitted(head, 0, data.fingerprint), parts, data, seen=seen)
    version, is_new = registry.keep(written, sha256)
    return version, sha256, is_new
