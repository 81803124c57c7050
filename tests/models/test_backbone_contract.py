"""Properties that hold for every backbone.

They depend neither on the weights nor on the input size, so most backbones have random weights and small inputs.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.architectures import BACKBONES
from models.backbone import (
    MAX_PARITY_ERROR,
    MAX_RELATIVE_PARITY_ERROR,
    ExportedBackbone,
    build,
    build_body,
)
from models.bundle import BackboneEntry
from models.convert import comparison_images
from models.engine import KerasEngine, LiteRTEngine
from models.errors import ModelError
from models.translated_engine import TranslatedEngine
from tests.prepare import CASES, export

# As in a Spark worker: the parent, which has run an engine, forks; the child creates another engine and runs it.
FORKED = """
import os, sys
from pathlib import Path
import numpy as np
import psutil
from models.engine import LiteRTEngine
flatbuffer, images, answer = map(Path, sys.argv[1:])
pixels = np.load(images)
LiteRTEngine(flatbuffer, threads=2)(pixels[:1])
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
process = psutil.Process()
before = process.memory_info().rss
engine = LiteRTEngine(flatbuffer, threads=2)
features = engine(pixels)
np.savez(answer, features=features, grown=process.memory_info().rss - before)
os._exit(0)
"""


@pytest.fixture(scope="module")
def every_backbone(exports: Path, exports_here: None) -> dict[str, ExportedBackbone]:
    return {name: export(name, exports) for name in CASES}


@pytest.fixture(scope="module", params=CASES)
def backbone(request: pytest.FixtureRequest, every_backbone: dict[str, ExportedBackbone]) -> ExportedBackbone:
    return every_backbone[request.param]


@pytest.fixture(scope="module")
def images(backbone: ExportedBackbone) -> np.ndarray:
    return comparison_images(backbone.spec.input_size)


@pytest.fixture(scope="module")
def engine(backbone: ExportedBackbone) -> LiteRTEngine:
    return LiteRTEngine(backbone.flatbuffer)


@pytest.fixture(scope="module")
def features(engine: LiteRTEngine, images: np.ndarray) -> np.ndarray:
    return engine(images)


def test_every_backbone_is_covered() -> None:
    assert set(CASES) == set(BACKBONES)


def test_features_have_the_declared_shape_dtype_and_range(
    backbone: ExportedBackbone, engine: LiteRTEngine, images: np.ndarray, features: np.ndarray
) -> None:
    case = CASES[backbone.spec.name]
    assert (backbone.spec.n_features, engine.n_features) == (case.n_features, case.n_features)
    assert (
        engine.input_size == backbone.spec.input_size == (case.input_size or BACKBONES[backbone.spec.name].input_size)
    )
    assert features.shape == (len(images), case.n_features)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert features.min() >= 0  # each of these networks ends in a ReLU or outputs the pixels


def test_different_images_have_different_features(features: np.ndarray) -> None:
    scale = np.abs(features).max()
    for i in range(len(features)):
        for j in range(i):
            assert np.abs(features[i] - features[j]).max() > 1e-3 * scale, (i, j)


def test_features_do_not_depend_on_batch_order_or_run(
    backbone: ExportedBackbone, engine: LiteRTEngine, images: np.ndarray, features: np.ndarray
) -> None:
    order = [3, 0, 4, 4, 1, 2]
    np.testing.assert_array_equal(engine(images[order]), features[order])
    np.testing.assert_array_equal(engine(images[1:2])[0], features[1])
    np.testing.assert_array_equal(LiteRTEngine(backbone.flatbuffer)(images), features)
    assert engine(images[:0]).shape == (0, backbone.spec.n_features)


def test_litert_agrees_with_keras_built_from_the_exported_weights(
    backbone: ExportedBackbone, images: np.ndarray, features: np.ndarray
) -> None:
    spec = backbone.spec
    model = build(spec.name, str(backbone.keras_weights), output=spec.output, input_size=spec.input_size)
    reference = KerasEngine(model)
    assert (reference.input_size, reference.n_features) == (spec.input_size, spec.n_features)
    exact = reference(images)
    allowed = max(MAX_PARITY_ERROR, MAX_RELATIVE_PARITY_ERROR * np.abs(exact).max())
    assert np.abs(features - exact).max() <= allowed
    assert backbone.parity <= allowed
    assert backbone.cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "vgg16"], indirect=True)  # many layers, and large weights
def test_engine_in_a_forked_worker_gives_the_same_features_in_bounded_memory(
    backbone: ExportedBackbone, images: np.ndarray, features: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", images)
    arguments = [str(backbone.flatbuffer), str(tmp_path / "images.npy"), str(tmp_path / "answer.npz")]
    subprocess.run([sys.executable, "-c", FORKED, *arguments], check=True, timeout=300)
    answer = np.load(tmp_path / "answer.npz")
    np.testing.assert_array_equal(answer["features"], features)
    # The file, XNNPACK's packed copy of its weights, and the activations of one image.
    assert answer["grown"] < 3 * backbone.flatbuffer.stat().st_size + 64 * 1024**2


def test_onnx_runtime_gives_the_same_features(
    backbone: ExportedBackbone, images: np.ndarray, features: np.ndarray
) -> None:
    spec = backbone.spec
    engine = TranslatedEngine(backbone.flatbuffer.read_bytes(), spec.input_size, spec.n_features)
    allowed = max(MAX_PARITY_ERROR, MAX_RELATIVE_PARITY_ERROR * float(np.abs(features).max()))
    np.testing.assert_allclose(engine(images), features, rtol=0, atol=allowed)
    with pytest.raises(ModelError, match="expected uint8 images of size"):
        engine(images.astype(np.float32))


def test_manifest_records_the_whole_preprocessing(backbone: ExportedBackbone) -> None:
    spec, scaling = backbone.spec, backbone.spec.preprocessing
    entry = BackboneEntry.of(backbone, resize="crop")
    assert BackboneEntry.model_validate_json(entry.model_dump_json()) == entry
    assert (entry.name, entry.weights, entry.resize) == (spec.name, CASES[spec.name].weights, "crop")
    assert (entry.input_size, entry.output, entry.n_features) == (spec.input_size, spec.output, spec.n_features)
    assert (entry.scale, entry.offset) == (scaling.scale, scaling.offset)
    assert (entry.channel_order, entry.channel_means) == (scaling.channel_order, scaling.channel_means)
    assert (entry.precision, entry.parity) == ("float32", backbone.parity)


def test_pooled_features_are_the_mean_of_the_flat_ones() -> None:
    size = (64, 96)
    images = comparison_images(size)
    pooled = KerasEngine(build("vgg16", "random", output="pooled", input_size=size))(images)
    flat = KerasEngine(build("vgg16", "random", output="flat", input_size=size))(images)
    np.testing.assert_allclose(flat.reshape(len(images), 2 * 3, 512).mean(axis=1), pooled, rtol=1e-4, atol=1e-5)


def test_weights_are_loaded_from_arrays_in_keras_order(tmp_path: Path) -> None:
    spec = BACKBONES["cnn_color"]
    body = build_body(spec, "random")
    weights = body.get_weights()
    np.savez(tmp_path / "mine.npz", *weights)
    for got, expected in zip(build_body(spec, str(tmp_path / "mine.npz")).get_weights(), weights, strict=True):
        np.testing.assert_array_equal(got, expected)
    np.savez(tmp_path / "short.npz", *weights[:-1])
    (tmp_path / "noise.npz").write_bytes(b"no weights")
    np.savez(tmp_path / "objects.npz", np.array([{}], object))
    for name in ("short", "noise", "objects"):
        with pytest.raises(ModelError, match=rf"{name}\.npz do not fit cnn_color"):
            build_body(spec, str(tmp_path / f"{name}.npz"))


def test_export_is_reused_for_the_same_arguments(backbone: ExportedBackbone, exports: Path) -> None:
    before = backbone.flatbuffer.stat().st_mtime_ns
    assert export(backbone.spec.name, exports) == backbone
    assert backbone.flatbuffer.stat().st_mtime_ns == before
