"""Scoring images with a model: composes decoding, backbone, projection and classifier."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.architectures import Preprocessing, find_backbone
from models.arrays import Arrays, Features
from models.bundle import CLASSIFIER, DRIFT, GOLDEN, PROJECTION, BackboneEntry, Bundle, EngineName
from models.classifier import Classifier, answers_of, classifier_from_arrays
from models.decode import DEFAULT_LIMITS, BadImage, Limits, Resize
from models.drift import DriftReference, reference_from_arrays
from models.engine import KerasEngine, LiteRTEngine
from models.errors import ModelError
from models.network import NetworkEngine
from models.onnx_session import OnnxSession
from models.projection import Projection, projection_from_arrays
from models.recipe import Pixels, Recipe, decode_fitted, empty_pixels
from models.sessions import open_session
from models.tflite_to_onnx import to_onnx
from models.translated_engine import TranslatedEngine

Images = NDArray[np.uint8]


class Engine(Protocol):
    """Runs a backbone: images (N, H, W, 3) uint8, or in the form of its recipe → features (N, D) float32."""

    @property
    def input_size(self) -> tuple[int, int]: ...

    @property
    def n_features(self) -> int: ...

    def __call__(self, images: Any) -> Features: ...


@dataclass(frozen=True)
class Decoded:
    """The result of decoding a list of images.

    Attributes:
        images: (N, H, W, 3) uint8, or in the form of a recipe: the decoded images, in order.
        rows: the N positions in the list of the decoded images.
        bad: position → the reason why the image could not be decoded.
        damage: position → the damage of an image that was decoded despite it.
    """

    images: Pixels
    rows: list[int]
    bad: dict[int, BadImage]
    damage: dict[int, str] = field(default_factory=dict)


def decode_all(
    values: Sequence[bytes | None],
    size: tuple[int, int],
    fitting: Resize | Recipe = "stretch",
    limits: Limits = DEFAULT_LIMITS,
) -> Decoded:
    """Decode a list of images.

    Args:
        values: encoded images; None for a message without value.
        size: (height, width).
        fitting: how images are resized to `size`, or the recipe.
    """
    images = empty_pixels(len(values), size, fitting)
    rows: list[int] = []
    bad: dict[int, BadImage] = {}
    damage: dict[int, str] = {}
    for row, value in enumerate(values):
        image = decode_fitted(value, size, fitting, limits)
        if isinstance(image, BadImage):
            bad[row] = image
            continue
        images[len(rows)] = image.pixels
        rows.append(row)
        if image.damage:
            damage[row] = image.damage
    return Decoded(images[: len(rows)], rows, bad, damage)


@dataclass(frozen=True)
class Head:
    """Projection and classifier: features (N, D) float32 → probabilities (N, C) float32 of `classes`.

    Attributes:
        classes: (C) names.
        threshold: with two classes, the second is predicted if its probability is at least this; None: the more
            probable one is.
    """

    classes: tuple[str, ...]
    projection: Projection
    classifier: Classifier
    threshold: float | None = None

    def logits(self, features: Features) -> NDArray[np.float64]:
        """(N, D) float32 → (N, C) float64 logits."""
        return self.classifier.logits(self.projection.transform(features))

    def probabilities(self, features: Features) -> Features:
        return self.classifier.probabilities(self.projection.transform(features))

    def answers(self, probabilities: Features) -> NDArray[np.int64]:
        """(N, C) float32 probabilities → (N) positions in `classes`."""
        return answers_of(probabilities, self.threshold)


@dataclass(frozen=True)
class Scorer:
    """A complete model, from encoded images to probabilities, step by step."""

    engine: Engine
    head: Head
    fitting: Resize | Recipe = "stretch"
    limits: Limits = DEFAULT_LIMITS

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """Encoded images → the backbone's input, and the images that could not be decoded."""
        return decode_all(values, self.engine.input_size, self.fitting, self.limits)

    def features(self, images: Pixels) -> Features:
        """(N, H, W, 3) from `decode` → (N, D) float32."""
        return self.engine(images)

    def probabilities(self, features: Features) -> Features:
        """(N, D) float32 → (N, C) float32."""
        return self.head.probabilities(features)


def load_head(bundle: Bundle) -> Head:
    """Load the projection and classifier of a bundle; raises ModelError if their arrays do not match the manifest."""
    manifest = bundle.manifest
    stage = manifest.projection
    projection = projection_from_arrays(stage.kind, stage.n_in, bundle.arrays(PROJECTION))
    if projection.n_out != stage.n_out:
        raise ModelError(f"the projection gives {projection.n_out} values, the manifest says {stage.n_out}")
    stage = manifest.classifier
    classifier = classifier_from_arrays(stage.kind, stage.n_in, stage.n_out, bundle.arrays(CLASSIFIER))
    return Head(manifest.classes, projection, classifier, manifest.threshold)


def load_scorer(
    bundle: Bundle,
    threads: int = 1,
    limits: Limits = DEFAULT_LIMITS,
    engine: EngineName | None = None,
    providers: Sequence[str] = ("cpu",),
) -> Scorer:
    """Load the model of a bundle; takes tenths of a second, so a worker does it once.

    Args:
        threads, engine, providers: see `load_engine`.

    Raises:
        ModelError: a part cannot be loaded, or does not match the manifest.
    """
    entry = bundle.manifest.backbone
    loaded = load_engine(entry, bundle.files[entry.scored_file], threads, engine, providers)
    return Scorer(loaded, load_head(bundle), entry.fitting, limits)


def load_engine(
    entry: BackboneEntry,
    content: bytes,
    threads: int = 1,
    engine: EngineName | None = None,
    providers: Sequence[str] = ("cpu",),
) -> Engine:
    """Load the engine of a backbone.

    Args:
        entry: the backbone in the manifest.
        threads: the number of threads of LiteRT and ONNX Runtime.
        engine: the engine; default: the manifest's.
        providers: execution providers of ONNX Runtime by priority.

    Raises:
        ModelError: the content cannot be used, or does not match the manifest.
    """
    if engine == "onnx" and entry.engine == "litert":
        loaded = _translated(entry, content, threads, providers)
    elif engine not in {None, entry.engine}:
        raise ModelError(f"the engine {engine} does not run {entry.name}, which was made for {entry.engine}")
    else:
        loaded = _own_engine(entry, content, threads, providers)
    if (loaded.input_size, loaded.n_features) != (entry.input_size, entry.n_features):
        what = "flatbuffer" if entry.engine == "litert" else "network"
        raise ModelError(
            f"the {what} takes {loaded.input_size} and gives {loaded.n_features} features, "
            f"the manifest says {entry.input_size} and {entry.n_features}"
        )
    return loaded


def _own_engine(entry: BackboneEntry, content: bytes, threads: int, providers: Sequence[str]) -> Engine:
    """The engine that the manifest names."""
    if entry.network is not None:
        session = open_session(entry.network.format, content, threads, providers)
        return NetworkEngine(entry.network, entry.output, session)
    if entry.engine == "keras":
        spec = find_backbone(entry.name, entry.output, entry.input_size)
        pixels = Preprocessing(entry.scale, entry.offset, entry.channel_order, entry.channel_means)
        if pixels != spec.preprocessing or entry.precision != "float32":
            raise ModelError(f"the manifest prepares pixels for {entry.name} in another way, or is quantised")
        return KerasEngine.of(spec, content)
    return LiteRTEngine(content, threads=threads)


def _translated(entry: BackboneEntry, content: bytes, threads: int, providers: Sequence[str]) -> Engine:
    """ONNX Runtime with the translation of a flatbuffer."""
    if entry.network is None:
        return TranslatedEngine(content, entry.input_size, entry.n_features, threads, providers)
    return NetworkEngine(entry.network, entry.output, OnnxSession(to_onnx(content), threads, providers))


def load_reference(bundle: Bundle) -> DriftReference | None:
    """Load the drift reference of a bundle; None if it has none.

    Raises:
        ModelError: the reference is invalid.
    """
    if DRIFT not in bundle.files:
        return None
    return reference_from_arrays(bundle.manifest.projection.n_out, bundle.arrays(DRIFT))


def golden_arrays(scorer: Scorer, images: Sequence[bytes]) -> Arrays:
    """The golden predictions of a bundle: a few encoded images with the probabilities computed by `scorer`.

    Raises:
        ModelError: there are no images, or one cannot be decoded.
    """
    decoded = scorer.decode(images)
    if decoded.bad or not decoded.rows:
        raise ModelError("golden predictions need at least one image, and every image must be decodable")
    probabilities = scorer.probabilities(scorer.features(decoded.images))
    return {
        "lengths": np.array([len(image) for image in images], np.int64),
        "data": np.frombuffer(b"".join(images), np.uint8),
        "probabilities": probabilities,
    }


def check_golden(bundle: Bundle, scorer: Scorer) -> None:
    """Score a bundle's golden images and compare the probabilities.

    Raises:
        ModelError: the arrays are invalid, an image cannot be decoded, or a probability differs by more than the
            manifest's tolerance.
    """
    manifest = bundle.manifest
    arrays = bundle.arrays(GOLDEN)
    if set(arrays) != {"lengths", "data", "probabilities"}:
        raise ModelError(f"{GOLDEN} should hold lengths, data and probabilities, it holds {sorted(arrays)}")
    lengths, data, expected = arrays["lengths"], arrays["data"], arrays["probabilities"]
    n = len(lengths) if lengths.ndim == 1 and lengths.dtype == np.int64 else 0
    fits = n > 0 and data.dtype == np.uint8 and data.ndim == 1 and (lengths > 0).all() and lengths.sum() == len(data)
    answers = expected.dtype == np.float32 and expected.shape == (n, len(manifest.classes))
    if not fits or not answers or not np.isfinite(expected).all():
        raise ModelError(f"{GOLDEN} is inconsistent: lengths, data and probabilities do not match")
    decoded = scorer.decode(golden_images(arrays))
    if decoded.bad:
        raise ModelError("a golden image cannot be decoded")
    try:
        got = scorer.probabilities(scorer.features(decoded.images))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the model fails on its own golden images: {error}") from error
    worst = float(np.abs(got - expected).max())
    if not worst <= manifest.golden_tolerance:  # also catches NaN
        raise ModelError(
            f"golden predictions differ by {worst:.2g}, more than the {manifest.golden_tolerance:g} allowed: "
            "the model does not reproduce its recorded results on this machine"
        )


def golden_images(arrays: Arrays) -> list[bytes]:
    """The encoded images among the arrays of golden predictions."""
    ends = np.cumsum(arrays["lengths"])
    return [arrays["data"][end - n : end].tobytes() for end, n in zip(ends, arrays["lengths"], strict=True)]
