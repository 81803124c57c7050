"""The network that makes features: one of the backbones by name, or a tensor of a model that was made elsewhere."""

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
    """Which network makes the features.

    Attributes:
        name: of a backbone, or `FILE[:tensor]` for a model that was made elsewhere.
        weights: `imagenet`, `random`, or a file; of a backbone by name.
        preset: how images are prepared for a model that was made elsewhere; guessed without it.
        input_size: height and width of the images; None for the backbone's own.
        engine: what runs it when the model answers.
        int8: as 8-bit integers, calibrated on training images.
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
            raise UsageError("a backbone from a file runs as it is: leave out --weights, --runtime and --int8")
        if self.preset is not None and not self.is_file:
            raise UsageError(f"{self.name} prepares its images itself: --preset is for a backbone from a file")
        if self.int8 and self.engine == "keras":
            raise UsageError("8-bit integers are for the engine litert; keras computes in float32")

    @property
    def is_file(self) -> bool:
        return self.name not in BACKBONES and split_tensor(self.name)[0].exists()

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.input_size is None else (self.input_size, self.input_size)


@dataclass(frozen=True)
class MadeBackbone:
    """A backbone, ready to featurize and to become part of a bundle.

    Attributes:
        parts: without golden images.
        guessed: what a file left open, a line each.
    """

    source: FeatureSource
    parts: BackboneParts
    guessed: tuple[str, ...] = ()


def make_backbone(
    backbone: BackboneOptions, cache_dir: Path, scratch: Path, on_step: OnStep, pixels: Images | None = None
) -> MadeBackbone:
    """Export a backbone by name, or import one from its file.

    Args:
        cache_dir: where exports are kept.
        scratch: an existing folder for what is run of an imported file; needed as long as the result.
        pixels: to calibrate 8-bit integers with, of a backbone by name; without them it computes in float32.

    Raises:
        ModelError: an unknown backbone, or weights or a file that cannot be used.
    """
    if backbone.is_file:
        return _from_file(backbone, scratch, on_step)
    spec = find_backbone(backbone.name, backbone.output, backbone.size)
    on_step(f"preparing {spec.name}" + ("" if pixels is None else " in 8-bit integers"))
    exported = export_backbone(
        spec.name,
        backbone.weights,
        cache_dir,
        output=spec.output,
        input_size=spec.input_size,
        int8_calibration=pixels,
    )
    return MadeBackbone(FeatureSource.of(exported), BackboneParts.of(exported, (), backbone.engine))


def _from_file(backbone: BackboneOptions, scratch: Path, on_step: OnStep) -> MadeBackbone:
    """A tensor of a model that was made elsewhere; what is run of it lies in `scratch`."""
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
    return MadeBackbone(source, BackboneParts(entry, {network.file: imported.file}, ()), guessed)
