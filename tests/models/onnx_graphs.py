"""Small classifiers as ONNX graphs, built with `onnx.helper`, and their logits computed with NumPy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 32
FILTERS = 8


def weights(n_classes: int, channels: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a convolution with stride 2 and of the output layer."""
    random = np.random.default_rng(seed)
    return {
        "kernel": random.normal(0, 0.4, (FILTERS, channels, 3, 3)).astype(np.float32),
        "bias": random.normal(0, 0.1, FILTERS).astype(np.float32),
        "dense": random.normal(0, 2.0, (FILTERS, n_classes)).astype(np.float32),
        "shift": random.normal(0, 0.2, n_classes).astype(np.float32),
    }


def classifier(
    n_classes: int = 10,
    *,
    layout: str = "nchw",
    dtype: int = TensorProto.FLOAT,
    softmax: bool = False,
    side: int | str = SIDE,
    batch: int | str = "batch",
    channels: int = 3,
    seed: int = 0,
    opset: int = 13,
    metadata: dict[str, str] | None = None,
    before: Sequence[onnx.NodeProto] = (),
) -> onnx.ModelProto:
    """The nodes `before` → convolution → ReLU → global average pooling (`features`) → dense → (softmax)."""
    shape = [batch, channels, side, side] if layout == "nchw" else [batch, side, side, channels]
    nodes = list(before)
    name = nodes[-1].output[0] if nodes else "image"
    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT))
        name = "float"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [name], ["planes"], perm=[0, 3, 1, 2]))
        name = "planes"
    last = "logits" if softmax else "scores"
    nodes += [
        helper.make_node("Conv", [name, "kernel", "bias"], ["map"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["map"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "dense", "shift"], [last]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", [last], ["scores"], axis=1))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", dtype, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, n_classes])],
        [numpy_helper.from_array(array, key) for key, array in weights(n_classes, channels, seed).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="tests")
    model.ir_version = min(model.ir_version, 8)
    if metadata:
        helper.set_model_props(model, metadata)
    return model


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def logits_of(tensor: np.ndarray, n_classes: int = 10, seed: int = 0) -> np.ndarray:
    """The logits (N, n_classes) of `classifier` for images (N, C, H, W), computed in float64 with NumPy."""
    given = weights(n_classes, tensor.shape[1], seed)
    padded = np.pad(tensor.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    planes = np.einsum("nchwij,fcij->nfhw", windows, given["kernel"]) + given["bias"][:, None, None]
    pooled = np.maximum(planes, 0).mean(axis=(2, 3))
    logits: np.ndarray = pooled @ given["dense"] + given["shift"]
    return logits
