"""Code shared by the peers without Spark: decoding, engines, rows, and measuring speed."""

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
    """A function from images to features with LiteRT on one thread, an image at a time, and (height, width)."""
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
    """A function from images to features with ONNX Runtime on one thread, and (height, width)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()

    def run(images: np.ndarray) -> np.ndarray:
        return np.concatenate([session.run(None, {taken.name: image[np.newaxis]})[0] for image in images])

    return run, tuple(taken.shape[1:3])


class Scoring:
    """Scores messages."""

    def __init__(self, engine: str, model: Path, head: Path) -> None:
        self._run, (self._height, self._width) = {"litert": litert, "onnxruntime": onnxruntime}[engine](model)
        with np.load(head, allow_pickle=False) as arrays:
            self._matrix, self._offset, self._classes = arrays["matrix"], arrays["offset"], arrays["classes"]

    def rows(self, values: Sequence[bytes], positions: Sequence[tuple[int, int]]) -> dict[str, list[Any]]:
        """The columns partition, offset, label, confidence and scored_at."""
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
    """The times and numbers of rows of a process' commits."""

    times: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, rows: int) -> None:
        self.times.append(time.time())
        self.rows.append(rows)


def write_speed(processes: Sequence[Commits], path: Path) -> None:
    """Write the images per second from when every process had committed once until the first one's last commit."""
    start = max(one.times[0] for one in processes)
    end = min(one.times[-1] for one in processes)
    rows = sum(n for one in processes for at, n in zip(one.times, one.rows, strict=True) if start < at <= end)
    path.write_text(json.dumps({"images_per_s": rows / (end - start), "rows": sum(sum(one.rows) for one in processes)}))
