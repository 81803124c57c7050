"""What a report on a model tells, wherever it was read; `streaming.reports.report_page` makes a page of it."""

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
class Comparison:
    """Two versions on the same images.

    Attributes:
        against: the other version.
        ours, theirs: what each is worth on these images.
        paired: their answers, by what our version is run for; the candidate is ours, the champion theirs.
        gain: where our gain in that lies with `CONFIDENCE`; see docs/statistics.md.
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
    """What the report tells of a model; see `streaming.reports.report_page` for how.

    Attributes:
        about: which images the figures are of, in a sentence.
        balance: name of a part of the data → images of each of the evaluation's classes.
        fitted: figures of the images that it was possibly fitted on, which are in none of the others.
        variance: (share of the variance that each component explains, how many are kept), of a PCA.
        lineage: heading → name → value.
        notes: what cannot be told, and why.
    """

    title: str
    about: str
    evaluation: Evaluation
    balance: Mapping[str, Sequence[int]]
    samples: Sequence[Sample]
    mistakes: Sequence[Sample]
    lineage: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    variance: tuple[Features, int] | None = None
    comparison: Comparison | None = None
    fitted: Evaluation | None = None
    notes: Sequence[str] = ()


def lineage_of(bundle: Bundle) -> dict[str, dict[str, str]]:
    """Where a version comes from, as its manifest tells it."""
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
            "largest difference to Keras": f"{backbone.parity:.1e}",
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
    """An answer (image_id, label, predicted, confidence) with its image, if one of `sources` still holds it.

    Where image_id is the hash of the content, `known_as` is the id that the tables have.
    """
    pixels = thumbnail(sources, row["image_id"], resize)
    answer = {name: row[name] for name in ("image_id", "label", "predicted", "confidence")}
    answer["image_id"] = row.get("known_as", row["image_id"])
    return Sample(**answer, pixels=pixels, source=next(iter(sources), None))


def summary_of(report: ModelReport) -> dict[str, Any]:
    """The machine-readable summary of a report."""
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
