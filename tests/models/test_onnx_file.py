"""Reading encoded ONNX files: their metadata, rejected files, and the subgraph that computes one tensor."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphs as graphs
import pytest
import sklearn.datasets
from onnx import TensorProto, helper, numpy_helper

from models import onnx_file
from models.errors import ModelError
from models.import_file import import_network
from models.model_file import Tensor
from models.onnx_file import extract, read_onnx
from models.onnx_session import OnnxSession

IMAGES = np.random.default_rng(1).normal(size=(3, 3, graphs.SIDE, graphs.SIDE)).astype(np.float32)


def content(model: onnx.ModelProto) -> bytes:
    encoded: bytes = model.SerializeToString()
    return encoded


def test_inputs_outputs_operators_and_metadata_are_read() -> None:
    found = read_onnx(content(graphs.classifier(softmax=True, metadata={"names": "{0: 'a'}"})))
    assert found.inputs == [Tensor("image", "float32", (0, 3, graphs.SIDE, graphs.SIDE))]
    assert found.outputs == [Tensor("scores", "float32", (0, 10))]
    assert dict(found.operators) == dict.fromkeys(
        ("Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Softmax"), 1
    )
    assert found.parameters == sum(array.size for array in graphs.weights(10).values())
    assert (found.opsets, found.producer, found.metadata) == ({"": 13}, "tests", {"names": "{0: 'a'}"})


def test_extracted_subgraph_computes_the_tensor() -> None:
    model = graphs.classifier(softmax=True)
    whole, part = (extract(content(model), tensor) for tensor in ("scores", "features"))
    onnx.checker.check_model(onnx.load_from_string(whole))
    assert {node.op_type for node in onnx.load_from_string(part).graph.node}.isdisjoint({"Gemm", "Softmax"})
    assert {one.name for one in onnx.load_from_string(part).graph.initializer} == {"kernel", "bias"}
    features = np.concatenate([OnnxSession(part).run(IMAGES[i : i + 1]) for i in range(3)])
    scores = np.concatenate([OnnxSession(whole).run(IMAGES[i : i + 1]) for i in range(3)])
    dense = graphs.weights(10)
    np.testing.assert_allclose(
        np.log(scores / scores[:, :1]),
        (logits := features @ dense["dense"] + dense["shift"]) - logits[:, :1],
        atol=1e-4,
    )
    with pytest.raises(ModelError, match="computes no tensor 'absent'; the last tensors that it computes are .*scores"):
        extract(content(model), "absent")


def test_external_weights_are_embedded(tmp_path: Path) -> None:
    model = graphs.classifier()
    path = tmp_path / "model.onnx"
    onnx.save_model(
        model, path, save_as_external_data=True, all_tensors_to_one_file=True, location="w.bin", size_threshold=0
    )
    found = read_onnx(path.read_bytes(), tmp_path)
    assert found.external == {"w.bin"}
    with pytest.raises(ModelError, match="weights are in another file, 'w.bin'"):
        read_onnx(path.read_bytes())
    alone = extract(path.read_bytes(), "scores", tmp_path)
    assert not read_onnx(alone).external
    np.testing.assert_allclose(OnnxSession(alone).run(IMAGES[:1]), graphs.logits_of(IMAGES[:1]), atol=1e-4)


def test_model_functions_are_not_custom_operators() -> None:
    body = [helper.make_node("Relu", ["x"], ["y"])]
    function = helper.make_function("mine", "Rectify", ["x"], ["y"], body, [helper.make_opsetid("", 13)])
    model = graphs.classifier(before=[helper.make_node("Rectify", ["image"], ["rectified"], domain="mine")])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    assert read_onnx(content(model)).operators["mine.Rectify"] == 1
    got = OnnxSession(extract(content(model), "scores")).run(IMAGES[:1])
    np.testing.assert_allclose(got, graphs.logits_of(np.maximum(IMAGES[:1], 0)), atol=1e-4)


def test_subgraph_of_a_node_may_read_outer_tensors() -> None:
    then = helper.make_graph(
        [helper.make_node("Neg", ["image"], ["negative"])],
        "then",
        [],
        [helper.make_tensor_value_info("negative", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    chosen = helper.make_node("If", ["yes"], ["chosen"], then_branch=then, else_branch=other)
    model = graphs.classifier(before=[chosen])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    read_onnx(content(model))
    got = OnnxSession(extract(content(model), "scores")).run(IMAGES[:1])
    np.testing.assert_allclose(got, graphs.logits_of(-IMAGES[:1]), atol=1e-4)


def test_unavailable_provider_error_lists_the_available_ones() -> None:
    with pytest.raises(ModelError, match="no execution provider 'directml', it has cpu.*onnxruntime-gpu"):
        OnnxSession(content(graphs.classifier()), providers=("directml",))
    with pytest.raises(ModelError, match="one of cpu, cuda, .*, got 'abacus'"):
        OnnxSession(content(graphs.classifier()), providers=("abacus",))


def test_truncated_file_is_parsed_or_rejected() -> None:
    whole = content(graphs.classifier())
    for end in range(0, len(whole), 7):
        try:
            read_onnx(whole[:end])
        except ModelError:
            continue


def test_number_of_nodes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MAX_NODES", 4)
    with pytest.raises(ModelError, match="5 nodes, at most 4"):
        read_onnx(content(graphs.classifier()))


@pytest.mark.parametrize(
    ("layout", "dtype", "options"),
    [
        ("nhwc", TensorProto.FLOAT, {}),
        ("nchw", TensorProto.FLOAT, {"batch": 1}),
        ("nchw", TensorProto.FLOAT, {"batch": 4}),
        ("nhwc", TensorProto.UINT8, {}),
        ("nchw", TensorProto.FLOAT16, {"softmax": True}),
        ("nchw", TensorProto.FLOAT, {"channels": 1, "opset": 7}),
        ("nchw", TensorProto.FLOAT, {"side": "side"}),
    ],
)
def test_every_layout_dtype_and_batch_size_gives_the_same_scores(
    tmp_path: Path, layout: str, dtype: int, options: dict[str, Any]
) -> None:
    path = graphs.save(graphs.classifier(layout=layout, dtype=dtype, **options), tmp_path / "net.onnx")
    images = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
    size = (graphs.SIDE, graphs.SIDE)
    preset = None if dtype == TensorProto.UINT8 else "zero_to_one"
    found = import_network(path, tmp_path, images, preset=preset, input_size=size)
    recipe = found.network.recipe
    assert (recipe.layout, recipe.dtype, recipe.n_channels) == (
        layout,
        {TensorProto.UINT8: "uint8", TensorProto.FLOAT16: "float16"}.get(dtype, "float32"),
        options.get("channels", 3),
    )
    pixels = np.stack([recipe.pixels(image.read_bytes()) for image in images])
    tensor = recipe.tensor(pixels)
    expected = graphs.logits_of(tensor if layout == "nchw" else tensor.transpose(0, 3, 1, 2))
    if options.get("softmax"):
        expected = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.scores, expected, atol=1e-4 * max(1, np.abs(expected).max()))
