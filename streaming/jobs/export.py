"""`imagestream features`: images in, a file of projected features out, for whoever wants to work with them elsewhere.

What the backbone gives is kept in the home, apart from the tables of the service: a run that was stopped goes on where
it was, and another projection of the same images needs no CNN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.architectures import Output, find_backbone
from models.backbone import export_backbone
from models.projection import Projection, check_pca_memory
from models.scorer import load_head
from streaming.errors import DataError
from streaming.images.dataset import Dataset
from streaming.images.featurize import FeatureSource, Featurized, featurize
from streaming.images.images_frame import featurized_rows, images_frame
from streaming.jobs.feature_files import write_feature_files
from streaming.jobs.output import FileFormat, check_output
from streaming.platform.session import QUICK_START, spark_session
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.home import make_dir
from streaming.storage.tables import Table
from streaming.training.fit import fit_projection, variance_kept
from streaming.training.fit_options import FitOptions

KEPT_IN = "featurized"  # in the home


@dataclass(frozen=True)
class Featurizer:
    """A backbone, and the projection that comes with it if it is a registered model's."""

    backbone: FeatureSource
    projection: Projection | None = None


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        rows: images in the output.
        projection: its kind.
        n_components: columns of features.
    """

    rows: int
    projection: str
    n_components: int
    variance_kept: float | None
    featurized: Featurized


def backbone_source(settings: Settings, backbone: str, weights: str, output: Output, options: FitOptions) -> Featurizer:
    """A backbone by name, exported if it was not yet.

    Raises:
        ModelError: an unknown backbone, weights that cannot be had, or features too wide for an exact PCA.
    """
    if options.projection == "pca":
        check_pca_memory(find_backbone(backbone, output).n_features)  # before the minute that an export can take
    exported = export_backbone(backbone, weights, settings.backbones_dir, output=output)
    return Featurizer(FeatureSource.of(exported))


def model_source(settings: Settings, version: int, scratch: Path) -> Featurizer:
    """The backbone and projection of a registered model.

    Args:
        scratch: a directory that keeps the model's files for as long as the source is used.

    Raises:
        ModelError: there is no such version, or its bundle is refused.
    """
    folder = scratch / "bundle"
    bundle = open_registry(settings.home).fetch(version, folder)
    return Featurizer(FeatureSource.of_bundle(bundle, folder), load_head(bundle).projection)


def export_features(
    settings: Settings,
    dataset: Dataset,
    source: Featurizer,
    options: FitOptions,
    output: Path | str,
    format_: FileFormat,
    on_progress: Callable[[int], None] | None = None,
) -> Exported:
    """Featurize what is not yet, fit the projection in one pass, and write the projected features of every image.

    Args:
        options: what to fit, unless the source brings a projection.
        on_progress: as for `featurize`.

    Raises:
        ServiceError: no image decodes, or the output cannot be written.
        ModelError: the projection does not suit the features.
    """
    check_output(output, format_)
    make_dir(settings.work_dir)
    with spark_session(settings, "imagestream features", java_options=QUICK_START) as spark:
        table = Table(f"{settings.home}/{KEPT_IN}", "features")
        limits = settings.image_limits
        found = featurize(spark, dataset, source.backbone, table, limits=limits, on_progress=on_progress)
        # The paths and labels again, without the bytes: the workers have forgotten them.
        rows = featurized_rows(images_frame(spark, dataset, lambda *_: 1), table, source.backbone.sha256)
        if rows is None or not found.rows:
            path, why = next(iter(found.bad.items()), (str(dataset.source), "empty"))
            raise DataError(f"not one of the {dataset.n_images:,} images decodes; the first: {path}: {why}")
        projection = source.projection or fit_projection(rows, found.rows, options)
        written = write_feature_files(rows, found.rows, projection, output, format_)
    return Exported(written, projection.kind, projection.n_out, variance_kept(projection), found)
