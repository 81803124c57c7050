import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import sklearn.datasets

from models import efficientnet_lite0
from models.backbone import (
    BACKBONES,
    FLATBUFFER_FILE,
    MAX_PARITY_ERROR,
    ExportedBackbone,
    build_body,
    export_backbone,
    find_backbone,
)
from models.convert import comparison_images
from models.decode import decode
from models.engine import LiteRTEngine
from models.errors import ModelError

if TYPE_CHECKING:
    import keras

PHOTOGRAPHS = Path(sklearn.datasets.__file__).parent / "images"
PALACE, DAISY = 698, 985  # classes of ImageNet


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return comparison_images((224, 224))


@pytest.fixture(scope="module")
def small_cnn() -> "keras.Model":
    return build_body(BACKBONES["cnn_color"], "random")


def test_efficientnet_lite0_classifies_photographs_correctly() -> None:
    photographs = [(PHOTOGRAPHS / name).read_bytes() for name in ("china.jpg", "flower.jpg")]
    pixels = np.stack([np.asarray(decode(one, (224, 224), resize="crop")) for one in photographs])
    model = efficientnet_lite0.build(include_top=True)
    probabilities = np.asarray(model((pixels.astype(np.float32) - 127) / 128))
    assert list(probabilities.argmax(axis=1)) == [PALACE, DAISY]
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_backbone_is_exported_once_and_cached(exported: ExportedBackbone, exports: Path, images: np.ndarray) -> None:
    before = exported.flatbuffer.stat().st_mtime_ns
    assert export_backbone("efficientnet_lite0", "imagenet", exports) == exported
    assert exported.flatbuffer.stat().st_mtime_ns == before
    assert exported.parity <= MAX_PARITY_ERROR
    assert LiteRTEngine(exported.flatbuffer)(images).shape == (5, 1280)


def test_corrupt_export_is_rebuilt_identically(exports: Path, tmp_path: Path) -> None:
    first = export_backbone("cnn_gray", "random", exports)
    damaged = shutil.copytree(first.flatbuffer.parent, tmp_path / first.flatbuffer.parent.name) / FLATBUFFER_FILE
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    again = export_backbone("cnn_gray", "random", tmp_path)
    assert (again.flatbuffer, again.sha256) == (damaged, first.sha256)
    assert LiteRTEngine(again.flatbuffer).n_features == again.spec.n_features
    assert [folder.name for folder in tmp_path.iterdir()] == [damaged.parent.name]


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5", ".keras"])
def test_weights_are_loaded_from_a_local_file(small_cnn: "keras.Model", suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"mine{suffix}"
    if suffix == ".weights.h5":
        small_cnn.save_weights(file)
    else:
        small_cnn.save(file)
    spec = BACKBONES["cnn_color"]
    for got, expected in zip(build_body(spec, str(file)).get_weights(), small_cnn.get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_random_weights_are_reproducible_and_keep_the_global_random_state(small_cnn: "keras.Model") -> None:
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    again = build_body(BACKBONES["cnn_color"], "random")
    assert np.random.random() == expected
    for got, known in zip(again.get_weights(), small_cnn.get_weights(), strict=True):
        np.testing.assert_array_equal(got, known)


def test_incompatible_weights_are_rejected(exported: ExportedBackbone, tmp_path: Path) -> None:
    spec = BACKBONES["cnn_color"]
    with pytest.raises(ModelError, match="do not fit cnn_color"):
        build_body(spec, str(exported.keras_weights))
    (tmp_path / "noise.h5").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="do not fit cnn_color"):
        build_body(spec, str(tmp_path / "noise.h5"))
    body = build_body(spec, "random")
    body.set_weights([np.full_like(values, np.nan) for values in body.get_weights()])
    body.save_weights(tmp_path / "nan.weights.h5")
    with pytest.raises(ModelError, match="8 of 8 are missing or not finite"):
        build_body(spec, str(tmp_path / "nan.weights.h5"))
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"ends in one of \.h5"):
        export_backbone("mobilenet_v2", str(tmp_path / "weights.pth"), tmp_path)
    with pytest.raises(ModelError, match=r"there is no file 'absent\.h5'"):
        export_backbone("mobilenet_v2", "absent.h5", tmp_path)


def test_unknown_backbone_error_lists_the_known_ones() -> None:
    known = ", ".join(BACKBONES)
    with pytest.raises(ModelError, match=f"'MobileNetV2', known are {known}; did you mean mobilenet_v2"):
        find_backbone("MobileNetV2")
    with pytest.raises(ModelError, match=f"known are {known}$"):
        find_backbone("xyz")


def test_failed_download_error_names_the_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))  # nothing is cached there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # and nothing listens there
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        export_backbone("mobilenet_v2", "imagenet", tmp_path / "exports")
    for alternative in ("a local .h5 file", "or `random`", "efficientnet_lite0"):
        assert alternative in str(caught.value)
    assert not list((tmp_path / "exports").iterdir())
