"""Small TensorFlow Lite files, built with the generated flatbuffer classes."""

from collections.abc import Callable
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

SIDE = 8


def quantised(dtype: str, scale: float, zero: int) -> Callable[[Any], None]:
    """A change that makes the image and the scores integers q for the values (q - zero) * scale."""

    def change(model: Any) -> None:
        for tensor in (model.subgraphs[0].tensors[0], model.subgraphs[0].tensors[2]):
            tensor.type = getattr(schema.TensorType, dtype)
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = [scale], [zero]

    return change


def mean_of_channels(change: Callable[[Any], None] = lambda _: None) -> bytes:
    """`image` (1, 8, 8, 3) → `scores` (1, 3), the mean of each channel; `change` modifies the model first."""
    model = schema.ModelT()
    model.version, model.description = 3, b"tests"
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.MEAN
    model.operatorCodes = [code]
    model.buffers = [schema.BufferT(), schema.BufferT(), schema.BufferT(), schema.BufferT()]
    model.buffers[2].data = np.frombuffer(np.array([1, 2], np.int32).tobytes(), np.uint8)
    graph = schema.SubGraphT()
    graph.tensors = [
        tensor(b"image", [1, SIDE, SIDE, 3], 1, schema.TensorType.FLOAT32),
        tensor(b"axes", [2], 2, schema.TensorType.INT32),
        tensor(b"scores", [1, 3], 3, schema.TensorType.FLOAT32),
    ]
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 1], [2]
    operator.builtinOptionsType = schema.BuiltinOptions.ReducerOptions
    operator.builtinOptions = schema.ReducerOptionsT()
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [2]
    model.subgraphs = [graph]
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def tensor(name: bytes, shape: list[int], buffer: int, kind: int) -> Any:
    new = schema.TensorT()
    new.name, new.shape, new.buffer, new.type = name, shape, buffer, kind
    return new
