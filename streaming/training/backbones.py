"""The network that computes features: a named backbone, or a tensor of a model file."""

from dataclasses import dataclass
from pathlib import Path

from models.architectures import BACKBONES, DEFAULT_BACKBONE, Output
from models.backbone import export_backbone, file_sha256, find_backbone
from models.bundle import EngineName
from models.import_file import import_network, split_tensor
from models.scorer import Images
from streaming.errors import UsageError
from streaming.images.featurize import FeatureSource
from streaming.training.candidate import BackboneParts
from streaming.training.import_model import entry_of, sample_images
from streaming.training.job import OnStep


@dataclass(frozen=True)
class BackboneOptions:
    """The options of a backbone.

    Attributes:
        name: name of a backbone, or `FILE[:TENSOR]` of a model file.
        weights: weights of a named backbone: `imagenet`, `random`, or a file.
        output: `pooled` for channel means or `flat` for all values of the last feature map.
        input_size: side of the input in pixels; None for the backbone's own.
        engine: engine that runs the backbone in the stream.
        int8: quantise to 8-bit integers, calibrated on training images.
        preset: preprocessing for a model file; None to infer it.
    """

    name: str = DEFAULT_BACKBONE
    weights: str = "imagenet"
    output: Output = "pooled"
    input_size: int | None = None
    engine: EngineName = "litert"
    int8: bool = False
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.is_file and (self.int8 or self.engine == "keras" or self.weights != "imagenet"):
            raise UsageError("--weights, --runtime and --int8 do not apply to a backbone from a file: omit them")
        if self.preset is not None and not self.is_file:
            raise UsageError(f"--preset applies to a backbone from a file only, got {self.name}")
        if self.int8 and self.engine == "keras":
            raise UsageError("--int8 requires --runtime litert, got keras, which computes in float32")

    @property
    def is_file(self) -> bool:
        return self.name not in BACKBONES and split_tensor(self.name)[0].exists()

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.input_size is None else (self.input_size, self.input_size)


@dataclass(frozen=True)
class PreparedBackbone:
    """A backbone ready for featurization and for a bundle.

    Attributes:
        source: the backbone on disk.
        parts: its parts of a bundle, without golden images.
        guessed: inferred properties of a model file, one line each.
    """

    source: FeatureSource
    parts: BackboneParts
    guessed: tuple[str, ...] = ()


def make_backbone(
    backbone: BackboneOptions, cache_dir: Path, scratch: Path, on_step: OnStep, pixels: Images | None = None
) -> PreparedBackbone:
    """Export a named backbone, or import one from a model file.

    Args:
        scratch: existing folder for an imported network; must live as long as the result.
        pixels: images (N, height, width, 3) to calibrate 8-bit integers with; None for float32.

    Raises:
        ModelError: the backbone is unknown, or its weights or file cannot be used.
    """
    if backbone.is_file:
        return _from_file(backbone, scratch, on_step)
    spec = find_backbone(backbone.name, backbone.output, backbone.size)
    on_step(f"preparing {spec.name}" + ("" if pixels is None else " in 8-bit integers"))
    exported = export_backbone(
        spec.name, backbone.weights, cache_dir, output=spec.output, input_size=spec.input_size, int8_calibration=pixels
    )
    return PreparedBackbone(FeatureSource.of(exported), BackboneParts.of(exported, (), backbone.engine))


def _from_file(backbone: BackboneOptions, scratch: Path, on_step: OnStep) -> PreparedBackbone:
    """Import a tensor of a model file into `scratch`."""
    path, tensor = split_tensor(backbone.name)
    on_step(f"loading {path.name}")
    imported = import_network(
        path,
        scratch,
        sample_images(),
        tensor=tensor,
        preset=backbone.preset,
        input_size=backbone.size,
        pooled=backbone.output == "pooled",
    )
    entry, network = entry_of(imported, backbone.output), imported.network
    source = FeatureSource(entry, imported.file, network.identity(file_sha256(imported.file), backbone.output))
    guessed = tuple(f"guessed {name}: {value}" for name, value in imported.guessed.items())
    return PreparedBackbone(source, BackboneParts(entry, {network.file: imported.file}, ()), guessed)
