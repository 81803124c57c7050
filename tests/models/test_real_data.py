"""Real weights on real photographs: skipped, with the reason, where the photographs are not at hand."""

import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from models.architectures import find_backbone
from models.backbone import build_body
from models.class_names import imagenet_names
from models.import_file import import_network
from models.scorer import load_engine
from streaming.training.import_model import entry_of, sample_images
from tests.conftest import CHECKOUT
from tests.forms import Form, Record

PHOTOGRAPHS = CHECKOUT.parent / "shared" / "data" / "imagenet-1000.tar"


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
    """As `mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5`: a group for each layer, with or without
    weights, named and listed in attributes, weights by their names in TensorFlow 1."""
    spec = find_backbone("mobilenet_v2", input_size=(32, 32))
    made = build_body(spec, "random", seed=7)
    random = np.random.default_rng(0)
    for weight in made.weights:
        weight.assign(random.normal(1, 0.1, weight.shape))
    path = tmp_path / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
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
