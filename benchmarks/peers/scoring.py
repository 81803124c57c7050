"""What the peers without Spark share: decode, engine, head, rows, and how their speed is told."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def litert(model: Path) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int]]:
    """Features of a batch by LiteRT on one thread, an image at a time, which is its fastest; and (height, width)."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(model), num_threads=1)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: np.ndarray) -> np.ndarray:
        features = []
        for image in images:
            interpreter.set_tensor(taken["index"], image[np.newaxis])
            interpreter.invoke()
            features.append(interpreter.get_tensor(given["index"])[0])
        return np.stack(features)

    return run, tuple(map(int, taken["shape"][1:3]))


def onnxruntime(model: Path) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int]]:
    """Features of a batch by ONNX Runtime on one thread; and (height, width)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()

    def run(images: np.ndarray) -> np.ndarray:
        return np.concatenate([session.run(None, {taken.name: image[np.newaxis]})[0] for image in images])

    return run, tuple(taken.shape[1:3])


class Scoring:
    """Messages to prediction rows."""

    def __init__(self, engine: str, model: Path, head: Path) -> None:
        self._run, (self._height, self._width) = {"litert": litert, "onnxruntime": onnxruntime}[engine](model)
        with np.load(head, allow_pickle=False) as arrays:
            self._matrix, self._offset, self._classes = arrays["matrix"], arrays["offset"], arrays["classes"]

    def rows(self, values: Sequence[bytes], positions: Sequence[tuple[int, int]]) -> dict[str, list[Any]]:
        """Columns partition, offset, label, confidence, scored_at."""
        features = self._run(np.stack([self._decode(value) for value in values]))
        logits = features @ self._matrix + self._offset
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = odds / odds.sum(axis=1, keepdims=True)
        best = probabilities.argmax(axis=1)
        return {
            "partition": [partition for partition, _ in positions],
            "offset": [offset for _, offset in positions],
            "label": [str(self._classes[one]) for one in best],
            "confidence": [float(row[one]) for row, one in zip(probabilities, best, strict=True)],
            "scored_at": [time.time()] * len(values),
        }

    def _decode(self, value: bytes) -> np.ndarray:
        image = Image.open(BytesIO(value))
        image.draft("RGB", (self._width, self._height))
        return np.asarray(image.convert("RGB").resize((self._width, self._height), Image.Resampling.BILINEAR))


@dataclass
class Commits:
    """When a process committed how many rows."""

    times: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, rows: int) -> None:
        self.times.append(time.time())
        self.rows.append(rows)


def write_speed(processes: Sequence[Commits], path: Path) -> None:
    """Images a second from when every process had committed once until the first of them had committed its last."""
    start = max(one.times[0] for one in processes)
    end = min(one.times[-1] for one in processes)
    rows = sum(n for one in processes for at, n in zip(one.times, one.rows, strict=True) if start < at <= end)
    path.write_text(json.dumps({"images_per_s": rows / (end - start), "rows": sum(sum(one.rows) for one in processes)}))
