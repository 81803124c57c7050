"""`imagestream features`: exports the projected features of images to a file.

The backbone's features are kept in the home, separate from the tables of the service: an interrupted run resumes where
it stopped, and another projection of the same images does not run the CNN again.
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
from streaming.wording import counted

KEPT_IN = "featurized"  # in the home


@dataclass(frozen=True)
class Featurizer:
    """A backbone, and the projection of its model if it is from the registry."""

    backbone: FeatureSource
    projection: Projection | None = None


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        rows: images in the output.
        projection: its kind.
        n_components: columns of features.
        variance_kept: share of the variance that the projection keeps, 0 to 1; None if not known.
        featurized: the images that were featurized or reused.
    """

    rows: int
    projection: str
    n_components: int
    variance_kept: float | None
    featurized: Featurized


def backbone_source(settings: Settings, backbone: str, weights: str, output: Output, options: FitOptions) -> Featurizer:
    """A backbone by name, exported if necessary.

    Args:
        weights: `imagenet`, or a file.
        output: the layer that features are taken from.

    Raises:
        ModelError: the backbone is unknown, its weights are not available, or its features are too wide for exact PCA.
    """
    if options.projection == "pca":
        check_pca_memory(find_backbone(backbone, output).n_features)  # first, since an export can take a minute
    exported = export_backbone(backbone, weights, settings.backbones_dir, output=output)
    return Featurizer(FeatureSource.of(exported))


def model_source(settings: Settings, version: int, scratch: Path) -> Featurizer:
    """The backbone and projection of a registered model.

    Args:
        scratch: a directory for the model's files, which must exist while the source is used.

    Raises:
        ModelError: the version does not exist, or its bundle is rejected.
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
    """Featurize new images, fit the projection in one pass, and write the projected features of all images.

    Args:
        source: the backbone, and possibly a projection.
        options: of the projection to fit if the source has none.
        output: a path, or a URI.
        on_progress: see `featurize`.

    Raises:
        ServiceError: no image can be decoded, or the output cannot be written.
        ModelError: the projection does not match the features.
    """
    check_output(output, format_)
    make_dir(settings.work_dir)
    with spark_session(settings, "imagestream features", java_options=QUICK_START) as spark:
        table = Table(f"{settings.home}/{KEPT_IN}", "features")
        limits = settings.image_limits
        found = featurize(spark, dataset, source.backbone, table, limits=limits, on_progress=on_progress)
        # Read paths and labels again, without the bytes, which the workers no longer have.
        rows = featurized_rows(images_frame(spark, dataset, lambda *_: 1), table, source.backbone.sha256)
        if rows is None or not found.rows:
            path, why = next(iter(found.bad.items()), (str(dataset.source), "empty"))
            raise DataError(f"none of {counted(dataset.n_images, 'image')} can be decoded; the first: {path}: {why}")
        projection = source.projection or fit_projection(rows, found.rows, options)
        written = write_feature_files(rows, found.rows, projection, output, format_)
    return Exported(written, projection.kind, projection.n_out, variance_kept(projection), found)
