"""TensorFlow SavedModels: validation and conversion to a flatbuffer.

A SavedModel is a program: its graph may read and write files. Its operators are therefore checked before TensorFlow
loads it, and those with side effects are rejected. Operators that save and restore variables occur in every SavedModel,
in functions that are called only for saving and loading; the converter rejects them in the network itself.
"""

from collections import Counter
from pathlib import Path

from models import protobuf
from models.errors import ModelError
from models.model_file import Contents, one_line

FILE = "saved_model.pb"
MAX_GRAPH_BYTES = 1024**3
MAX_NODES = 500_000
# Parts of the names of operators that read or write files, run Python, communicate, or block.
_REACHING_OUT = (
    "PyFunc", "ReadFile", "WriteFile", "MatchingFiles", "Reader", "Rpc", "Send", "Recv", "Dataset", "Summary", "Debug",
    "TextFile", "Print", "Save", "Restore", "Checkpoint", "Queue", "TensorArray", "ImmutableConst", "XlaCall",
    "RemoteCall", "While", "HashTable", "Lookup", "Iterator", "Audio", "Sql", "Bigtable", "Assert",
)  # fmt: skip
_OF_SAVING = frozenset({"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"})


def read_saved_model(folder: Path) -> Contents:
    """Read and check a SavedModel without TensorFlow.

    Raises:
        ModelError: not a SavedModel, or its graph has side effects.
    """
    file = folder / FILE
    if any(path.is_symlink() for path in folder.rglob("*")):
        raise ModelError("it contains a link, which could lead out of the folder")
    if file.stat().st_size > MAX_GRAPH_BYTES:
        raise ModelError(f"its graph has {file.stat().st_size:,} bytes, at most {MAX_GRAPH_BYTES:,} are accepted")
    content = memoryview(file.read_bytes())
    found = Contents(producer="tensorflow")
    graphs = list(protobuf.messages(content, 2))
    if len(graphs) != 1:
        raise ModelError(f"a SavedModel for serving has one graph, this one has {len(graphs)}")
    operators: Counter[str] = Counter()
    for graph in protobuf.messages(graphs[0], 2):
        _count(graph, 1, operators)
        for library in protobuf.messages(graph, 2):
            for function in protobuf.messages(library, 1):
                _count(function, 3, operators)
    for name in operators:
        if name not in _OF_SAVING and any(part in name for part in _REACHING_OUT):
            raise ModelError(f"operator {name[:100]!r} accesses resources outside the graph; the model is not loaded")
    _check_start(graphs[0])
    found.operators = operators
    return found


def convert_saved_model(folder: Path, tensor: str | None) -> tuple[bytes, str]:
    """Convert a checked SavedModel; returns the flatbuffer and the name of its output.

    Raises:
        ModelError: TensorFlow cannot load it, or LiteRT cannot run its operators.
    """
    import tensorflow as tf

    if tensor is not None:
        raise ModelError("the output of a SavedModel cannot be selected: export the network up to the required tensor")
    try:
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        return converter.convert(), "output"
    except Exception as error:  # of any type
        raise ModelError(f"it cannot be converted for LiteRT: {one_line(error)}") from error


def _count(holder: memoryview, field: int, operators: Counter[str]) -> None:
    for node in protobuf.messages(holder, field):
        operators[protobuf.text(node, 2)] += 1
    if operators.total() > MAX_NODES:
        raise ModelError(f"its graph has more than {MAX_NODES:,} nodes")


def _check_start(meta_graph: memoryview) -> None:
    """Raise ModelError if TensorFlow would run operators when it loads the model."""
    kinds = {}
    for graph in protobuf.messages(meta_graph, 2):
        kinds = {protobuf.text(node, 1): protobuf.text(node, 2) for node in protobuf.messages(graph, 1)}
    for entry in protobuf.messages(meta_graph, 5):
        if protobuf.text(entry, 1) != "__saved_model_init_op":
            continue
        for signature in protobuf.messages(entry, 2):
            for output in protobuf.messages(signature, 2):
                for info in protobuf.messages(output, 2):
                    name = protobuf.text(info, 1).split(":")[0]
                    if kinds.get(name) != "NoOp":
                        raise ModelError(
                            f"loading it would run {kinds.get(name, name)[:100]!r}; only a network is accepted"
                        )
