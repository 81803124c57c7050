"""Predictions without a stream: `imagestream.load().predict("photo.jpg")`.

Images are decoded, featurized and classified by the same functions and the same engine as in the stream's workers, so
the results are identical to those in `predictions`. Neither Spark nor a JVM is started.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import pyarrow as pa

from models.arrays import Features
from models.bad_image import Limits
from models.bundle import Bundle
from models.scorer import Scorer, check_golden, load_scorer
from producer.walk import walk
from streaming.errors import ConfigurationError, NotFoundError, ServiceError
from streaming.extras import extras_named
from streaming.images.sources import list_source, read_source
from streaming.pipeline.score import features_of
from streaming.pipeline.score_columns import most_probable
from streaming.platform.engines import EngineChoice, Engines
from streaming.registry import CHAMPION, open_registry
from streaming.settings import Settings, read_settings
from streaming.storage.registry_objects import Alias
from streaming.storage.store import check_place, is_uri
from streaming.storage.tables import ANSWER, DAMAGED

if TYPE_CHECKING:
    from typing import TypeAlias

    import pandas as pd
    from PIL import Image

    ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image"

TOP = 5  # classes per prediction
CHUNK = 4  # images per task; their pixels are in memory together, their bytes one at a time
AHEAD = 2  # tasks per thread, so that no thread waits for a result to be consumed
URL_TIMEOUT_S = 30.0
WEB = ("http://", "https://")
UNREADABLE = "unreadable"  # in addition to the quarantine's reasons: the bytes cannot be read
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # Pillow's modes that PNG preserves
ORIENTATION = 0x0112  # Exif tag

ROW = pa.schema(
    [
        pa.field("source", pa.string()),
        *ANSWER[:3],
        DAMAGED,
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("model_version", pa.int32()),
    ]
)


class ClassProbability(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction for one image, or the reason why there is none.

    Attributes:
        source: the file or URI; None for bytes and Pillow images.
        image_id: SHA-256 of the encoded image, as in the table `predictions`; None if it could not be read.
        model_version: of the registry.
        label, confidence: the predicted class and its probability; None if there is a `reason`.
        top_k: the most probable classes, in descending order of probability.
        damaged: whether part of the image is missing or corrupt; `detail` describes it.
        stage, reason: as in the table `quarantine`, or `read` and `unreadable`; None if there is a prediction.
        detail: a description of the reason or the damage.
    """

    source: str | None
    image_id: str | None
    model_version: int
    label: str | None = None
    confidence: float | None = None
    top_k: tuple[ClassProbability, ...] = ()
    damaged: bool = False
    stage: str | None = None
    reason: str | None = None
    detail: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as a row of `ROW`."""
        return asdict(self) | {"top_k": [one._asdict() for one in self.top_k] if self.reason is None else None}


class PredictionList(list[Prediction]):
    """Predictions in the order of their images."""

    def to_arrow(self) -> pa.Table:
        """Convert to an Arrow table with one row per prediction."""
        return pa.Table.from_pylist([one.as_dict() for one in self], ROW)

    def to_pandas(self) -> "pd.DataFrame":
        """Convert to a DataFrame with one row per prediction; requires pandas."""
        with extras_named():
            frame: pd.DataFrame = self.to_arrow().to_pandas()
        return frame


@dataclass(frozen=True, slots=True)
class _Image:
    """An image that has not been read yet: its name, and a function that returns its bytes or raises an OSError."""

    name: str | None
    read: Callable[[Limits], bytes]


def load(model: str | int = CHAMPION, home: str | Path | None = None, *, threads: int | None = None) -> "Model":
    """Load a model from the registry, with the same checks as in the stream.

    Args:
        model: `champion`, `challenger`, or the number of a version.
        home: the folder or URI of the registry; by default that of the command line.
        threads: the number of threads; by default one per core that this process may use.

    Raises:
        ServiceError: the model does not exist, or a setting is invalid.
        ModelError: the model is rejected: it was altered, or does not reproduce its recorded results on this machine.
    """
    with extras_named():
        return load_model(read_settings(home), model, threads)


def load_model(settings: Settings, model: str | int = CHAMPION, threads: int | None = None) -> "Model":
    """As `load`, with settings."""
    registry = open_registry(settings.home)
    version = model if isinstance(model, int) else _version_of(model)
    if isinstance(version, str):
        target = registry.target(version)
        if target is None:
            raise NotFoundError(f"there is no {version} model in {registry.place}; train one with 'imagestream train'")
        version = target
    bundle = registry.read(version)
    return Model(bundle, version, Engines(settings).choose(bundle), settings.image_limits, threads)


def _version_of(text: str) -> Alias | int:
    for alias in get_args(Alias):
        if text == alias:
            return alias  # type: ignore[no-any-return]
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigurationError(f"expected a model's version number, {' or '.join(get_args(Alias))}, got {text!r}")


class Model:
    """A loaded model; thread-safe.

    It has one inference engine per thread, created on first use; an engine takes a tenth of a second to create, and
    about as much memory as the network's file.
    """

    def __init__(
        self, bundle: Bundle, version: int, engine: EngineChoice, limits: Limits, threads: int | None = None
    ) -> None:
        """Load it; errors as for `load`."""
        self.version = version
        self.bundle_sha256 = bundle.sha256
        self.classes = bundle.manifest.classes
        self.engine = engine.engine
        self._bundle = bundle
        self._providers = engine.providers
        self._limits = limits
        self._threads = threads or _usable_cores()
        self._loading = threading.Lock()  # while LiteRT loads, this process's standard error is closed
        self._idle: queue.SimpleQueue[Scorer] = queue.SimpleQueue()
        with self._scorer() as scorer:
            check_golden(bundle, scorer)

    def __repr__(self) -> str:
        return f"<Model version {self.version}: {len(self.classes)} classes, {self._bundle.manifest.backbone.name}>"

    def predict(self, images: "ImageSource | Iterable[ImageSource]", *, top: int = TOP) -> PredictionList:
        """Predict images, and return the predictions in order; see `predict_each`."""
        return PredictionList(self.predict_each(images, top=top))

    def predict_each(self, images: "ImageSource | Iterable[ImageSource]", *, top: int = TOP) -> Iterator[Prediction]:
        """Predict images one by one, in bounded memory.

        Args:
            images: a file; a folder, including all regular files below it (the entries of each folder are sorted by
                name); an `s3://`, `gs://` or `az://` URI of an object or folder; an `http://` or `https://` URL; the
                bytes of an encoded image; a Pillow image; or an iterable of these.
            top: the number of classes in `top_k`.

        Yields:
            One prediction per image, in order; if the image cannot be read or decoded, it has a reason.

        Raises:
            TypeError: `images` has another type.
            ServiceError: a URI has another scheme, or a bucket cannot be listed.
            ValueError: `top` is not positive.
        """
        if top < 1:
            raise ValueError(f"top: expected a positive number, got {top}")
        return self._predict_each(_images_of(images), top)

    def _predict_each(self, images: Iterator[_Image], top: int) -> Iterator[Prediction]:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="predict")
        begun: deque[Future[list[Prediction]]] = deque()
        try:
            while chunk := list(islice(images, CHUNK)):
                begun.append(pool.submit(self._score, chunk, top))
                while begun and (begun[0].done() or len(begun) >= AHEAD * self._threads):
                    yield from begun.popleft().result()
            while begun:
                yield from begun.popleft().result()
        finally:  # also if the caller stops iterating
            pool.shutdown(cancel_futures=True)

    def _score(self, images: Sequence[_Image], top: int) -> list[Prediction]:
        values = _Values(images, self._limits)
        with self._scorer() as scorer:
            decoded = scorer.decode(values)
            features, good, bad = features_of(scorer, decoded)
            answers = _answers(scorer, features, top) if good else []
        by_row = dict(zip(good, answers, strict=True))
        found = []
        for row, image in enumerate(images):
            known = (image.name, values.hashes.get(row), self.version)
            if row in values.unreadable:
                found.append(Prediction(*known, stage="read", reason=UNREADABLE, detail=values.unreadable[row]))
            elif row in bad:
                why = bad[row]
                found.append(Prediction(*known, stage=str(why.stage), reason=str(why.reason), detail=why.detail))
            else:
                damage = decoded.damage.get(row)
                found.append(Prediction(*known, *by_row[row], damaged=damage is not None, detail=damage))
        return found

    @contextmanager
    def _scorer(self) -> Iterator[Scorer]:
        """A scorer for exclusive use by this thread."""
        try:
            scorer = self._idle.get_nowait()
        except queue.Empty:
            with self._loading:
                scorer = load_scorer(self._bundle, limits=self._limits, engine=self.engine, providers=self._providers)
        try:
            yield scorer
        finally:
            self._idle.put(scorer)


def _answers(scorer: Scorer, features: Features, top: int) -> list[tuple[str, float, tuple[ClassProbability, ...]]]:
    """(label, confidence, most probable classes) of each row of features (N, D)."""
    head = scorer.head
    probabilities = head.probabilities(features)
    order, best = most_probable(probabilities, top)
    top_k = [
        tuple(ClassProbability(head.classes[place], value) for place, value in zip(places, values, strict=True))
        for places, values in zip(order.tolist(), best.tolist(), strict=True)
    ]
    labels = head.answers(probabilities).tolist()
    return [
        (head.classes[label], float(row[label]), most)
        for label, row, most in zip(labels, probabilities, top_k, strict=True)
    ]


@dataclass
class _Values(Sequence[bytes | None]):
    """The bytes of images, each read on access, since an image may be as large as 20 MiB."""

    images: Sequence[_Image]
    limits: Limits
    hashes: dict[int, str] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: Any) -> Any:
        try:
            data = self.images[row].read(self.limits)
        except (OSError, ServiceError) as error:
            self.unreadable[row] = " ".join((getattr(error, "strerror", None) or str(error)).split())
            return None
        self.hashes[row] = sha256(data).hexdigest()
        return data


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _images_of(given: Any) -> Iterator[_Image]:
    """The images of an argument, without reading them."""
    if isinstance(given, str | os.PathLike):
        return _at(os.fspath(given))
    if isinstance(given, bytes | bytearray | memoryview):
        content = bytes(given)
        return iter([_Image(None, lambda _: content)])
    if hasattr(given, "getexif") and hasattr(given, "mode"):  # a Pillow image, without an import of Pillow
        return iter([_Image(None, lambda _: _encoded(given))])
    if isinstance(given, Iterable):
        return (image for one in given for image in _one_of(one))
    raise TypeError(f"images: expected a path, URI, bytes, Pillow image or an iterable of these, got {type(given)}")


def _one_of(given: Any) -> Iterator[_Image]:
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | bytearray | memoryview):
        raise TypeError(f"images: expected paths, URIs, bytes or Pillow images in the iterable, got {type(given)}")
    return _images_of(given)


def _at(place: str) -> Iterator[_Image]:
    """The images at a path or URI."""
    if place.startswith(WEB):
        yield _Image(place, lambda limits: _downloaded(place, limits))
    elif is_uri(place):
        uri = check_place(place)
        keys = [one.key for one in list_source(uri)]
        yield from (_file(f"{uri}/{key}") for key in keys) if keys else [_file(uri)]
    elif os.path.isdir(place):  # noqa: PTH112  the name as it was given
        yield from _below(place)
    else:
        yield _file(place)


def _file(name: str) -> _Image:
    return _Image(name, lambda limits: read_source(name, limits))


def _below(folder: str) -> Iterator[_Image]:
    """The regular files below a folder as `walk` sorts them, and the folders and links that it cannot follow."""
    failed: list[tuple[str, str]] = []
    for path in walk(folder, entered=set(), on_error=lambda name, reason: failed.append((name, reason))):
        while failed:
            yield _failed(*failed.pop(0))
        yield _file(path)
    yield from (_failed(*failure) for failure in failed)


def _failed(name: str, reason: str) -> _Image:
    def read(_: Limits) -> bytes:
        raise OSError(reason)

    return _Image(name, read)


def _downloaded(url: str, limits: Limits) -> bytes:
    """The body of a URL, truncated one byte beyond the maximum size of an image."""
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=URL_TIMEOUT_S) as answer:  # noqa: S310  http or https, see `WEB`
            content: bytes = answer.read(limits.max_bytes + 1)
            return content
    except (HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _encoded(image: "Image.Image") -> bytes:
    """Encode a Pillow image as PNG, with the same pixels and the orientation from its Exif data."""
    from PIL import Image

    file = BytesIO()
    exif = Image.Exif()
    if ORIENTATION in (given := image.getexif()):
        exif[ORIENTATION] = given[ORIENTATION]
    kept = image if image.mode in PNG_MODES else image.convert("RGB")
    kept.save(file, "PNG", compress_level=1, exif=exif)
    return file.getvalue()
