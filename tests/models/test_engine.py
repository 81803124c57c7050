import numpy as np
import pytest

from models.backbone import ExportedBackbone
from models.convert import comparison_images
from models.engine import LiteRTEngine
from models.errors import ModelError


@pytest.fixture(scope="module")
def engine(exported: ExportedBackbone) -> LiteRTEngine:
    return LiteRTEngine(exported.flatbuffer)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return comparison_images((224, 224))


def test_engine_reports_its_sizes(engine: LiteRTEngine) -> None:
    assert engine.input_size == (224, 224)
    assert engine.n_features == 1280


def test_features_do_not_depend_on_the_rest_of_the_batch(engine: LiteRTEngine, images: np.ndarray) -> None:
    together = engine(images)
    assert together.dtype == np.float32
    assert together.shape == (len(images), 1280)
    assert np.isfinite(together).all()
    order = [3, 0, 4, 4, 1, 2]
    np.testing.assert_array_equal(engine(images[order]), together[order])
    for i in range(len(images)):
        np.testing.assert_array_equal(engine(images[i : i + 1])[0], together[i])


def test_bytes_file_and_more_threads_give_the_same_features(exported: ExportedBackbone, images: np.ndarray) -> None:
    expected = LiteRTEngine(exported.flatbuffer)(images)
    np.testing.assert_array_equal(LiteRTEngine(exported.flatbuffer.read_bytes())(images), expected)
    np.testing.assert_array_equal(LiteRTEngine(exported.flatbuffer, threads=2)(images), expected)


def test_no_images_give_no_features(engine: LiteRTEngine) -> None:
    assert engine(np.empty((0, 224, 224, 3), np.uint8)).shape == (0, 1280)


def test_non_contiguous_images_are_accepted_and_not_modified(engine: LiteRTEngine, images: np.ndarray) -> None:
    mirrored = images[:2, :, ::-1]
    before = mirrored.copy()
    mirrored.flags.writeable = False
    np.testing.assert_array_equal(engine(mirrored), engine(before))
    np.testing.assert_array_equal(mirrored, before)


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 224, 224, 3), np.float32), np.zeros((1, 224, 200, 3), np.uint8), np.zeros((224, 224, 3), np.uint8)],
    ids=["floats", "wrong size", "no batch dimension"],
)
def test_images_of_another_shape_or_type_are_rejected(engine: LiteRTEngine, images: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"expected uint8 images of shape \(N, 224, 224, 3\), got"):
        engine(images)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_cut_off_flatbuffer_is_rejected(exported: ExportedBackbone, kept: float) -> None:
    content = exported.flatbuffer.read_bytes()
    with pytest.raises(ModelError, match="not a usable LiteRT model"):
        LiteRTEngine(content[: int(len(content) * kept)])


def test_invalid_flatbuffer_is_rejected(exported: ExportedBackbone) -> None:
    for content in (b"TFL3" * 100, np.random.default_rng(0).bytes(10_000)):
        with pytest.raises(ModelError, match="not a usable LiteRT model"):
            LiteRTEngine(content)
    with pytest.raises(ModelError, match="No such file"):
        LiteRTEngine(exported.flatbuffer.with_name("absent.tflite"))
