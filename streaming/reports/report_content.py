"""The content of a report on a model, independent of its source; `streaming.reports.report_page` renders it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.arrays import Features
from models.bundle import BackboneEntry, Bundle
from models.decode import Resize
from models.evaluation import Evaluation, Interval
from models.paired import PairedCounts
from streaming.reports.plots import Sample
from streaming.reports.thumbnails import thumbnail

if TYPE_CHECKING:
    from streaming.training.gate import Paired

CONFIDENCE = 0.95


@dataclass(frozen=True)
class VersionComparison:
    """A comparison of two versions on the same images.

    Attributes:
        against: the other version.
        ours, theirs: evaluation of each version.
        paired: paired comparison by our version's objective; ours is the candidate, the other is the champion.
        gain: `CONFIDENCE` interval of our gain in that objective; see docs/statistics.md.
    """

    against: int
    ours: Evaluation
    theirs: Evaluation
    paired: "Paired"
    gain: Interval

    @property
    def counts(self) -> PairedCounts:
        return self.paired.counts


@dataclass(frozen=True)
class ModelReport:
    """The content of a report.

    Attributes:
        about: description of the evaluated images.
        balance: name of a part of the data → number of images of each class.
        mistakes: the wrong predictions with the highest confidence.
        lineage: heading → name → value.
        variance: explained variance ratio of each component and the number of components kept, for a PCA.
        fitted: evaluation on images on which the model may have been fitted, which are in no other metric.
        notes: metrics that are not available, and why.
    """

    title: str
    about: str
    evaluation: Evaluation
    balance: Mapping[str, Sequence[int]]
    samples: Sequence[Sample]
    mistakes: Sequence[Sample]
    lineage: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    variance: tuple[Features, int] | None = None
    comparison: VersionComparison | None = None
    fitted: Evaluation | None = None
    notes: Sequence[str] = ()


def lineage_of(bundle: Bundle) -> dict[str, dict[str, str]]:
    """Return the lineage of a version from its manifest."""
    manifest = bundle.manifest
    backbone, data = manifest.backbone, manifest.training_data
    stages = {
        name: f"{stage.kind}, {stage.n_in:,} → {stage.n_out:,}"
        for name, stage in (("projection", manifest.projection), ("classifier", manifest.classifier))
    }
    threshold = {} if manifest.threshold is None else {"threshold": f"{manifest.threshold:.6g}"}
    return {
        "Bundle": {"SHA-256": bundle.sha256, **stages, "classes": f"{len(manifest.classes):,}", **threshold},
        "Backbone": {
            "name": backbone.name,
            "weights": backbone.weights,
            "engine": f"{backbone.engine}, {backbone.precision}",
            "input": f"{backbone.input_size[0]}×{backbone.input_size[1]} pixels, {_fitting(backbone)}",
            "output": f"{backbone.output}, {backbone.n_features:,} features",
            "largest difference from Keras": f"{backbone.parity:.1e}",
            "SHA-256": bundle.backbone_sha256,
        },
        "Training data": {
            "images": f"{data.rows:,} fitted on, {data.holdout_rows:,} held out",
            "fingerprint": data.fingerprint,
            "seed": str(data.seed),
            **({} if data.group_by is None else {"grouped by": data.group_by}),
        },
        "Fit": {name.replace("_", " "): str(value) for name, value in manifest.fit.items()},
        "Libraries": dict(manifest.libraries),
    }


def _fitting(backbone: BackboneEntry) -> str:
    recipe = backbone.network and backbone.network.recipe
    return f"{recipe.fit.replace('_', ' and ')} ({recipe.filter})" if recipe else backbone.resize


def sample_of(row: Mapping[str, Any], sources: Sequence[str], resize: Resize = "stretch") -> Sample:
    """Return a prediction with its image, if one of `sources` still contains it.

    Args:
        row: image_id, label, predicted, confidence and, if image_id is the content hash, known_as: the id in the
            tables.
        sources: possible files of the image.
    """
    pixels = thumbnail(sources, row["image_id"], resize)
    answer = {name: row[name] for name in ("image_id", "label", "predicted", "confidence")}
    answer["image_id"] = row.get("known_as", row["image_id"])
    return Sample(**answer, pixels=pixels, source=next(iter(sources), None))


def summary_of(report: ModelReport) -> dict[str, Any]:
    """Return the summary of a report for `--json`."""
    found, compared = report.evaluation, report.comparison
    low, high = found.macro_f1_interval()
    summary: dict[str, Any] = {
        "title": report.title,
        "metrics": found.as_metrics() | {"macro_f1_low": low, "macro_f1_high": high},
        "classes": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in zip(
                found.classes, found.precision, found.recall, found.f1, found.support, strict=True
            )
        },
        "mistakes": [
            {name: getattr(one, name) for name in ("image_id", "label", "predicted", "confidence", "source")}
            for one in report.mistakes
        ],
        "fitted_metrics": report.fitted.as_metrics() if report.fitted else None,
        "notes": list(report.notes),
    }
    if compared:
        summary["comparison"] = {
            "against": compared.against,
            "metrics": compared.ours.as_metrics(),
            "against_metrics": compared.theirs.as_metrics(),
            "metric": str(compared.paired.objective),
            "both_right": compared.counts.both,
            "only_this_right": compared.counts.only_candidate,
            "only_other_right": compared.counts.only_champion,
            "neither_right": compared.counts.neither,
            "gain": compared.paired.gain.value,
            "gain_low": compared.gain.low,
            "gain_high": compared.gain.high,
        }
    return summary
