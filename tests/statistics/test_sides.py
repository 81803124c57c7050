"""Training, holdout and evaluation images: simulations of growth, corrections, duplicates and old homes."""

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import SparkSession
from pyspark.sql import functions as F  # noqa: N812
from sklearn.datasets import make_classification
from sklearn.neighbors import KNeighborsClassifier

from models.bloom_filter import BloomFilter, FittedOn
from models.bundle import Bundle, TrainingData
from models.xxhash64 import HASH_BITS, spark_xxhash64
from streaming.images.labels import labelled_features
from streaming.images.membership import fitted_on
from streaming.images.split import Split
from streaming.reports.paired import PairedAccuracy
from streaming.storage.files import list_array
from streaming.storage.tables import FEATURES, LABELS, Table
from tests.forms import Form, Record
from tests.homes import local_home

SHARE = 0.2
SIGMAS = 5  # a correct implementation exceeds the tolerance in less than one run in a million


def ids_of(seed: int, count: int, what: str = "image") -> list[str]:
    return [sha256(f"{seed} {what} {number}".encode()).hexdigest() for number in range(count)]


def hashes(ids: list[str], seed: int) -> NDArray[np.uint64]:
    return spark_xxhash64([one.encode() for one in ids], seed) >> np.uint64(64 - HASH_BITS)


def store(table: Table, columns: dict[str, Any], version: int = 0) -> None:
    n = len(columns["image_id"])
    given = columns | {"backbone_sha256": ["ours"] * n, "features": list_array(np.zeros((n, 1), np.float32))}
    arrays = [pa.array(given[one.name], one.type) if one.name in given else pa.nulls(n, one.type) for one in FEATURES]
    assert table.append(pa.table(arrays, schema=FEATURES), "test", version)


def binomial_tolerance(share: float, n: int) -> float:
    """The tolerance of a fraction that is estimated from n."""
    return SIGMAS * float(np.sqrt(share * (1 - share) / n))


def test_same_bytes_under_two_keys_are_on_the_same_side(
    spark: SparkSession, tmp_path: Path, form: Form[int], seed: int, record: Record
) -> None:
    pairs = form(20_000, 4_000)
    contents = ids_of(seed, pairs)
    keys = [ids_of(seed, pairs, what) for what in ("first key", "second key")]
    table = Table(tmp_path / "tables", "features")
    for version, names in enumerate(keys):
        store(table, {"image_id": names, "content_sha256": contents, "label_true": ["a"] * pairs}, version)
    training, holdout = (
        {row.image_id for row in side.select("image_id").collect()}
        for side in Split(seed, SHARE).sides(labelled_features(spark, table, "ours"))
    )
    apart = len(training & holdout) / pairs
    first, second = (hashes(names, seed) < SHARE * 2**HASH_BITS for names in keys)
    record(
        "pairs of equal bytes on both sides",
        "0; by key it was 0.32",
        f"{apart:.4f}; by key {(first != second).mean():.3f}",
    )
    assert len(training) + len(holdout) == pairs  # each pair is one image
    assert apart == 0
    assert abs((first != second).mean() - 2 * SHARE * (1 - SHARE)) < binomial_tolerance(0.32, pairs)


def test_held_out_fraction_is_independent_of_initial_class_size(
    spark: SparkSession, form: Form[int], seed: int, record: Record
) -> None:
    """Many classes that began with two images. A threshold computed from these two held out any fraction."""
    classes, later = form(500, 150), 200
    names = ids_of(seed, classes * later)
    rows = pa.table({"image_id": names, "label": [f"{n // later}" for n in range(len(names))]})
    found = spark.createDataFrame(rows).groupBy("label").agg(F.avg(Split(seed, SHARE).held_out().cast("int")))
    shares = np.array([row[1] for row in found.collect()])
    of_two = np.sort(hashes(ids_of(seed, 2 * classes, "first"), seed).reshape(classes, 2), axis=1)[:, 1] / 2**HASH_BITS
    record(
        "held out of a class that began with two images",
        f"{SHARE} ± {binomial_tolerance(SHARE, later):.2f} each; by threshold 0.67",
        f"{shares.min():.2f} to {shares.max():.2f}, mean {shares.mean():.4f}; by threshold {of_two.mean():.2f}",
    )
    assert abs(shares.mean() - SHARE) < binomial_tolerance(SHARE, classes * later)
    assert abs(shares - SHARE).max() < binomial_tolerance(SHARE, later)
    assert abs(of_two.mean() - 2 / 3) < 0.1  # with a threshold


def test_corrections_and_growth_move_no_image(
    spark: SparkSession, tmp_path: Path, form: Form[int], seed: int, record: Record
) -> None:
    n = form(20_000, 3_000)
    names = ids_of(seed, n)
    table = Table(tmp_path / "tables", "features")
    split = Split(seed, SHARE)

    def held_out() -> set[str]:
        return {row.image_id for row in split.sides(labelled_features(spark, table, "ours"))[1].collect()}

    store(table, {"image_id": names, "content_sha256": names, "label_true": [f"{i % 3}" for i in range(n)]})
    before = held_out()
    more = ids_of(seed, n, "later")
    store(table, {"image_id": more, "content_sha256": more, "label_true": ["3"] * n}, 1)
    corrected = pa.table({"image_id": names, "label": ["4"] * n, "labelled_at": [0] * n, "by": ["test"] * n})
    arrays = [corrected.column(one.name).cast(one.type) for one in LABELS]
    assert Table(table.tables, "labels").append(pa.table(arrays, schema=LABELS), "test", 0)
    moved = (held_out() & set(names)) ^ before
    record("images that change sides as data grows and labels change", "0", f"{len(moved)} of {n:,}")
    assert not moved
    assert abs(len(before) / n - SHARE) < binomial_tolerance(SHARE, n)


def test_reported_accuracy_excludes_fitted_images(form: Form[int], seed: int, record: Record) -> None:
    """The new model was fitted on half of the history; only the other half shows its accuracy on new images."""
    n, fresh = form(8_000, 2_000), form(40_000, 10_000)
    features, labels = make_classification(
        n + fresh, n_features=10, n_informative=6, flip_y=0.15, n_classes=3, random_state=seed
    )
    names = [one.encode() for one in ids_of(seed, n)]
    was_fitted = np.random.default_rng(seed).random(n) < 0.5
    new = KNeighborsClassifier(1).fit(features[:n][was_fitted], labels[:n][was_fitted])
    old = KNeighborsClassifier(25).fit(features[:200], labels[:200])
    images = BloomFilter.empty(int(was_fitted.sum()), seed)
    images.add([name for name, fitted in zip(names, was_fitted, strict=True) if fitted])
    right = [model.predict(features) == labels for model in (old, new)]
    counts = PairedAccuracy()
    history = np.arange(n) >= 200  # the old model was fitted on the first 200 images
    counts.add(*(one[:n][history] for one in right), FittedOn(images).contains(names)[history])
    found = counts.as_row()
    on_new, on_all = right[1][n:].mean(), right[1][:n].mean()
    record(
        "accuracy reported on history, half of it fitted on",
        f"{on_new:.3f} as on new images",
        f"{found['new_accuracy']:.3f}; fitted on {found['fitted_new_accuracy']:.3f}, all together {on_all:.3f}",
    )
    tolerance = binomial_tolerance(on_new, counts.judged) + binomial_tolerance(on_new, fresh)
    assert abs(found["new_accuracy"] - on_new) < tolerance
    assert on_all > on_new + tolerance  # reported by earlier versions
    assert found["fitted_new_accuracy"] > 0.99  # memorised, except for false positives of the filter


# --- homes from before the split was by content


def thresholds(ids: list[str], labels: list[str], seed: int, kept: dict[str, int]) -> dict[str, int]:
    """The former split: for each class the hash at a rank, fixed when the class had two images."""
    found: dict[str, int] = {}
    for name in set(labels):
        mine = np.sort(hashes([one for one, label in zip(ids, labels, strict=True) if label == name], seed))
        if len(mine) > 1:
            found[name] = int(mine[min(max(1, round(len(mine) * SHARE)), len(mine) - 1)])
    return found | kept


def test_no_version_is_evaluated_on_its_fitted_images(
    tmp_path: Path, form: Form[int], seed: int, record: Record
) -> None:
    """A home that grew over several retrainings, with classes that start small and corrected labels."""
    rounds, per_round = form(8, 4), form(3_000, 500)
    rng = np.random.default_rng(seed)
    names = ids_of(seed, rounds * per_round)
    label_of: dict[str, str] = {}
    kept: dict[str, int] = {}
    versions: list[tuple[set[str], Bundle]] = []
    table, given = (Table(tmp_path / "tables", name) for name in ("features", "labels"))
    for number in range(rounds):
        new = names[number * per_round : (number + 1) * per_round]
        labels = [f"{c}" for c in rng.integers(0, 3 + 3 * number, per_round)]
        label_of |= dict(zip(new, labels, strict=True))
        store(table, {"image_id": new, "label_true": labels}, number)
        corrected = rng.choice(sorted(label_of), len(label_of) // 10, replace=False).tolist()
        wrong = [f"{c}" for c in rng.integers(0, 3 + 3 * number, len(corrected))]
        label_of |= dict(zip(corrected, wrong, strict=True))
        columns = [corrected, wrong, [number] * len(corrected), ["test"] * len(corrected)]
        arrays = [pa.array(column).cast(one.type) for column, one in zip(columns, LABELS, strict=True)]
        assert given.append(pa.table(arrays, schema=LABELS), "test", number)

        ids, now = list(label_of), list(label_of.values())
        kept = thresholds(ids, now, seed, kept)
        limit = np.array([kept.get(label, 0) for label in now], np.uint64)
        fitted = {one for one, out in zip(ids, hashes(ids, seed) < limit, strict=True) if not out}
        data = TrainingData(rows=len(fitted), holdout_rows=0, fingerprint="0" * 64, seed=seed, holdout=kept)
        manifest = SimpleNamespace(classes=tuple(sorted(set(now))), training_data=data)
        versions.append((fitted, Bundle(cast("Any", manifest), sha256(b"%d" % number).hexdigest(), {})))

    held_out = hashes(names, seed) < SHARE * 2**HASH_BITS  # the present split
    evaluated = 0
    for fitted, bundle in versions:
        seen = fitted_on(bundle, local_home(tmp_path)).contains([name.encode() for name in names])
        holdout = {name for name, out, was_fitted in zip(names, held_out, seen, strict=True) if out and not was_fitted}
        assert not holdout & fitted
        evaluated += len(holdout)
    left = evaluated / (len(versions) * held_out.sum())
    record("old home: held-out images to evaluate old versions", "0 of them fitted on", f"{left:.2f} of all, 0")
    assert left > 0.5
