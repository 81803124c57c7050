"""TensorFlow Lite files: reading, validation, and extraction of the part that computes one tensor.

A flatbuffer contains offsets that its reader follows. All that the interpreter would follow are checked first, by a
reader that cannot leave the file. Source: `tensorflow/compiler/mlir/lite/schema/schema.fbs`.
"""

import io
import struct
import zipfile
from typing import Any

import numpy as np

from models.errors import ModelError
from models.model_file import Contents, Tensor

IDENTIFIER = b"TFL3"
MAX_OPERATORS = 100_000
MAX_TENSOR_BYTES = 512 * 1024**2  # of one tensor that the interpreter would allocate
MAX_LABELS_BYTES = 16 * 1024**2
_LOOPS = ("WHILE", "CALL_ONCE", "CALL")  # without them, a network terminates
_BITS = {"INT4": 4, "UINT4": 4, "INT2": 2}
_UNREADABLE = (struct.error, IndexError, ValueError, TypeError, AttributeError, OverflowError, UnicodeDecodeError)


def read_tflite(content: bytes) -> Contents:
    """Read and check a file.

    Raises:
        ModelError: not a TensorFlow Lite file, or one that is not safe to run; the message says why.
    """
    if content[4:8] != IDENTIFIER:
        raise ModelError("not a TensorFlow Lite file: it lacks the identifier TFL3")
    try:
        found = _read(content)
    except ModelError:
        raise
    except _UNREADABLE as error:
        raise ModelError(f"not a valid TensorFlow Lite file: {type(error).__name__}, {error}") from error
    found.metadata = _labels(content)
    return found


def keep_tensor(content: bytes, tensor: str) -> bytes:
    """Reduce a checked file to one output tensor and the operators that it depends on.

    Raises:
        ModelError: no operator computes the tensor.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content)
    graph = model.subgraphs[0]
    names = [_name(one.name) for one in graph.tensors]
    computed = [int(at) for operator in graph.operators for at in operator.outputs]
    if (place := next((at for at in computed if names[at] == tensor), None)) is None:
        near = ", ".join(names[at] for at in computed[-5:])
        raise ModelError(f"the file computes no tensor {tensor!r}; the last tensors that it computes are {near}")
    needed, kept = {place}, []
    for operator in reversed(graph.operators):
        if needed.intersection(map(int, operator.outputs)):
            needed.update(int(at) for at in operator.inputs)
            kept.append(operator)
    graph.operators, graph.outputs = kept[::-1], [place]
    model.signatureDefs = None
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


def _read(content: bytes) -> Contents:
    from ai_edge_litert import schema_py_generated as schema

    kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    model = schema.Model.GetRootAs(content, 0)
    found = Contents(producer=_name(model.Description()), opsets={"tflite": model.Version()})
    codes = []
    for at in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(at)
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        name = kinds.get(number, f"operator {number}")
        if name == "CUSTOM":
            custom = _name(code.CustomCode())[:100]
            raise ModelError(
                f"operator {custom!r} is a custom operator, which would run code; only built-in ones are accepted"
            )
        if name in _LOOPS:
            raise ModelError(f"operator {name} may not terminate: export the network without it")
        codes.append(name)
    if model.SubgraphsLength() != 1:
        raise ModelError(f"expected one graph, it has {model.SubgraphsLength()}")
    graph = model.Subgraphs(0)
    sizes = [_buffer_size(model.Buffers(at), len(content)) for at in range(model.BuffersLength())]
    tensors = [_tensor(graph.Tensors(at), sizes, found) for at in range(graph.TensorsLength())]
    if graph.OperatorsLength() > MAX_OPERATORS:
        raise ModelError(f"it has {graph.OperatorsLength():,} operators, at most {MAX_OPERATORS:,} are accepted")
    computed: set[int] = set()
    for at in range(graph.OperatorsLength()):
        operator = graph.Operators(at)
        found.operators[codes[operator.OpcodeIndex()]] += 1
        outputs = _places(operator.OutputsAsNumpy(), len(tensors))
        reads = _places(operator.InputsAsNumpy(), len(tensors))
        if set(outputs) & computed or set(reads) & set(outputs):
            raise ModelError("the graph cannot be computed: a tensor depends on itself")
        computed.update(outputs)
    found.tensors = {tensors[at].name for at in computed}
    found.inputs = [tensors[at] for at in _places(graph.InputsAsNumpy(), len(tensors))]
    found.outputs = [tensors[at] for at in _places(graph.OutputsAsNumpy(), len(tensors))]
    return found


def _tensor(tensor: Any, sizes: list[int], found: Contents) -> Tensor:
    """Read a tensor after checking that its shape matches its data, or a size that can be allocated."""
    name, dtype = _name(tensor.Name()), _dtype(tensor.Type())
    shape = [tensor.Shape(at) for at in range(tensor.ShapeLength())]
    bits = _BITS.get(dtype.upper(), _bytes(dtype) * 8)
    n = 1
    for side in shape:
        n *= max(1, side)
    size = -(-n * bits // 8)
    if any(side < -1 for side in shape) or size > MAX_TENSOR_BYTES:
        raise ModelError(f"tensor {name[:100]!r} claims the shape {shape[:8]}, {size:,} bytes")
    held = sizes[tensor.Buffer()]
    if held:
        found.parameters += n
        if dtype != "string" and held != size and not tensor.Sparsity():
            raise ModelError(f"tensor {name[:100]!r} claims {size:,} bytes and holds {held:,}")
    signature = [tensor.ShapeSignature(at) for at in range(tensor.ShapeSignatureLength())] or shape
    quantization, of = None, tensor.Quantization()
    if of is not None and of.ScaleLength() == 1 and of.Scale(0):
        quantization = (float(of.Scale(0)), int(of.ZeroPoint(0)) if of.ZeroPointLength() else 0)
    return Tensor(name, dtype, tuple(max(0, side) for side in signature), quantization)


def _buffer_size(buffer: Any, file_size: int) -> int:
    size = int(buffer.DataLength())
    if buffer.Offset() > 1 or buffer.Size() > 1:
        raise ModelError("its weights are stored after the flatbuffer, which is not supported")
    if size > file_size:
        raise ModelError(f"a buffer claims {size:,} bytes, the file has {file_size:,}")
    if size:
        buffer.Data(size - 1)  # raises where it would reach out of the file
    return size


def _places(numbers: Any, n: int) -> list[int]:
    """Indices of tensors, without -1, which stands for an omitted one."""
    places = [int(at) for at in np.atleast_1d(numbers)] if not isinstance(numbers, int) else []
    if any(not -1 <= at < n for at in places):
        raise ModelError(f"it refers to a tensor that does not exist: {max(places)} of {n}")
    return [at for at in places if at >= 0]


def _dtype(number: int) -> str:
    from ai_edge_litert import schema_py_generated as schema

    return next((name.lower() for name, value in vars(schema.TensorType).items() if value == number), f"type {number}")


def _bytes(dtype: str) -> int:
    sizes = {"string": 1, "bool": 1, "bfloat16": 2, "resource": 4, "variant": 4}
    try:
        return sizes.get(dtype) or np.dtype(dtype).itemsize
    except TypeError:
        return 1


def _name(raw: Any) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw or "")


def _labels(content: bytes) -> dict[str, str]:
    """The class names in a file of labels attached to the flatbuffer as TensorFlow Lite metadata."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as attached:
            entries = [one for one in attached.infolist() if one.filename.lower().endswith(".txt")]
            for one in entries:
                if "label" in one.filename.lower() and one.file_size <= MAX_LABELS_BYTES:
                    return {"labels": attached.read(one).decode("utf-8", "replace")}
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, ValueError):
        pass
    return {}
