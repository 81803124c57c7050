"""Translation of float networks from TensorFlow Lite to ONNX.

Operators of image networks are translated one by one; networks with others remain on LiteRT. TensorFlow Lite stores
maps as (N, h, w, C), ONNX's convolutions expect (N, C, h, w): each convolution is placed between two transpositions,
which ONNX Runtime's optimizer cancels. Sources: TensorFlow Lite's `schema.fbs` and reference kernels,
https://onnx.ai/onnx/operators/.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import protobuf
from models.errors import ModelError

OPSET, IR_VERSION = 13, 8
_FLOAT, _UINT8, _INT64 = 1, 2, 7
_ELEMENTS = {"float32": _FLOAT, "uint8": _UINT8, "int64": _INT64, "int32": 6}
_TO_PLANES, _TO_PIXELS = (0, 3, 1, 2), (0, 2, 3, 1)
_ACTIVATIONS = {0: None, 1: "Relu", 3: "Relu6"}
_SAME = 0

Piece = bytes | memoryview


def to_onnx(flatbuffer: bytes) -> bytes:
    """Translate a flatbuffer accepted by `models.tflite_file.read_tflite` to an ONNX file.

    Raises:
        ModelError: an operator, or one of its options, is not supported.
    """
    return _Translation(flatbuffer).translated()


class _Translation:
    """The translation of one graph; tensors are named `t` and their index."""

    def __init__(self, flatbuffer: bytes) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema = schema
        self._model = schema.Model.GetRootAs(flatbuffer, 0)
        self._graph = self._model.Subgraphs(0)
        kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
        codes = [self._model.OperatorCodes(at) for at in range(self._model.OperatorCodesLength())]
        self._kinds = [kinds.get(max(one.BuiltinCode(), one.DeprecatedBuiltinCode()), "?") for one in codes]
        self._nodes: list[Piece] = []
        self._weights: list[Piece] = []
        self._n_names = 0
        self._shapes: set[int] = set()  # tensors that contain shapes, which are all static

    def translated(self) -> bytes:
        for at in range(self._graph.OperatorsLength()):
            operator = self._graph.Operators(at)
            kind = self._kinds[operator.OpcodeIndex()]
            translate: Callable[[Any], None] | None = getattr(self, f"_{kind.lower()}", None)
            if translate is None:
                raise ModelError(f"operator {kind} has no translation to ONNX here")
            translate(operator)
        graph = [*self._nodes, *protobuf.field(2, b"network"), *self._weights]
        for number, places in ((11, self._graph.InputsAsNumpy()), (12, self._graph.OutputsAsNumpy())):
            for place in places:
                graph += protobuf.joined(number, self._value(int(place)))
        opset = protobuf.joined(8, [*protobuf.field(1, b""), *protobuf.field(2, OPSET)])
        return b"".join([*protobuf.field(1, IR_VERSION), *opset, *protobuf.joined(7, graph)])

    # Properties of tensors.

    def _shape_of(self, place: int) -> list[int]:
        tensor = self._graph.Tensors(place)
        return [tensor.Shape(at) for at in range(tensor.ShapeLength())]

    def _dtype_of(self, place: int) -> str:
        names = {value: name for name, value in vars(self._schema.TensorType).items() if not name.startswith("_")}
        return str(names[self._graph.Tensors(place).Type()]).lower()

    def _constant(self, place: int) -> NDArray[Any] | None:
        buffer = self._model.Buffers(self._graph.Tensors(place).Buffer())
        if not buffer.DataLength():
            return None
        dtype = self._dtype_of(place)
        if dtype not in _ELEMENTS:  # int8, of quantised networks
            raise ModelError(f"weights of type {dtype} have no translation to ONNX here")
        return np.frombuffer(buffer.DataAsNumpy().tobytes(), dtype).reshape(self._shape_of(place))

    def _required(self, place: int) -> NDArray[Any]:
        found = self._constant(place)
        if found is None:
            raise ModelError("weights that are computed have no translation to ONNX here")
        return found

    def _value(self, place: int) -> list[Piece]:
        dims = b"".join(b"".join(protobuf.joined(1, protobuf.field(1, n))) for n in self._shape_of(place))
        dtype = self._dtype_of(place)
        if dtype not in _ELEMENTS:
            raise ModelError(f"tensors of type {dtype} have no translation to ONNX here")
        kind = [*protobuf.field(1, _ELEMENTS[dtype]), *protobuf.joined(2, [dims])]
        return [*protobuf.field(1, _name(place)), *protobuf.joined(2, protobuf.joined(1, kind))]

    def _read(self, place: int) -> bytes:
        """The name of a tensor that a node reads; a constant is written on the way."""
        found = self._constant(place)
        return _name(place) if found is None else self._weight(found)

    # Writing nodes.

    def _new(self) -> bytes:
        self._n_names += 1
        return f"n{self._n_names}".encode()

    def _weight(self, array: NDArray[Any]) -> bytes:
        name = self._new()
        pieces: list[Piece] = []
        for side in array.shape:
            pieces += protobuf.field(1, side)
        pieces += protobuf.field(2, _ELEMENTS[array.dtype.name])
        pieces += protobuf.field(8, name)
        pieces += protobuf.field(9, np.ascontiguousarray(array).tobytes())
        self._weights += protobuf.joined(5, pieces)
        return name

    def _node(self, kind: str, inputs: Sequence[bytes], output: bytes | None = None, **attributes: Any) -> bytes:
        name = output or self._new()
        pieces: list[Piece] = []
        for one in inputs:
            pieces += protobuf.field(1, one)
        pieces += protobuf.field(2, name)
        pieces += protobuf.field(4, kind.encode())
        for key, value in attributes.items():
            pieces += protobuf.joined(5, _attribute(key, value))
        self._nodes += protobuf.joined(1, pieces)
        return name

    def _finish(self, value: bytes, activation: int, place: int) -> None:
        """The activation that is fused to an operator, and its output's name."""
        if activation not in _ACTIVATIONS:
            raise ModelError(f"the activation {activation} has no translation to ONNX here")
        kind = _ACTIVATIONS[activation]
        if kind == "Relu6":
            limits = [self._weight(np.array(limit, np.float32)) for limit in (0, 6)]
            self._node("Clip", [value, *limits], _name(place))
        else:
            self._node(kind or "Identity", [value], _name(place))

    def _options(self, operator: Any, kind: str) -> Any:
        options = getattr(self._schema, kind)()
        table = operator.BuiltinOptions()
        if table is None:
            raise ModelError(f"an operator lacks its {kind}")
        options.Init(table.Bytes, table.Pos)
        return options

    def _windowed(self, kind: str, operator: Any, options: Any, weights: Sequence[bytes], **attributes: Any) -> None:
        """A convolution or pooling, on planes."""
        planes = self._node("Transpose", [self._read(operator.Inputs(0))], perm=_TO_PLANES)
        pad = "SAME_UPPER" if options.Padding() == _SAME else "VALID"
        strides = (options.StrideH(), options.StrideW())
        result = self._node(kind, [planes, *weights], auto_pad=pad, strides=strides, **attributes)
        pixels = self._node("Transpose", [result], perm=_TO_PIXELS)
        self._finish(pixels, options.FusedActivationFunction(), operator.Outputs(0))

    # The operators.

    def _conv_2d(self, operator: Any) -> None:
        options = self._options(operator, "Conv2DOptions")
        kernel = self._required(operator.Inputs(1)).transpose(0, 3, 1, 2)
        weights = [self._weight(kernel), *self._bias(operator)]
        dilations = (options.DilationHFactor(), options.DilationWFactor())
        if kernel.shape[1] != self._shape_of(operator.Inputs(0))[3]:
            raise ModelError("grouped convolutions have no translation to ONNX here")
        self._windowed("Conv", operator, options, weights, dilations=dilations, kernel_shape=kernel.shape[2:])

    def _depthwise_conv_2d(self, operator: Any) -> None:
        options = self._options(operator, "DepthwiseConv2DOptions")
        kernel = self._required(operator.Inputs(1)).transpose(3, 0, 1, 2)
        weights = [self._weight(kernel), *self._bias(operator)]
        dilations = (options.DilationHFactor(), options.DilationWFactor())
        group = self._shape_of(operator.Inputs(0))[3]
        shape = kernel.shape[2:]
        self._windowed("Conv", operator, options, weights, dilations=dilations, kernel_shape=shape, group=group)

    def _bias(self, operator: Any) -> list[bytes]:
        has_bias = operator.InputsLength() > 2 and operator.Inputs(2) >= 0  # noqa: PLR2004
        return [self._weight(self._required(operator.Inputs(2)))] if has_bias else []

    def _max_pool_2d(self, operator: Any) -> None:
        options = self._options(operator, "Pool2DOptions")
        self._windowed("MaxPool", operator, options, [], kernel_shape=(options.FilterHeight(), options.FilterWidth()))

    def _average_pool_2d(self, operator: Any) -> None:
        options = self._options(operator, "Pool2DOptions")
        shape = (options.FilterHeight(), options.FilterWidth())
        self._windowed("AveragePool", operator, options, [], kernel_shape=shape, count_include_pad=0)

    def _fully_connected(self, operator: Any) -> None:
        options = self._options(operator, "FullyConnectedOptions")
        kernel = self._required(operator.Inputs(1))
        rows = self._reshaped(self._read(operator.Inputs(0)), [-1, kernel.shape[1]])
        product = self._node("Gemm", [rows, self._weight(kernel), *self._bias(operator)], transB=1)
        shaped = self._reshaped(product, self._shape_of(operator.Outputs(0)))
        self._finish(shaped, options.FusedActivationFunction(), operator.Outputs(0))

    def _add(self, operator: Any) -> None:
        self._arithmetic("Add", operator, "AddOptions")

    def _sub(self, operator: Any) -> None:
        self._arithmetic("Sub", operator, "SubOptions")

    def _mul(self, operator: Any) -> None:
        self._arithmetic("Mul", operator, "MulOptions")

    def _arithmetic(self, kind: str, operator: Any, options: str) -> None:
        values = self._node(kind, [self._read(operator.Inputs(0)), self._read(operator.Inputs(1))])
        self._finish(values, self._options(operator, options).FusedActivationFunction(), operator.Outputs(0))

    def _mean(self, operator: Any) -> None:
        axes = [int(axis) for axis in self._required(operator.Inputs(1)).reshape(-1)]
        keep = int(self._options(operator, "ReducerOptions").KeepDims())
        self._node("ReduceMean", [self._read(operator.Inputs(0))], _name(operator.Outputs(0)), axes=axes, keepdims=keep)

    def _pad(self, operator: Any) -> None:
        pads = self._weight(self._required(operator.Inputs(1)).T.reshape(-1).astype(np.int64))
        self._node("Pad", [self._read(operator.Inputs(0)), pads], _name(operator.Outputs(0)))

    def _concatenation(self, operator: Any) -> None:
        options = self._options(operator, "ConcatenationOptions")
        parts = [self._read(operator.Inputs(at)) for at in range(operator.InputsLength())]
        values = self._node("Concat", parts, axis=options.Axis())
        self._finish(values, options.FusedActivationFunction(), operator.Outputs(0))

    def _cast(self, operator: Any) -> None:
        to = _ELEMENTS.get(self._dtype_of(operator.Outputs(0)), 0)
        self._node("Cast", [self._read(operator.Inputs(0))], _name(operator.Outputs(0)), to=to)

    def _relu(self, operator: Any) -> None:
        self._node("Relu", [self._read(operator.Inputs(0))], _name(operator.Outputs(0)))

    def _relu6(self, operator: Any) -> None:
        self._finish(self._read(operator.Inputs(0)), 3, operator.Outputs(0))

    def _logistic(self, operator: Any) -> None:
        self._node("Sigmoid", [self._read(operator.Inputs(0))], _name(operator.Outputs(0)))

    def _softmax(self, operator: Any) -> None:
        self._node("Softmax", [self._read(operator.Inputs(0))], _name(operator.Outputs(0)), axis=-1)

    def _reverse_v2(self, operator: Any) -> None:
        (axis,) = (int(one) for one in self._required(operator.Inputs(1)).reshape(-1))
        size = self._shape_of(operator.Inputs(0))[axis]
        places = self._weight(np.arange(size - 1, -1, -1, dtype=np.int64))
        self._node("Gather", [self._read(operator.Inputs(0)), places], _name(operator.Outputs(0)), axis=axis)

    def _reshape(self, operator: Any) -> None:
        shape = self._shape_of(operator.Outputs(0))
        self._reshaped(self._read(operator.Inputs(0)), shape, _name(operator.Outputs(0)))

    def _reshaped(self, value: bytes, shape: Sequence[int], output: bytes | None = None) -> bytes:
        return self._node("Reshape", [value, self._weight(np.array(shape, np.int64))], output)

    def _shape(self, operator: Any) -> None:
        self._shapes.add(operator.Outputs(0))

    def _pack(self, operator: Any) -> None:
        if not any(operator.Inputs(at) in self._shapes for at in range(operator.InputsLength())):
            raise ModelError("operator PACK has no translation to ONNX here")
        self._shapes.add(operator.Outputs(0))

    def _strided_slice(self, operator: Any) -> None:
        if operator.Inputs(0) in self._shapes:
            self._shapes.add(operator.Outputs(0))
            return
        options = self._options(operator, "StridedSliceOptions")
        begin, end, strides = (self._required(operator.Inputs(at)).reshape(-1).tolist() for at in (1, 2, 3))
        if options.EllipsisMask() or options.NewAxisMask() or any(stride <= 0 for stride in strides):
            raise ModelError("operator STRIDED_SLICE with these options has no translation to ONNX here")
        sides = self._shape_of(operator.Inputs(0))
        for at, side in enumerate(sides[: len(begin)]):
            begin[at] = 0 if options.BeginMask() >> at & 1 else begin[at]
            end[at] = side if options.EndMask() >> at & 1 else end[at]
            if options.ShrinkAxisMask() >> at & 1:
                begin[at] %= side
                end[at] = begin[at] + 1
        limits = [self._weight(np.array(one, np.int64)) for one in (begin, end, range(len(begin)), strides)]
        cut = self._node("Slice", [self._read(operator.Inputs(0)), *limits])
        self._reshaped(cut, self._shape_of(operator.Outputs(0)), _name(operator.Outputs(0)))


def _name(place: int) -> bytes:
    return f"t{place}".encode()


def _attribute(name: str, value: Any) -> list[Piece]:
    """An AttributeProto: an integer, a string or integers."""
    pieces = protobuf.field(1, name.encode())
    if isinstance(value, str):
        return [*pieces, *protobuf.field(4, value.encode()), *protobuf.field(20, 3)]
    if isinstance(value, int):
        return [*pieces, *protobuf.field(3, value), *protobuf.field(20, 2)]
    for one in value:
        pieces += protobuf.field(8, int(one))
    return [*pieces, *protobuf.field(20, 7)]
