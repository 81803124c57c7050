"""Bundles: the files of one model version.

`manifest.json` describes the model and contains the SHA-256 of every other file, so the manifest's own SHA-256
identifies the bundle. Nothing in a bundle can execute code: JSON, a flatbuffer, HDF5 weights and `.npz` without
pickles.

Reading a bundle checks everything that can be checked without running the model; `models.scorer.check_golden` runs it.
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
FILES = HEAD_FILES | {FLATBUFFER_FILE, WEIGHTS_FILE}  # with a backbone of the table; an imported one has one file
# Not needed for scoring. Older bundles lack `FITTED_ON`; their split defines the images that they were fitted on.
OPTIONAL = frozenset({DRIFT, FITTED_ON})

MAX_MANIFEST_BYTES = 16 * 1024**2
MAX_FILE_BYTES = 2 * 1024**3
MAX_GROUP_BY_CHARS = 1_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(gt=0, le=1_000_000)]
EngineName = Literal["litert", "keras", "onnx"]  # Keras is the reference, and uses a GPU if there is one


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneEntry(_Strict):
    """The backbone: (N, height, width, 3) uint8 pixels in, (N, n_features) float32 features out."""

    name: str
    weights: str
    engine: EngineName = "litert"
    input_size: tuple[Positive, Positive]
    resize: Resize = "stretch"
    scale: float  # a pixel value p enters the network as p · scale + offset; part of the flatbuffer
    offset: float
    channel_order: Literal["rgb", "bgr"] = "rgb"  # that of `channel_means`, which are subtracted after scaling
    channel_means: tuple[float, float, float] = (0.0, 0.0, 0.0)
    output: Output = "pooled"
    precision: Precision = "float32"
    n_features: Positive
    parity: float = Field(ge=0, description="largest difference between LiteRT's and Keras' features when exported")
    cosine: float = Field(1.0, le=1.001, description="their mean cosine similarity; for int8, on calibration images")
    network: Network | None = None  # an imported one, whose recipe replaces the fields of preprocessing above

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        network = self.network
        if (network is not None and network.format == "onnx") != (self.engine == "onnx"):
            raise ValueError(f"the engine {self.engine} does not run this network")
        if network is not None and (self.engine == "keras" or network.recipe.input_size != self.input_size):
            raise ValueError("the imported network and its recipe do not match the entry")
        return self

    @classmethod
    def of(cls, exported: ExportedBackbone, resize: Resize = "stretch", engine: EngineName = "litert") -> Self:
        """The entry of an exported backbone.

        Raises:
            ModelError: `engine` is Keras and the backbone is quantised, which only the flatbuffer is.
        """
        spec = exported.spec
        if engine == "keras" and exported.precision != "float32":
            raise ModelError(f"the engine keras computes in float32; {exported.precision} requires the engine litert")
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
        """The backbone file that the engine runs."""
        if self.network is not None:
            return self.network.file
        return WEIGHTS_FILE if self.engine == "keras" else FLATBUFFER_FILE

    @property
    def files(self) -> frozenset[str]:
        """The names of the backbone's files in a bundle."""
        return frozenset({FLATBUFFER_FILE, WEIGHTS_FILE} if self.network is None else {self.network.file})

    @property
    def fitting(self) -> Resize | Recipe:
        """How an image is prepared for the engine."""
        return self.resize if self.network is None else self.network.recipe


class StageEntry(_Strict):
    """A projection or classifier: its kind, and the widths of its input and output."""

    kind: str
    n_in: Positive
    n_out: Positive


class TrainingData(_Strict):
    """The data that the model was fitted on; `FITTED_ON` identifies the images.

    Attributes:
        rows: images that the model was fitted on.
        holdout_rows: images held out for evaluation.
        fingerprint: identifies the data set.
        seed, holdout_share, group_by: the split (streaming/images/split.py); without a share, see `holdout`.
        holdout: in older bundles, class → the hash below which images are held out.
    """

    rows: int = Field(ge=0)
    holdout_rows: int = Field(ge=0)
    fingerprint: Sha256
    seed: int = 42
    holdout_share: float | None = Field(None, gt=0, lt=1)
    group_by: str | None = Field(None, max_length=MAX_GROUP_BY_CHARS)
    holdout: dict[str, int] = {}


class Manifest(_Strict):
    """The content of `manifest.json`."""

    schema_version: Literal[1] = 1
    backbone: BackboneEntry
    projection: StageEntry
    classifier: StageEntry
    classes: tuple[str, ...] = Field(min_length=2)
    # With two classes, the second is predicted if its probability is at least this; None: the more probable one is.
    threshold: float | None = Field(None, gt=0, lt=1)
    metrics: dict[str, float]
    training_data: TrainingData
    fit: dict[str, str | int | float] = {}  # the settings it was fitted with; see streaming/training/fit_options.py
    libraries: dict[str, str]
    golden_tolerance: float = Field(1e-3, gt=0, le=0.05)
    files: dict[str, Sha256] = {}

    def check_dimensions(self) -> None:
        """Raise ModelError unless the widths of the stages match, with one classifier output per class."""
        widths = [
            ("projection.n_in", self.projection.n_in, "backbone.n_features", self.backbone.n_features),
            ("classifier.n_in", self.classifier.n_in, "projection.n_out", self.projection.n_out),
            ("classifier.n_out", self.classifier.n_out, "the number of classes", len(self.classes)),
        ]
        for name, got, other, want in widths:
            if got != want:
                raise ModelError(f"{name} is {got}, but {other} is {want}")
        if self.threshold is not None and len(self.classes) != 2:  # noqa: PLR2004
            raise ModelError(f"a threshold requires two classes, there are {len(self.classes)}")
        if len(set(self.classes)) != len(self.classes):
            raise ModelError("class names are not unique")
        files = HEAD_FILES | self.backbone.files
        if set(self.files) - OPTIONAL != files:
            raise ModelError(f"the manifest should list the files {sorted(files)}, it lists {sorted(self.files)}")

    @property
    def backbone_sha256(self) -> str:
        """Identifies the features: models with the same value compute the same features for the same image."""
        network = self.backbone.network
        if network is None:
            return self.files[FLATBUFFER_FILE]
        return network.identity(self.files[network.file], self.backbone.output)


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory: the manifest, the bundle's SHA-256, and the files needed for scoring."""

    manifest: Manifest
    sha256: str
    files: Mapping[str, bytes]

    def arrays(self, name: str) -> Arrays:
        """The arrays of one of the bundle's `.npz` files."""
        return read_npz(self.files[name], name)

    @property
    def backbone_sha256(self) -> str:
        """Identifies the features: bundles with the same value compute the same features for the same image."""
        return self.manifest.backbone_sha256

    @property
    def projection_sha256(self) -> str:
        return self.manifest.files[PROJECTION]


def write_bundle(
    directory: Path, manifest: Manifest, backbone_files: Mapping[str, Path], arrays: Mapping[str, Arrays]
) -> str:
    """Write a bundle into `directory`, which must not exist, and return its SHA-256.

    Args:
        directory: created by this call; after a failure the caller removes it.
        manifest: the manifest, without `files`.
        backbone_files: the files of the manifest's backbone, which are copied.
        arrays: `PROJECTION`, `CLASSIFIER`, `GOLDEN` and any of `OPTIONAL`.
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
    """The files of a bundle in a folder, zip or object store; `str` of it is the location for errors."""

    def names(self) -> Collection[str]:
        """All names, including the manifest's."""

    def size(self, name: str) -> int:
        """The size of a file in bytes; raises ModelError if the file is missing or not a regular file."""

    def read(self, name: str) -> bytes:
        """The content of a file; called only after its size was checked."""


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
    """Read a bundle and check its file list, hashes and dimensions.

    Args:
        source: its files, or the local directory that contains them.
        copy_to: a directory to create with a copy of every file; complete unless an error is raised.

    Raises:
        ModelError: a file is missing, unexpected, altered, a link, too large or of the wrong shape.
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
        raise ModelError(f"expected the files {sorted(manifest.files)} and the manifest, found {sorted(present)}")
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
    """Read the manifest of a bundle, check its dimensions, and return it with its SHA-256; reads no other file.

    Raises:
        ModelError: as `parse_manifest`; or the file is missing, a link or too large.
    """
    try:
        text = _read_file(files, MANIFEST, MAX_MANIFEST_BYTES)
        return parse_manifest(text), hashlib.sha256(text).hexdigest()
    except OSError as error:
        raise ModelError(f"bundle {files} cannot be read: {error}") from error


def parse_manifest(text: bytes) -> Manifest:
    """Parse a manifest and check its dimensions.

    Raises:
        ModelError: not JSON, a field that is missing, unknown or of the wrong type, or dimensions that do not match.
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
