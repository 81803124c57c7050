"""ONNX files: reading, validation, and extraction of the part that computes one tensor.

Files are untrusted. Operators, shapes, sizes and locations of weights are checked on the encoded bytes, before ONNX
Runtime reads them and before memory is allocated. Field numbers and rules are those of
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto and https://onnx.ai/onnx/repo-docs/IR.html.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from models import protobuf
from models.errors import ModelError
from models.model_file import Contents, Tensor

MAX_BYTES = 2 * 1024**3 - 1  # the limit of Protocol Buffers
MAX_NODES = 100_000  # after expanding functions
MAX_DEPTH = 8  # of nested graphs
MAX_SHOWN = 100  # characters of a name in a message
# Operators of these domains are built into ONNX Runtime; others require a library with code.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
REFUSED = {"Loop": "may not terminate", "Scan": "may not terminate"}
_FROM_FILE = 1  # TensorProto.DataLocation.EXTERNAL
# Bits of an element by TensorProto.DataType.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8,
}  # fmt: skip
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
_TYPED_DATA = (4, 5, 6, 7, 10, 11)  # the fields of TensorProto with repeated numbers


@dataclass(frozen=True)
class _Node:
    """An encoded node with the names that it reads, including those read by its subgraphs, and computes."""

    encoded: memoryview
    reads: tuple[str, ...]
    computes: tuple[str, ...]


class _Check:
    """One pass over a file."""

    def __init__(self, folder: Path | None) -> None:
        self.found = Contents()
        self.folder = folder
        self.functions: dict[tuple[str, str], list[tuple[str, str]]] = {}
        self.calls: list[tuple[str, str]] = []
        self.external_bytes = 0

    def model(self, content: memoryview) -> None:
        found = self.found
        graphs = list(protobuf.messages(content, 7))
        if len(graphs) != 1:
            raise ModelError(f"an ONNX file has one graph, this one has {len(graphs)}")
        found.producer = " ".join(filter(None, (protobuf.text(content, 2), protobuf.text(content, 3))))[:MAX_SHOWN]
        for opset in protobuf.messages(content, 8):
            found.opsets[protobuf.text(opset, 1)] = protobuf.integer(opset, 2)
        for entry in protobuf.messages(content, 14):
            found.metadata[protobuf.text(entry, 1)] = protobuf.text(entry, 2)
        bodies = {}
        for function in protobuf.messages(content, 25):
            bodies[protobuf.text(function, 10), protobuf.text(function, 1)] = function
        self.functions = {name: [] for name in bodies}
        for name, body in bodies.items():
            self.calls = self.functions[name]
            inputs = {str(one, "utf-8", "replace") for one in protobuf.messages(body, 4)}
            self._nodes(list(protobuf.messages(body, 7)), inputs, 1)
        self.calls = []
        found.operators.clear()
        found.tensors.clear()
        self._graph(graphs[0], frozenset(), 0)
        self._check_expansion()
        weights = {protobuf.text(one, 8) for one in protobuf.messages(graphs[0], 5)}
        found.inputs = [one for one in map(_value, protobuf.messages(graphs[0], 11)) if one.name not in weights]
        found.outputs = [_value(one) for one in protobuf.messages(graphs[0], 12)]

    def _graph(self, graph: memoryview, outer: frozenset[str], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ModelError(f"graphs are nested more than {MAX_DEPTH} levels deep")
        defined = set(outer)
        for number, value in protobuf.fields(graph):
            if not isinstance(value, memoryview):
                continue
            if number == 5:  # noqa: PLR2004
                self._tensor(value)
                defined.add(protobuf.text(value, 8))
            elif number == 15:  # noqa: PLR2004
                raise ModelError("it has sparse weights, which ONNX Runtime does not support: store them densely")
            elif number == 11:  # noqa: PLR2004
                defined.add(protobuf.text(value, 1))
        computed = self._nodes(list(protobuf.messages(graph, 1)), defined, depth)
        for output in protobuf.messages(graph, 12):
            if (name := protobuf.text(output, 1)) not in computed:
                raise ModelError(f"no node computes its output {name[:MAX_SHOWN]!r}")

    def _nodes(self, nodes: Sequence[memoryview], defined: set[str], depth: int) -> set[str]:
        """Check nodes, given the names defined before them; returns these and the names that they compute."""
        if len(nodes) > MAX_NODES:
            raise ModelError(f"it has {len(nodes):,} nodes, at most {MAX_NODES:,} are accepted")
        parsed = [_parse(node) for node in nodes]
        computed = {name for node in parsed for name in node.computes}
        if sum(len(node.computes) for node in parsed) > len(computed) or computed & defined - {""}:
            raise ModelError("a tensor is computed more than once")
        self.found.tensors |= computed
        for node in nodes:
            self._operator(node, frozenset(defined | computed), depth)
        in_order(parsed, defined)
        return defined | computed

    def _operator(self, node: memoryview, visible: frozenset[str], depth: int) -> None:
        domain, kind = protobuf.text(node, 7), protobuf.text(node, 4)
        name = f"{domain}.{kind}"[:MAX_SHOWN].lstrip(".")
        if (domain, kind) in self.functions:
            self.calls.append((domain, kind))
        elif domain not in DOMAINS:
            raise ModelError(
                f"operator {name!r} is a custom operator, which would run code; only ONNX's own are accepted"
            )
        elif kind in REFUSED:
            raise ModelError(f"operator {name!r} {REFUSED[kind]}: export the network without it")
        self.found.operators[name] += 1
        for attribute in protobuf.messages(node, 5):
            for number, value in protobuf.fields(attribute):
                if isinstance(value, memoryview):
                    if number in {5, 10}:
                        self._tensor(value)
                    elif number in {6, 11}:
                        self._graph(value, visible, depth + 1)
                    elif number in {22, 23}:
                        raise ModelError(f"operator {name!r} has sparse weights: store them densely")

    def _tensor(self, tensor: memoryview) -> None:
        """Check that a tensor's data matches its shape."""
        name, dims, kind = (
            protobuf.text(tensor, 8)[:MAX_SHOWN],
            protobuf.integers(tensor, 1),
            protobuf.integer(tensor, 2),
        )
        if any(n < 0 for n in dims):
            raise ModelError(f"tensor {name!r} has the shape {dims[:8]}")
        n = prod(dims)
        self.found.parameters += n
        raw = [len(one) for one in protobuf.messages(tensor, 9)]
        if protobuf.integer(tensor, 14) == _FROM_FILE:
            self._external(tensor, name, n, kind)
        elif kind in _BITS and raw and -(-n * _BITS[kind] // 8) != raw[-1]:
            raise ModelError(f"tensor {name!r} claims {n:,} elements and holds {raw[-1]:,} bytes")
        elif not raw and n > sum(
            max(1, len(value)) if isinstance(value, memoryview) else 1
            for number, value in protobuf.fields(tensor)
            if number in _TYPED_DATA
        ):
            raise ModelError(f"tensor {name!r} claims {n:,} elements and holds fewer")

    def _external(self, tensor: memoryview, name: str, n: int, kind: int) -> None:
        location, offset, length = external_place(tensor, self.folder)
        size = location.stat().st_size
        claimed = -(-n * _BITS.get(kind, 0) // 8)
        if not 0 <= offset <= offset + length <= size or length != claimed:
            raise ModelError(
                f"tensor {name!r} claims {claimed:,} bytes and names {length:,} from {offset:,} of {location.name}, "
                f"which has {size:,}"
            )
        self.external_bytes += length
        if self.external_bytes > MAX_BYTES:
            raise ModelError(f"its weights have more than the {MAX_BYTES:,} bytes that are accepted")
        self.found.external.add(location.name)

    def _check_expansion(self) -> None:
        """Check that functions are not recursive and that their expansion is bounded."""
        sizes: dict[tuple[str, str], int] = {}
        waiting = dict(self.functions)
        while waiting:
            ready = [name for name, calls in waiting.items() if all(call in sizes for call in calls)]
            if not ready:
                raise ModelError(f"function {'.'.join(next(iter(waiting)))[:MAX_SHOWN]!r} calls itself")
            for name in ready:
                sizes[name] = 1 + sum(sizes[call] for call in waiting.pop(name))
        nodes = sum(self.found.operators.values()) + sum(sizes[call] for call in self.calls)
        if nodes > MAX_NODES:
            raise ModelError(f"its functions expand to {nodes:,} nodes, at most {MAX_NODES:,} are accepted")


def read_onnx(content: bytes | memoryview, folder: Path | None = None) -> Contents:
    """Read and check a file; `folder` has the files with external weights, None allows none.

    Raises:
        ModelError: not an ONNX file, or one that is not safe to run; the message says why.
    """
    check = _Check(folder)
    check.model(memoryview(content))
    return check.found


def extract(content: bytes, tensor: str, folder: Path | None = None) -> bytes:
    """Extract the part of a checked file that computes one tensor, which becomes its only output.

    Args:
        folder: the folder of files with external weights, which are included.

    Raises:
        ModelError: no node computes the tensor, or the result exceeds the size limit.
    """
    model = memoryview(content)
    graph = next(protobuf.messages(model, 7))
    nodes, needed = _dependencies(graph, tensor)
    types = {protobuf.text(one, 1): one for number in (13, 12) for one in protobuf.messages(graph, number)}
    pieces = protobuf.field(2, protobuf.text(graph, 2).encode())
    for node in nodes:
        pieces += protobuf.field(1, node.encoded)
    for weights in protobuf.messages(graph, 5):
        if protobuf.text(weights, 8) in needed:
            pieces += protobuf.joined(5, _with_data(weights, folder))
    for taken in protobuf.messages(graph, 11):
        if protobuf.text(taken, 1) in needed:
            pieces += protobuf.field(11, taken)
    pieces += protobuf.field(12, types[tensor] if tensor in types else b"".join(protobuf.field(1, tensor.encode())))
    whole: list[bytes | memoryview] = []
    for number, value in protobuf.fields(model):
        if number in {1, 8, 25}:  # versions and functions; other fields are not needed for computation
            whole += protobuf.field(number, value)
    whole += protobuf.joined(7, pieces)
    if sum(map(len, whole)) > MAX_BYTES:
        raise ModelError(f"with its weights the file has more than the {MAX_BYTES:,} bytes that are accepted")
    return b"".join(whole)


def _dependencies(graph: memoryview, tensor: str) -> tuple[list[_Node], set[str]]:
    """The nodes that a tensor depends on, in order, and all names that they read and compute."""
    nodes = [_parse(node) for node in protobuf.messages(graph, 1)]
    if not any(tensor in node.computes for node in nodes):
        near = ", ".join([name for node in nodes for name in node.computes][-5:])
        raise ModelError(f"the file computes no tensor {tensor!r}; the last tensors that it computes are {near}")
    defined = {protobuf.text(one, 8) for one in protobuf.messages(graph, 5)}
    defined |= {protobuf.text(one, 1) for one in protobuf.messages(graph, 11)}
    needed, kept = {tensor}, []
    for node in reversed(in_order(nodes, defined)):
        if needed.intersection(node.computes):
            needed.update(node.reads)
            kept.append(node)
    return kept[::-1], needed


def external_place(tensor: memoryview, folder: Path | None) -> tuple[Path, int, int]:
    """The file in `folder` with the data of a tensor, and the offset and length of the data.

    Raises:
        ModelError: the file is missing, a link, or outside the folder.
    """
    entries = {protobuf.text(one, 1): protobuf.text(one, 2) for one in protobuf.messages(tensor, 13)}
    location = entries.get("location", "")
    shown = location[:MAX_SHOWN]
    if folder is None:
        raise ModelError(f"weights are in another file, {shown!r}; all must be in the file itself")
    if not location or location != Path(location).name or "\\" in location or "\0" in location or location == "..":
        raise ModelError(f"weights are in {shown!r}; they must be in a file next to the model")
    path = folder / location
    if path.is_symlink() or not path.is_file():
        raise ModelError(f"weights are in {shown!r}, and there is no such file next to the model")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", path.stat().st_size - offset))
    except ValueError:
        raise ModelError(f"weights are in {shown!r}, at an offset that is not a number") from None
    return path, offset, length


def in_order(nodes: Iterable[_Node], defined: Iterable[str]) -> list[_Node]:
    """Sort nodes topologically; raises ModelError if the graph is cyclic, or no node computes a name that is read."""
    known = {"", *defined}
    ordered: list[_Node] = []
    waiting = list(nodes)
    readers: dict[str, list[int]] = {}
    missing: list[int] = []
    for at, node in enumerate(waiting):
        names = {name for name in node.reads if name not in known}
        missing.append(len(names))
        for name in names:
            readers.setdefault(name, []).append(at)
    ready = [at for at, n in enumerate(missing) if not n]
    for at in ready:  # grows during iteration
        ordered.append(waiting[at])
        for name in waiting[at].computes:
            for reader in readers.pop(name, ()):
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
    if len(ordered) < len(waiting):
        computed = {name for node in waiting for name in node.computes}
        absent = sorted(readers.keys() - computed)
        what = f"no node computes {absent[0][:MAX_SHOWN]!r}" if absent else "a tensor depends on itself"
        raise ModelError(f"the graph cannot be computed: {what}")
    return ordered


def _parse(node: memoryview) -> _Node:
    reads = [str(one, "utf-8", "replace") for one in protobuf.messages(node, 1)]
    computes = tuple(name for one in protobuf.messages(node, 2) if (name := str(one, "utf-8", "replace")))
    return _Node(node, (*reads, *_read_within(node, 0)), computes)


def _read_within(node: memoryview, depth: int) -> list[str]:
    """The outer names that graphs in a node's attributes read."""
    if depth > MAX_DEPTH:
        raise ModelError(f"graphs are nested more than {MAX_DEPTH} levels deep")
    reads: list[str] = []
    for attribute in protobuf.messages(node, 5):
        for number in (6, 11):
            for graph in protobuf.messages(attribute, number):
                own = {protobuf.text(one, 8) for one in protobuf.messages(graph, 5)}
                own |= {protobuf.text(one, 1) for one in protobuf.messages(graph, 11)}
                inner: list[str] = []
                for one in protobuf.messages(graph, 1):
                    own |= {str(name, "utf-8", "replace") for name in protobuf.messages(one, 2)}
                    inner += [str(name, "utf-8", "replace") for name in protobuf.messages(one, 1)]
                    inner += _read_within(one, depth + 1)
                inner += [protobuf.text(one, 1) for one in protobuf.messages(graph, 12)]
                reads += [name for name in inner if name not in own]
    return reads


def _with_data(tensor: memoryview, folder: Path | None) -> list[bytes | memoryview]:
    """Encode a tensor with its data embedded."""
    if protobuf.integer(tensor, 14) != _FROM_FILE:
        return [tensor]
    path, offset, length = external_place(tensor, folder)
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    pieces: list[bytes | memoryview] = []
    for number, value in protobuf.fields(tensor):
        if number not in {13, 14}:
            pieces += protobuf.field(number, value)
    return [*pieces, *protobuf.field(9, data)]


def _value(info: memoryview) -> Tensor:
    """An input or output."""
    name, dtype, shape = protobuf.text(info, 1), "", None
    for kind in protobuf.messages(info, 2):
        for tensor in protobuf.messages(kind, 1):
            number = protobuf.integer(tensor, 1)
            dtype = DTYPES.get(number, f"type {number}")
            for one in protobuf.messages(tensor, 2):
                shape = tuple(max(0, protobuf.integer(dim, 1)) for dim in protobuf.messages(one, 1))
    return Tensor(name, dtype, shape)
