"""Imported TensorFlow Lite, Keras and SavedModel files give the same outputs as in their framework."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import tflite_graphs

from models import import_file, import_work
from models.errors import ModelError
from models.import_file import Imported, import_network, inspect_file, split_tensor
from models.recipe import Recipe
from models.tflite_file import keep_tensor, read_tflite

IMAGES = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
SIDE = 32


def tensor_of(recipe: Recipe) -> np.ndarray:
    return np.asarray(recipe.tensor(np.stack([recipe.pixels(image.read_bytes()) for image in IMAGES])))


@pytest.mark.parametrize(
    ("change", "preset", "tolerance"),
    [
        (lambda _: None, "minus1to1", 1e-6),
        (tflite_graphs.quantised("UINT8", 1 / 255, 0), "zero_to_one", 1 / 255),
        (tflite_graphs.quantised("INT8", 1 / 128, 0), "minus1to1", 1 / 128),
        (tflite_graphs.quantised("UINT8", 1.0, 0), "raw", 1.0),
        (tflite_graphs.quantised("INT8", 0.0187, -14), "torchvision", 0.0187),
    ],
)
def test_float_and_integer_flatbuffers_are_imported(
    tmp_path: Path, change: Callable[[Any], None], preset: str, tolerance: float
) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(tflite_graphs.mean_of_channels(change))
    found = import_network(path, tmp_path, IMAGES)
    assert found.guessed["preset"].startswith(preset)
    assert found.network.recipe.dtype == "float32"
    np.testing.assert_allclose(found.scores, tensor_of(found.network.recipe).mean(axis=(1, 2)), atol=1.01 * tolerance)


def test_class_names_attached_to_a_flatbuffer_are_found(tmp_path: Path) -> None:
    attached = io.BytesIO()
    with zipfile.ZipFile(attached, "w") as archive:
        archive.writestr("labels.txt", "red\ngreen\nblue\n")
    path = tmp_path / "net.tflite"
    path.write_bytes(tflite_graphs.mean_of_channels() + attached.getvalue())
    assert import_network(path, tmp_path, IMAGES).classes == inspect_file(path).classes == "red\ngreen\nblue\n"


def test_inner_tensor_of_a_flatbuffer_becomes_its_output() -> None:
    from ai_edge_litert import schema_py_generated as schema

    def add_doubled_scores(model: Any) -> None:
        graph = model.subgraphs[0]
        graph.tensors.append(tflite_graphs.tensor(b"doubled", [1, 3], 4, schema.TensorType.FLOAT32))
        model.buffers.append(schema.BufferT())
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
        model.operatorCodes.append(code)
        add = schema.OperatorT()
        add.opcodeIndex, add.inputs, add.outputs = 1, [2, 2], [3]
        add.builtinOptionsType, add.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
        graph.operators.append(add)
        graph.outputs = [3]

    whole = tflite_graphs.mean_of_channels(add_doubled_scores)
    found = read_tflite(keep_tensor(whole, "scores"))
    assert (dict(found.operators), [one.name for one in found.outputs]) == ({"MEAN": 1}, ["scores"])
    with pytest.raises(
        ModelError, match="computes no tensor 'absent'; the last tensors that it computes are scores, doubled"
    ):
        keep_tensor(whole, "absent")


@pytest.fixture(scope="module")
def network() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    image = keras.Input((SIDE, SIDE, 3), name="image")
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="map")(image)
    x = keras.layers.BatchNormalization(name="normal")(x)
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(image, keras.layers.Dense(4, activation="softmax", name="scores")(x))


def work_here(_module: str, request: dict[str, Any], _timeout_s: float) -> Any:
    return json.loads(json.dumps(import_work._answer(request)))


@pytest.mark.parametrize(("kind", "sandboxed"), [("net.h5", False), ("net.keras:map", False), ("saved", True)])
def test_keras_files_and_saved_models_are_imported(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, sandboxed: bool
) -> None:
    """In this process, which has imported TensorFlow, except for one format."""
    import keras

    if not sandboxed:
        monkeypatch.setattr(import_file, "run_sandboxed", work_here)
        monkeypatch.setattr(import_work, "limit", lambda *_: None)  # would apply to this process
    path, _, tensor = str(tmp_path / kind).partition(":")
    if kind == "saved":
        network.export(path, verbose=False)
    else:
        network.save(path)
    file, wanted = split_tensor(f"{path}:{tensor}" if tensor else path)
    found: Imported = import_network(file, tmp_path, IMAGES, tensor=wanted, preset="minus1to1", pooled=bool(tensor))
    expected = network if not tensor else keras.Model(network.input, network.get_layer(tensor).output)
    outputs = np.asarray(expected(tensor_of(found.network.recipe)))
    np.testing.assert_allclose(found.scores, outputs.mean(axis=(1, 2)) if tensor else outputs, atol=1e-4)
    assert found.network.format == "tflite"


def test_file_name_may_contain_colons(tmp_path: Path) -> None:
    (tmp_path / "a:b.onnx").write_bytes(b"")
    (tmp_path / "net.onnx").write_bytes(b"")
    assert split_tensor(f"{tmp_path}/a:b.onnx") == (tmp_path / "a:b.onnx", None)
    assert split_tensor(f"{tmp_path}/net.onnx:out:0") == (tmp_path / "net.onnx", "out:0")
    assert split_tensor("efficientnet_lite0") == (Path("efficientnet_lite0"), None)
    with pytest.raises(ModelError, match="there is no file"):
        inspect_file(tmp_path / "absent.onnx")
