import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from examples.cifar10_mlp.batches import SCHEMA, WIDTH, open_cifar10, write_parquet
from examples.cifar10_mlp.generated import NAMES, TRAINING_BATCHES, python2_pickle, write_cifar10
from examples.cifar10_mlp.unpickle import read_batch
from models.decode import decode
from streaming.errors import ServiceError

DATA = np.arange(2 * WIDTH, dtype=np.uint64).astype(np.uint8).reshape(2, WIDTH)
BATCH: dict[str, Any] = {"data": DATA, "labels": [3, 9], "filenames": ["a.png", "b.png"]}


@pytest.mark.parametrize("version", ["python", "binary"])
def test_both_versions_give_every_image_with_its_name_and_exact_pixels(tmp_path: Path, version: Any) -> None:
    cifar = open_cifar10(write_cifar10(tmp_path / "batches", 20, version))
    assert cifar.names == NAMES
    assert write_parquet(cifar.images(cifar.training), tmp_path / "training.parquet") == 20 * TRAINING_BATCHES
    rows = pq.read_table(tmp_path / "training.parquet")
    assert rows.schema.equals(SCHEMA)
    assert len(set(rows["name"].to_pylist())) == 20 * TRAINING_BATCHES
    first = cifar.read(cifar.training[0])
    assert rows["label"].to_pylist()[:20] == [NAMES[label] for label in first.labels]
    pixels = decode(rows["image"][7].as_py(), (32, 32))
    assert isinstance(pixels, np.ndarray)
    assert (pixels.transpose(2, 0, 1).ravel() == first.data[7]).all()


@pytest.mark.parametrize("protocol", ["python 2", 2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batch_is_read_for_every_pickle_protocol_and_array_order(tmp_path: Path, protocol: Any, order: Any) -> None:
    batch = BATCH | {"data": np.asarray(DATA, order="C" if protocol == "python 2" else order)}
    content = python2_pickle(batch) if protocol == "python 2" else pickle.dumps(batch, protocol)
    (tmp_path / "batch").write_bytes(content)
    assert (pickle.loads(content, encoding="latin1")["data"] == DATA).all()  # noqa: S301  written by this test
    found = read_batch(tmp_path / "batch", WIDTH, 10)
    assert found.data.dtype == np.uint8
    assert (found.data == DATA).all()
    assert (found.labels.tolist(), found.names) == ([3, 9], ["a.png", "b.png"])


class Call:
    """A pickle that calls a function when loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def nested_tuples(depth: int) -> bytes:
    """A dictionary whose key is a tuple that holds the next tuple twice, and so on: hashing takes 2^depth steps."""
    tuples = b"".join(b"h%ch%c\x86q%c" % (level, level, level + 1) for level in range(depth))
    return b"\x80\x02})q\x000" + tuples + b"K\x01s."


HOSTILE = {
    "shell command": pickle.dumps(Call(os.system, "true"), 2),
    "eval": pickle.dumps({"data": Call(eval, "1")}, 2),
    "NumPy function": pickle.dumps(Call(np.zeros, 10), 2),
    "object array": pickle.dumps({"data": np.array([None])}, 2),
    "extension code": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02K\x01Q.",
    "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "state of a class": b"\x80\x02cnumpy\nndarray\n}(U\x01aK\x01ub.",
    "large memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
    "nested tuples": nested_tuples(100),
    "string with a false length": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "million opcodes": b"\x80\x02" + b"}0" * 1_000_000 + b"}.",
    "list": python2_pickle([1, 2]),
    "empty": b"",
    "HTML": b"<!doctype html>",
    "half a batch": python2_pickle(BATCH)[:3000],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_invalid_or_hostile_pickle_is_rejected_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ServiceError, match="data_batch_1 is not a file of CIFAR-10's python version") as refused:
        read_batch(tmp_path / "data_batch_1", WIDTH, 10)
    assert "\n" not in str(refused.value)


INCONSISTENT = {
    "extra label": (BATCH | {"labels": [1, 2, 3]}, "expected a list labels of 2"),
    "label out of range": (BATCH | {"labels": [1, 10]}, "labels are not numbers from 0 to 9"),
    "text labels": (BATCH | {"labels": ["1", "2"]}, "labels are not numbers"),
    "no labels": ({"data": DATA}, "expected a list labels"),
    "no images": ({"labels": []}, "no array of images"),
    "narrow images": (BATCH | {"data": DATA[:, :100]}, "expected N × 3,072 u1"),
    "numeric names": (BATCH | {"filenames": [1, 2]}, "it has a value of type int where text is expected"),
}


@pytest.mark.parametrize(("batch", "message"), INCONSISTENT.values(), ids=INCONSISTENT)
def test_inconsistent_batch_is_rejected(tmp_path: Path, batch: dict[str, Any], message: str) -> None:
    (tmp_path / "batch").write_bytes(python2_pickle(batch))
    with pytest.raises(ServiceError, match=message):
        read_batch(tmp_path / "batch", WIDTH, 10)


def test_array_shorter_than_declared_is_rejected(tmp_path: Path) -> None:
    content = python2_pickle(BATCH)
    rows = b"J" + struct.pack("<i", 2) + b"J" + struct.pack("<i", WIDTH)
    assert content.count(rows) == 1
    (tmp_path / "batch").write_bytes(content.replace(rows, b"J" + struct.pack("<i", 90_000) + rows[5:]))
    with pytest.raises(ServiceError, match="its data has another size than 90,000 × 3,072 bytes"):
        read_batch(tmp_path / "batch", WIDTH, 10)


def test_folder_without_cifar10_is_rejected_with_the_download_address(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"expected data_batch_1 … .*cs\.toronto\.edu"):
        open_cifar10(tmp_path)
    folder = write_cifar10(tmp_path / "binary", 10, "binary")
    with (folder / "test_batch.bin").open("ab") as file:
        file.write(b"\0")
    cifar = open_cifar10(folder)
    with pytest.raises(ServiceError, match="expected a multiple of 3,073"):
        cifar.read(cifar.test[0])
    (folder / "batches.meta.txt").write_text("../../up\n" * 10)
    with pytest.raises(ServiceError, match="expected the names of 10 classes"):
        open_cifar10(folder)
