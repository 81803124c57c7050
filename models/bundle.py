"""A bundle: the files that are one model version, all or nothing.

`manifest.json` describes the model and holds the SHA-256 of every other file, so the manifest's own SHA-256 names the
whole bundle. Nothing in a bundle can execute code: JSON, flatbuffer, HDF5 weights and `.npz` without pickles.
Reading checks everything that can be checked without running the model; `models.scorer.check_golden` runs it.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.architectures import Output
from models.arrays import Arrays, read_npz, write_npz
from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE, ExportedBackbone, Precision, file_sha256
from models.decode import Resize
from models.errors import ModelError
from models.network import Network
from models.recipe import Recipe

MANIFEST = "manifest.json"
PROJECTION = "projection.npz"
CLASSIFIER = "classifier.npz"
GOLDEN = "golden.npz"
DRIFT = "drift.npz"
FITTED_ON = "fitted_on.npz"
HEAD_FILES = frozenset({PROJECTION, CLASSIFIER, GOLDEN})
FILES = HEAD_FILES | {FLATBUFFER_FILE, WEIGHTS_FILE}  # of a backbone by name; one that was imported has one file
# A bundle without them scores as well. Without `FITTED_ON`, as older ones are, its split says what it was fitted on.
OPTIONAL = frozenset({DRIFT, FITTED_ON})

MAX_MANIFEST_BYTES = 16 * 1024**2
MAX_FILE_BYTES = 2 * 1024**3
MAX_GROUP_BY_CHARS = 1_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(gt=0, le=1_000_000)]
EngineName = Literal["litert", "keras", "onnx"]  # Keras is the reference, and runs on a GPU where there is one


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneEntry(_Strict):
    """The CNN: raw pixels (N, height, width, 3) uint8 in, features (N, n_features) float32 out."""

    name: str
    weights: str
    engine: EngineName = "litert"
    input_size: tuple[Positive, Positive]
    resize: Resize = "stretch"
    scale: float  # a pixel value p enters the network as p · scale + offset; the flatbuffer does that itself
    offset: float
    channel_order: Literal["rgb", "bgr"] = "rgb"  # and then, in this order, the mean of each channel is taken off
    channel_means: tuple[float, float, float] = (0.0, 0.0, 0.0)
    output: Output = "pooled"
    precision: Precision = "float32"
    n_features: Positive
    parity: float = Field(ge=0, description="largest difference between LiteRT's and Keras' features when exported")
    cosine: float = Field(1.0, le=1.001, description="mean cosine between the same; for int8, on calibration images")
    network: Network | None = None  # imported: its recipe then says all that pixels go through, not the fields above

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        network = self.network
        if (network is not None and network.format == "onnx") != (self.engine == "onnx"):
            raise ValueError(f"the engine {self.engine} does not run this network")
        if network is not None and (self.engine == "keras" or network.recipe.input_size != self.input_size):
            raise ValueError("the imported network and its recipe do not fit the entry")
        return self

    @classmethod
    def of(cls, exported: ExportedBackbone, resize: Resize = "stretch", engine: EngineName = "litert") -> Self:
        """What a manifest says of an exported backbone.

        Raises:
            ModelError: Keras is asked to run 8-bit integers, which only the flatbuffer holds.
        """
        spec = exported.spec
        if engine == "keras" and exported.precision != "float32":
            raise ModelError(f"the engine keras computes in float32, {exported.precision} needs the engine litert")
        return cls(
            name=spec.name,
            weights=exported.weights,
            engine=engine,
            input_size=spec.input_size,
            resize=resize,
            output=spec.output,
            n_features=spec.n_features,
            precision=exported.precision,
            parity=exported.parity,
            cosine=exported.cosine,
            **asdict(spec.preprocessing),
        )

    @property
    def scored_file(self) -> str:
        """The one of the backbone's files that its engine runs."""
        if self.network is not None:
            return self.network.file
        return WEIGHTS_FILE if self.engine == "keras" else FLATBUFFER_FILE

    @property
    def files(self) -> frozenset[str]:
        """The names of its files in a bundle."""
        return frozenset({FLATBUFFER_FILE, WEIGHTS_FILE} if self.network is None else {self.network.file})

    @property
    def fitting(self) -> Resize | Recipe:
        """What becomes of an image before the engine takes it."""
        return self.resize if self.network is None else self.network.recipe


class StageEntry(_Strict):
    """A projection or classifier: its kind and widths."""

    kind: str
    n_in: Positive
    n_out: Positive


class TrainingData(_Strict):
    """What the model was fitted on; which images those were is in `FITTED_ON`.

    Attributes:
        holdout_share, group_by: with the seed, the split (streaming/images/split.py). No share: as `holdout` says.
        holdout: of older bundles: class → an image whose hash lies below is held out.
    """

    rows: int = Field(ge=0)
    holdout_rows: int = Field(ge=0)
    fingerprint: Sha256
    seed: int = 42
    holdout_share: float | None = Field(None, gt=0, lt=1)
    group_by: str | None = Field(None, max_length=MAX_GROUP_BY_CHARS)
    holdout: dict[str, int] = {}


class Manifest(_Strict):
    """What `manifest.json` holds."""

    schema_version: Literal[1] = 1
    backbone: BackboneEntry
    projection: StageEntry
    classifier: StageEntry
    classes: tuple[str, ...] = Field(min_length=2)
    # Of two classes, the second one is answered where its probability is at least this; without it, the more probable.
    threshold: float | None = Field(None, gt=0, lt=1)
    metrics: dict[str, float]
    training_data: TrainingData
    fit: dict[str, str | int | float] = {}  # the settings it was fitted with; see streaming/training/fit_options.py
    libraries: dict[str, str]
    golden_tolerance: float = Field(1e-3, gt=0, le=0.05)
    files: dict[str, Sha256] = {}

    def check_dimensions(self) -> None:
        """Every stage must take what the one before gives, and the classifier one output per class."""
        widths = [
            ("projection.n_in", self.projection.n_in, "backbone.n_features", self.backbone.n_features),
            ("classifier.n_in", self.classifier.n_in, "projection.n_out", self.projection.n_out),
            ("classifier.n_out", self.classifier.n_out, "the number of classes", len(self.classes)),
        ]
        for name, got, other, want in widths:
            if got != want:
                raise ModelError(f"{name} is {got}, but {other} is {want}")
        if self.threshold is not None and len(self.classes) != 2:  # noqa: PLR2004
            raise ModelError(f"a threshold is for two classes, there are {len(self.classes)}")
        if len(set(self.classes)) != len(self.classes):
            raise ModelError("class names repeat")
        files = HEAD_FILES | self.backbone.files
        if set(self.files) - OPTIONAL != files:
            raise ModelError(f"the manifest should list the files {sorted(files)}, it lists {sorted(self.files)}")

    @property
    def backbone_sha256(self) -> str:
        """Names the features: two models with the same value give the same features for the same image."""
        network = self.backbone.network
        if network is None:
            return self.files[FLATBUFFER_FILE]
        return network.identity(self.files[network.file], self.backbone.output)


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory: the manifest, the SHA-256 that names it, and the files that scoring needs."""

    manifest: Manifest
    sha256: str
    files: Mapping[str, bytes]

    def arrays(self, name: str) -> Arrays:
        """The arrays of one of the bundle's `.npz` files."""
        return read_npz(self.files[name], name)

    @property
    def backbone_sha256(self) -> str:
        """Names the features: two bundles with the same value give the same features for the same image."""
        return self.manifest.backbone_sha256

    @property
    def projection_sha256(self) -> str:
        return self.manifest.files[PROJECTION]


def write_bundle(
    directory: Path,
    manifest: Manifest,
    backbone_files: Mapping[str, Path],
    arrays: Mapping[str, Arrays],
) -> str:
    """Write a bundle into `directory`, which must not exist, and return its SHA-256.

    Args:
        directory: made by this call; a failure leaves it for the caller to remove.
        manifest: its `files` are filled in here.
        backbone_files: those of the manifest's backbone, copied.
        arrays: `PROJECTION`, `CLASSIFIER` and `GOLDEN`, and those of `OPTIONAL` that there are.
    """
    directory.mkdir(parents=True)
    for name, source in backbone_files.items():
        shutil.copyfile(source, directory / name)
    for name, content in arrays.items():
        (directory / name).write_bytes(write_npz(content))
    hashes = {path.name: file_sha256(path) for path in sorted(directory.iterdir())}
    manifest = manifest.model_copy(update={"files": hashes})
    manifest.check_dimensions()
    content = manifest.model_dump(mode="json", exclude_none=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


class BundleFiles(Protocol):
    """The files of one bundle, by name, wherever they are kept; `str` of it is the place that errors name."""

    def names(self) -> Collection[str]:
        """Every name that is there, the manifest's among them."""

    def size(self, name: str) -> int:
        """The size of a file in bytes.

        Raises:
            ModelError: there is no such file, or it is not a regular file.
        """

    def read(self, name: str) -> bytes:
        """The content of a file, which is only asked for once its size is known to be allowed."""


@dataclass(frozen=True)
class BundleFolder:
    """A bundle in a local directory; implements `BundleFiles`."""

    directory: Path

    def __str__(self) -> str:
        return str(self.directory)

    def names(self) -> Collection[str]:
        return {path.name for path in self.directory.iterdir()}

    def size(self, name: str) -> int:
        path = self.directory / name
        if path.is_symlink() or not path.is_file():
            raise ModelError(f"{name} is not a regular file")
        return path.stat().st_size

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


def read_bundle(source: BundleFiles | Path, copy_to: Path | None = None) -> Bundle:
    """Read and check a bundle: its file list, every hash, and every stage's dimensions.

    Args:
        source: its files, or the local directory that holds them.
        copy_to: a directory, made by this call, for a copy of every file; complete if no error is raised.

    Raises:
        ModelError: anything missing, extra, altered, a link, too large, or of the wrong shape; says which and why.
    """
    files = BundleFolder(source) if isinstance(source, Path) else source
    try:
        return _read_checked(files, copy_to)
    except ModelError as error:
        raise ModelError(f"bundle {files} is refused: {error}") from error
    except OSError as error:
        raise ModelError(f"bundle {files} cannot be read: {error}") from error


def _read_checked(files: BundleFiles, copy_to: Path | None) -> Bundle:
    text = _read_file(files, MANIFEST, MAX_MANIFEST_BYTES)
    manifest = parse_manifest(text)
    present = set(files.names()) - {MANIFEST}
    if present != set(manifest.files):
        raise ModelError(f"it should hold {sorted(manifest.files)} beside its manifest, it holds {sorted(present)}")
    if copy_to is not None:
        copy_to.mkdir()
        (copy_to / MANIFEST).write_bytes(text)
    kept = {}
    for name in sorted(present):
        content = _read_file(files, name, MAX_FILE_BYTES)
        digest = hashlib.sha256(content).hexdigest()
        if digest != manifest.files[name]:
            raise ModelError(f"{name} has SHA-256 {digest}, the manifest says {manifest.files[name]}")
        if copy_to is not None:
            (copy_to / name).write_bytes(content)
        if name not in manifest.backbone.files - {manifest.backbone.scored_file}:  # checked, but not kept
            kept[name] = content
    return Bundle(manifest, hashlib.sha256(text).hexdigest(), kept)


def read_manifest(files: BundleFiles) -> tuple[Manifest, str]:
    """The manifest of a bundle, with its dimensions checked, and its SHA-256; none of the other files is read.

    Raises:
        ModelError: see `parse_manifest`; or the file is missing, a link, or too large.
    """
    try:
        text = _read_file(files, MANIFEST, MAX_MANIFEST_BYTES)
        return parse_manifest(text), hashlib.sha256(text).hexdigest()
    except OSError as error:
        raise ModelError(f"bundle {files} cannot be read: {error}") from error


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in `text`, with its dimensions checked.

    Raises:
        ModelError: not JSON, a field missing, unknown or of the wrong type, or dimensions that do not fit together.
    """
    try:
        content: Any = json.loads(text)
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{MANIFEST}: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{MANIFEST} is not JSON: {error}") from error
    manifest.check_dimensions()
    return manifest


def _read_file(files: BundleFiles, name: str, max_bytes: int) -> bytes:
    size = files.size(name)
    if size > max_bytes:
        raise ModelError(f"{name} has {size:,} bytes, more than the {max_bytes:,} allowed")
    return files.read(name)
