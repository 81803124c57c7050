"""Scoring with a bundle, and the checks before it: arrays, dimensions and golden predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import Digits, replace_file, seal

from models.arrays import Arrays, read_npz, write_npz
from models.backbone import FLATBUFFER_FILE
from models.bundle import CLASSIFIER, FILES, GOLDEN, PROJECTION, read_bundle
from models.decode import Reason
from models.engine import KerasEngine
from models.errors import ModelError
from models.scorer import Scorer, check_golden, decode_all, golden_arrays, golden_images, load_head, load_scorer


def altered(bundle: Path, name: str, **changes: Any) -> Path:
    """Replace some arrays in a file of the bundle (None removes one) and update its hashes."""
    arrays: Arrays = read_npz((bundle / name).read_bytes(), name) | changes
    replace_file(bundle, name, write_npz({key: array for key, array in arrays.items() if array is not None}))
    seal(bundle)
    return bundle


def test_loaded_bundle_scores_like_the_original_model(bundle_dir: Path, scorer: Scorer, digits: Digits) -> None:
    bundle = read_bundle(bundle_dir)
    loaded = load_scorer(bundle, threads=2)
    decoded = loaded.decode(digits.images[:20])
    got = loaded.probabilities(loaded.features(decoded.images))
    np.testing.assert_array_equal(got, scorer.probabilities(digits.features[:20]))
    assert (got.dtype, got.shape) == (np.float32, (20, 10))
    np.testing.assert_allclose(got.sum(axis=1), 1.0, atol=1e-6)
    predicted = [loaded.head.classes[i] for i in loaded.head.answers(got)]
    assert np.mean([a == b for a, b in zip(predicted, digits.labels, strict=False)]) > 0.9
    check_golden(bundle, loaded)


def test_keras_engine_passes_the_golden_predictions(bundle_copy: Path) -> None:
    """The reference engine runs the Keras weights of the bundle and does not load the flatbuffer."""
    seal(bundle_copy, backbone__engine="keras")
    bundle = read_bundle(bundle_copy)
    assert set(bundle.files) == FILES - {FLATBUFFER_FILE}
    loaded = load_scorer(bundle)
    assert isinstance(loaded.engine, KerasEngine)
    check_golden(bundle, loaded)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"backbone__scale": 0.5}, "prepares pixels for .* in another way"),
        ({"backbone__precision": "int8"}, "is quantised"),
        ({"backbone__name": "vgg17"}, "unknown backbone 'vgg17'"),
        ({"backbone__name": "mobilenet_v2", "backbone__scale": 1 / 127.5, "backbone__offset": -1.0}, "do not fit"),
        ({"backbone__input_size": [24, 24]}, "takes images of .* from 32"),
    ],
)
def test_weights_that_keras_cannot_load_are_rejected(bundle_copy: Path, fields: dict[str, Any], reason: str) -> None:
    seal(bundle_copy, backbone__engine="keras", **fields)
    with pytest.raises(ModelError, match=reason):
        load_scorer(read_bundle(bundle_copy))


def test_bad_images_are_reported_by_row(digits: Digits) -> None:
    good = digits.images[0]
    decoded = decode_all([None, good, b"", b"no image", good[:60], digits.images[1]], (32, 48))
    assert decoded.images.shape == (2, 32, 48, 3)
    assert decoded.rows == [1, 5]
    assert {row: bad.reason for row, bad in decoded.bad.items()} == {
        0: Reason.MISSING,
        2: Reason.EMPTY,
        3: Reason.NOT_AN_IMAGE,
        4: Reason.TRUNCATED,
    }
    assert decode_all([], (32, 48)).images.shape == (0, 32, 48, 3)


def test_golden_images_round_trip(scorer: Scorer, digits: Digits) -> None:
    assert golden_images(golden_arrays(scorer, digits.images[:3])) == digits.images[:3]
    for images in ([], [digits.images[0], b"no image"]):
        with pytest.raises(
            ModelError, match="golden predictions need at least one image, and every image must be decodable"
        ):
            golden_arrays(scorer, images)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (PROJECTION, {"mean": None}, "array 'mean' is missing"),
        (PROJECTION, {"mean": np.zeros(1280)}, "array 'mean' should be float32"),
        (PROJECTION, {"mean": np.full(1280, np.nan, np.float32)}, "array 'mean' contains NaN"),
        (PROJECTION, {"components": np.zeros((3, 1280), np.float32)}, "the projection gives 3 values, the manifest"),
        (PROJECTION, {"components": np.zeros((0, 1280), np.float32)}, "cannot have 0 components"),
        (CLASSIFIER, {"intercept": None}, "array 'intercept' is missing"),
        (CLASSIFIER, {"intercept": np.zeros(9)}, "array 'intercept' should be float64"),
        (CLASSIFIER, {"intercept": np.full(10, np.inf)}, "array 'intercept' contains NaN or infinite"),
    ],
)
def test_arrays_that_contradict_the_manifest_are_rejected(
    bundle_copy: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        load_head(read_bundle(altered(bundle_copy, name, **changes)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"projection__kind": "umap"}, "unknown projection 'umap'"),
        ({"projection__kind": "none"}, "the projection gives 1280 values, the manifest says"),
        ({"classifier__kind": "forest"}, "unknown classifier 'forest'"),
        (
            {"backbone__input_size": [96, 96]},
            r"the flatbuffer takes \(224, 224\) and gives 1280 .* \(96, 96\) and 1280",
        ),
        (
            {"backbone__n_features": 640, "projection__n_in": 640},
            r"the flatbuffer takes \(224, 224\) and gives 1280 features, the manifest says \(224, 224\) and 640",
        ),
    ],
)
def test_manifest_of_another_model_is_rejected(bundle_copy: Path, fields: dict[str, Any], reason: str) -> None:
    seal(bundle_copy, **fields)
    with pytest.raises(ModelError, match=reason):
        load_scorer(read_bundle(bundle_copy))


def test_invalid_flatbuffer_is_rejected(bundle_copy: Path) -> None:
    replace_file(bundle_copy, FLATBUFFER_FILE, b"TFL3" * 100)
    seal(bundle_copy)
    with pytest.raises(ModelError, match="not a usable LiteRT model"):
        load_scorer(read_bundle(bundle_copy))


def test_pickled_arrays_are_never_loaded(bundle_copy: Path) -> None:
    with (bundle_copy.parent / "pickled.npz").open("wb") as file:
        np.savez(file, mean=np.array([Exploding()], dtype=object))
    replace_file(bundle_copy, PROJECTION, (bundle_copy.parent / "pickled.npz").read_bytes())
    seal(bundle_copy)
    with pytest.raises(ModelError, match=r"projection\.npz is not a readable npz without pickles"):
        load_scorer(read_bundle(bundle_copy))


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was loaded",)


def test_wrong_golden_predictions_are_rejected(bundle_copy: Path, scorer: Scorer) -> None:
    golden = read_bundle(bundle_copy).arrays(GOLDEN)
    bundle = read_bundle(altered(bundle_copy, GOLDEN, probabilities=golden["probabilities"] + np.float32(0.0009)))
    check_golden(bundle, scorer)  # within the tolerance
    bundle = read_bundle(altered(bundle_copy, GOLDEN, probabilities=golden["probabilities"] + np.float32(0.0012)))
    with pytest.raises(ModelError, match=r"golden predictions differ by 0\.0012, more than the 0\.001 allowed"):
        check_golden(bundle, scorer)


def test_golden_predictions_detect_swapped_classes(bundle_copy: Path) -> None:
    arrays = read_bundle(bundle_copy).arrays(CLASSIFIER)
    exchanged = {name: array[::-1].copy() for name, array in arrays.items()}
    bundle = read_bundle(altered(bundle_copy, CLASSIFIER, **exchanged))
    with pytest.raises(ModelError, match="golden predictions differ by"):
        check_golden(bundle, load_scorer(bundle))


def invalid_golden_arrays() -> dict[str, tuple[dict[str, Any], str]]:
    ten = np.full((3, 10), 0.1, np.float32)
    return {
        "missing array": ({"lengths": None}, "should hold lengths, data and probabilities, it holds"),
        "extra array": ({"extra": np.zeros(1)}, "should hold lengths, data and probabilities, it holds"),
        "no images": ({"lengths": np.zeros(0, np.int64), "data": np.zeros(0, np.uint8)}, "inconsistent"),
        "lengths too long": ({"lengths": np.full(3, 2**62)}, "inconsistent"),
        "negative lengths": ({"lengths": np.array([-1, 2, 3])}, "inconsistent"),
        "lengths that are not integers": ({"lengths": np.ones(3)}, "inconsistent"),
        "data of another type": ({"data": np.zeros(5, np.float32)}, "inconsistent"),
        "too few probabilities": ({"probabilities": ten[:2]}, "inconsistent"),
        "probabilities of other classes": ({"probabilities": ten[:, :9]}, "inconsistent"),
        "text probabilities": ({"probabilities": ten.astype(str)}, "inconsistent"),
        "NaN": ({"probabilities": ten * np.float32(np.nan)}, "inconsistent"),
        "images that do not decode": (
            {"lengths": np.array([1, 1, 1]), "data": np.ones(3, np.uint8)},
            "cannot be decoded",
        ),
    }


@pytest.mark.parametrize("case", invalid_golden_arrays())
def test_invalid_golden_arrays_are_rejected(bundle_copy: Path, scorer: Scorer, case: str) -> None:
    changes, reason = invalid_golden_arrays()[case]
    with pytest.raises(ModelError, match=reason):
        check_golden(read_bundle(altered(bundle_copy, GOLDEN, **changes)), scorer)
