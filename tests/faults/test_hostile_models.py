"""Malicious model files: each is refused with a reason, within limits of memory and CPU time."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper

from models import protobuf
from models.errors import ModelError
from models.import_file import import_network, inspect_file
from streaming.training.import_model import sample_images
from tests.conftest import CHECKOUT
from tests.models import onnx_graphs as graphs
from tests.models.tflite_graphs import mean_of_channels

MAX_MEMORY_KIB = 1024**2
MAX_CPU_S = 10.0
GIB = 1024**3
# Forks a process for each file, with separate limits, so that the imports are paid once. The peak memory of a process
# includes them, and excludes that of the tests' process.
SERVER = """
import io, json, os, sys, tempfile

from models.import_work import _answer
from models.sandbox import serve_sandboxed

for request in sys.stdin:
    with tempfile.TemporaryFile() as output:
        if (process := os.fork()) == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdin = io.StringIO(request)
            serve_sandboxed(_answer)
            sys.exit()
        _, status, used = os.wait4(process, 0)
        output.seek(0)
        answer = [os.waitstatus_to_exitcode(status), output.read().decode()]
    print(json.dumps([*answer, used.ru_maxrss, used.ru_utime + used.ru_stime]), flush=True)
"""

Make = Callable[[Path], Path]


def _file(name: str, content: Callable[[], bytes]) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return make


def _onnx(change: Callable[[onnx.ModelProto], None], **options: Any) -> Make:
    def content() -> bytes:
        model = graphs.classifier(**options)
        change(model)
        encoded: bytes = model.SerializeToString()
        return encoded

    return _file("model.onnx", content)


def _before(*nodes: onnx.NodeProto, **constants: Any) -> Make:
    """Nodes before a valid network, the last of which computes its input."""

    def change(model: onnx.ModelProto) -> None:
        for name, value in constants.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    return _onnx(change, before=nodes)


def _many_nodes(folder: Path) -> Path:
    return _before(*(helper.make_node("Relu", ["image"], [f"r{at}"]) for at in range(100_001)))(folder)


def _weights(**fields: Any) -> Make:
    """The first weights with changed fields."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        for name, value in fields.items():
            if isinstance(value, list):
                del getattr(tensor, name)[:]
                getattr(tensor, name).extend(value)
            else:
                setattr(tensor, name, value)

    return _onnx(change)


def _external(location: str, offset: str = "0", length: str = "", beside: bytes | None = None, link: str = "") -> Make:
    """Weights in another file."""

    def make(folder: Path) -> Path:
        def change(model: onnx.ModelProto) -> None:
            tensor = model.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": location, "offset": offset, "length": length}.items():
                if value:
                    tensor.external_data.add(key=key, value=value)

        if beside is not None:
            (folder / location).write_bytes(beside)
        if link:
            (folder / location).symlink_to(link)
        return _onnx(change)(folder)

    return make


def _nested(depth: int) -> Make:
    def graph(level: int) -> onnx.GraphProto:
        output = [helper.make_tensor_value_info(f"out{level}", TensorProto.FLOAT, None)]
        if level == depth:
            return helper.make_graph([helper.make_node("Identity", ["image"], [f"out{level}"])], "leaf", [], output)
        branches = {"then_branch": graph(level + 1), "else_branch": graph(level + 1)} if level == depth - 1 else {
            "then_branch": graph(level + 1),
            "else_branch": helper.make_graph(
                [helper.make_node("Identity", ["image"], [f"e{level}"])], "else", [],
                [helper.make_tensor_value_info(f"e{level}", TensorProto.FLOAT, None)],
            ),
        }  # fmt: skip
        return helper.make_graph([helper.make_node("If", ["yes"], [f"out{level}"], **branches)], "nest", [], output)

    body = graph(1)
    node = helper.make_node("If", ["yes"], ["nested"], then_branch=body, else_branch=body)
    return _before(node, yes=True)


def _calling(calls: dict[str, list[str]]) -> Make:
    """Model functions that call each other."""

    def change(model: onnx.ModelProto) -> None:
        for name, called in calls.items():
            names = ["x", *(f"t{at}" for at in range(len(called) - 1)), "y"]
            nodes = [
                helper.make_node(one, [names[at]], [names[at + 1]], domain="mine" if one in calls else "")
                for at, one in enumerate(called)
            ]
            opsets = [helper.make_opsetid("", 13), helper.make_opsetid("mine", 1)]
            model.functions.append(helper.make_function("mine", name, ["x"], ["y"], nodes, opsets))
        model.opset_import.append(helper.make_opsetid("mine", 1))

    first = helper.make_node(next(iter(calls)), ["image"], ["called"], domain="mine")
    return _onnx(change, before=[first])


def _loop(kind: str) -> Make:
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", [], [])
    return _before(helper.make_node(kind, ["image"], ["looped"], body=body))


def _tflite(change: Callable[[Any], None]) -> Make:
    return _file("model.tflite", lambda: mean_of_channels(change))


def _custom(model: Any) -> None:
    model.operatorCodes[0].builtinCode = model.operatorCodes[0].deprecatedBuiltinCode = 32
    model.operatorCodes[0].customCode = b"FlexReadFile"


def _while(model: Any) -> None:
    code = model.operatorCodes[0]
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.WHILE


def _shape(tensor: int, *shape: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.subgraphs[0].tensors[tensor].shape = list(shape)

    return change


def _inputs(*tensors: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.subgraphs[0].operators[0].inputs = list(tensors)

    return change


def _layer(name: str, module: str | None = "keras.layers", **fields: Any) -> dict[str, Any]:
    return {"class_name": name, "module": module, "config": fields, "registered_name": fields.pop("registered", None)}


def _keras(*layers: Any, add: Callable[[Any], None] = lambda _: None, extra: int = 0) -> Make:
    """A Keras file with these layers."""

    def make(folder: Path) -> Path:
        weights = io.BytesIO()
        with h5py.File(weights, "w") as file:
            add(file)
        config = _layer("Sequential", "keras", layers=[_layer("InputLayer", batch_shape=[None, 8, 8, 3]), *layers])
        with zipfile.ZipFile(folder / "model.keras", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("config.json", json.dumps(config))
            archive.writestr("metadata.json", "{}")
            archive.writestr("model.weights.h5", weights.getvalue())
            if extra:
                with archive.open("assets/zeros", "w", force_zip64=True) as zeros:
                    for _ in range(extra // 2**24):
                        zeros.write(bytes(2**24))
        return folder / "model.keras"

    return make


def _chunked(file: Any) -> None:
    file.create_dataset("layers/dense/kernel", (2**34,), "f4", chunks=(2**20,), compression="gzip")


def _linked(file: Any) -> None:
    file["layers"] = h5py.ExternalLink("/etc/passwd", "/")


def _h5(folder: Path) -> Path:
    with h5py.File(folder / "model.h5", "w") as file:
        lambda_ = _layer("Lambda", None, function=["4wEAAAAAAAAA", None, None])
        file.attrs["model_config"] = json.dumps(_layer("Sequential", None, layers=[lambda_]))
    return folder / "model.h5"


def _saved(*operators: str, start: str = "NoOp", link: bool = False) -> Make:
    """A SavedModel with these operators; TensorFlow runs `start` when it is loaded."""

    def make(folder: Path) -> Path:
        def message(number: int, *pieces: bytes) -> bytes:
            return b"".join(protobuf.field(number, b"".join(pieces)))

        def node(name: str, kind: str) -> bytes:
            return message(1, message(1, name.encode()), message(2, kind.encode()))

        graph = b"".join(node(f"n{at}", kind) for at, kind in enumerate(operators)) + node("start", start)
        info = message(2, message(1, b"__saved_model_init_op"), message(2, message(1, b"start")))
        signature = message(5, message(1, b"__saved_model_init_op"), message(2, info))
        (folder / "model").mkdir()
        (folder / "model" / "saved_model.pb").write_bytes(message(2, message(2, graph), signature))
        if link:
            (folder / "model" / "variables").symlink_to("/etc")
        return folder / "model"

    return make


def _valid() -> bytes:
    encoded: bytes = graphs.classifier().SerializeToString()
    return encoded


def _cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "active"


HOSTILE: dict[str, tuple[Make, str]] = {
    "zeros": (_file("model.onnx", lambda: bytes(10**6)), "has one graph, this one has 0"),
    "noise": (_file("model.onnx", lambda: np.random.default_rng(0).bytes(10**5)), "field|protocol buffer"),
    "pickle": (_file("model.onnx", lambda: pickle.dumps(os.getcwd)), "field|protocol buffer|one graph"),
    "truncated": (_file("model.onnx", lambda: _valid()[:900]), "claims .* bytes, .* are left"),
    "a terabyte of weights": (_weights(dims=[2**38]), "claims 274,877,906,944 elements and holds 864 bytes"),
    "a shape that overflows": (_weights(dims=[2**62, 2**62]), "claims .* elements and holds"),
    "a negative shape": (_weights(dims=[-1, 3, 3, 3]), "has the shape"),
    "missing numbers": (_weights(raw_data=b"", dims=[10**9], float_data=[1.0]), "elements and holds"),
    "a custom operator": (_before(helper.make_node("Run", ["image"], ["x"], domain="evil")), "'evil.Run' is a custom"),
    "weights at a relative path": (_external("../../etc/passwd"), "must be in a file next to the model"),
    "weights at an absolute path": (_external("/etc/passwd"), "must be in a file next to the model"),
    "weights behind a link": (_external("w.bin", link="/etc/passwd"), "no such file next to the model"),
    "weights past the end": (_external("w.bin", "4", "864", beside=b"1234"), "which has 4"),
    "weights of another size": (_external("w.bin", beside=bytes(10)), "claims 864 bytes and names 10"),
    "a cycle": (_onnx(_cyclic), "depends on itself"),
    "an undefined tensor": (_before(helper.make_node("Relu", ["absent"], ["x"])), "no node computes 'absent'"),
    "a tensor computed twice": (
        _before(helper.make_node("Relu", ["image"], ["x"]), helper.make_node("Relu", ["image"], ["x"])),
        "computed more than once",
    ),
    "a loop": (_loop("Loop"), "'Loop' may not terminate"),
    "a scan": (_loop("Scan"), "'Scan' may not terminate"),
    "nested graphs": (_nested(20), "more than 8 levels deep"),
    "a billion function calls": (
        _calling({f"F{at}": [f"F{at + 1}"] * 10 if at < 9 else ["Relu"] for at in range(10)}),
        "functions expand to",
    ),
    "a function that calls itself": (_calling({"F": ["G"], "G": ["F"]}), "calls itself"),
    "100,001 nodes": (
        _many_nodes,
        "at most 100,000",
    ),
    "a constant of 40 GB": (
        _before(
            helper.make_node("ConstantOfShape", ["shape"], ["large"]),
            helper.make_node("ReduceMax", ["large"], ["one"], keepdims=0),
            helper.make_node("Add", ["image", "one"], ["sum"]),
            shape=np.array([10**10], np.int64),
        ),
        "memory|alloc|cannot run it",
    ),
    "an image of 4 GB": (
        _before(helper.make_node("Tile", ["image", "times"], ["large"]), times=np.array([1, 1, 600, 600], np.int64)),
        "memory|alloc|fails on an image",
    ),
    "NaN in the answers": (
        _before(helper.make_node("Div", ["image", "zero"], ["x"]), zero=np.float32(0)),
        "not finite",
    ),
    "another input type": (_onnx(lambda _: None, dtype=TensorProto.INT64), "is of type int64"),
    "40 channels": (_onnx(lambda _: None, channels=40), "set --layout"),
    "tflite, no identifier": (_file("model.tflite", lambda: bytes(1000)), "lacks the identifier TFL3"),
    "tflite, truncated": (_file("model.tflite", lambda: mean_of_channels()[:200]), "not a valid TensorFlow Lite file"),
    "tflite, a custom operator": (_tflite(_custom), "'FlexReadFile' is a custom operator"),
    "tflite, a loop": (_tflite(_while), "WHILE may not terminate"),
    "tflite, 100 GB": (_tflite(_shape(0, 1, 50_000, 50_000, 3)), "claims the shape"),
    "tflite, missing weights": (_tflite(_shape(1, 1000)), "claims 4,000 bytes and holds 8"),
    "tflite, an undefined tensor": (_tflite(_inputs(0, 99)), "refers to a tensor that does not exist"),
    "tflite, a cycle": (_tflite(_inputs(2, 1)), "depends on itself"),
    "keras, a Lambda": (_keras(_layer("Lambda", function="x")), "'Lambda' runs code that is in the file"),
    "keras, another module": (_keras(_layer("system", "os", args="true")), "of the module 'os'"),
    "keras, custom code": (_keras(_layer("Dense", registered="mine>Dense")), "'mine>Dense' is custom code"),
    "keras, a function": (
        _keras(_layer("Dense", activation=_layer("function", "builtins", code="x"))),
        "a custom function",
    ),
    "keras, a file reader": (_keras(_layer("StringLookup", vocabulary="/etc/passwd")), "is not one of those"),
    "keras, a bomb": (_keras(_layer("Dense"), extra=GIB), "unpacks to 1,07"),
    "keras, 64 GB of weights": (_keras(_layer("Dense"), add=_chunked), "claim 68,719,476,736 bytes and take 0"),
    "keras, a link": (_keras(_layer("Dense"), add=_linked), "is a link"),
    "h5, a Lambda": (_h5, "'Lambda' runs code that is in the file"),
    "h5, a pickle": (_file("model.h5", lambda: pickle.dumps(os.getcwd)), "neither a zip file nor HDF5"),
    "a SavedModel that reads files": (_saved("Const", "ReadFile"), "'ReadFile' accesses resources outside"),
    "a SavedModel that runs Python": (_saved("EagerPyFunc"), "'EagerPyFunc' accesses"),
    "a SavedModel that saves files when loaded": (_saved("Const", start="SaveV2"), "loading it would run 'SaveV2'"),
    "a SavedModel with a link": (_saved("Const", link=True), "contains a link"),
}


Loaded = tuple[int, str, int, float]  # exit code, output, peak memory in KiB, seconds of CPU time


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[dict[str, Any]], Loaded]]:
    """A function that answers a request in a separate process, as `models.import_work` does."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        requests, answers = server.stdin, server.stdout
        assert requests is not None
        assert answers is not None

        def answer(request: dict[str, Any]) -> Loaded:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            code, output, memory, cpu_s = json.loads(answers.readline())
            return code, output, memory, cpu_s

        yield answer


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_within_limits(
    name: str, load: Callable[[dict[str, Any]], Loaded], tmp_path: Path
) -> None:
    """For a refusal by the real command, see `test_refusal_is_one_line_that_names_the_file`."""
    make, reason = HOSTILE[name]
    request = {
        "task": "import",
        "path": str(make(tmp_path)),
        "into": str(tmp_path),
        "images": [str(image) for image in sample_images()],
        **dict.fromkeys(("tensor", "preset", "input_size"), None),
        "pooled": False,
        "changes": {},
    }
    code, output, memory, cpu_s = load(request)
    lines = output.strip().splitlines()
    assert code == 1, lines
    assert re.search(reason, lines[-1]), lines
    assert memory <= MAX_MEMORY_KIB
    assert cpu_s <= MAX_CPU_S


def test_refusal_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    make, reason = HOSTILE["a cycle"]
    with pytest.raises(ModelError, match=f"^model.onnx is refused: .*{reason}$"):
        inspect_file(make(tmp_path))
    with pytest.raises(ModelError, match="ends in .onnx, .tflite, .keras, .h5, or the folder of a SavedModel"):
        import_network(tmp_path / "model.pkl", tmp_path, [])


def test_changed_flatbuffer_bytes_raise_only_model_error(tmp_path: Path) -> None:
    from models.tflite_file import read_tflite

    valid, random = mean_of_channels(), np.random.default_rng(0)
    for _ in range(500):
        changed = bytearray(valid)
        for at in random.integers(0, len(valid), 3):
            changed[at] = random.integers(0, 256)
        try:
            read_tflite(bytes(changed))
        except ModelError:
            continue
