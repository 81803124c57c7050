"""Checkpoints: the state of a training after its last epoch, in one file that is replaced atomically."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.arrays import Arrays, read_npz, write_npz
from models.errors import ModelError
from streaming.distributed.callback_state import CallbackState
from streaming.distributed.history import History
from streaming.distributed.training_run import State
from streaming.errors import DamagedError, NotFoundError
from streaming.storage.atomic_file import replacement

FILE = "checkpoint.npz"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint.

    Attributes:
        state: weights and optimizer state.
        settings: the settings that must not change.
        learning_rate: learning rate after the callbacks of the last epoch; None in a checkpoint of an earlier release.
        callbacks: the result of `callback_states`; None in a checkpoint of an earlier release.
    """

    state: State
    history: History
    settings: dict[str, Any]
    learning_rate: float | None = None
    callbacks: list[CallbackState] | None = None

    def write(self, directory: Path) -> None:
        """Replace the directory's checkpoint atomically."""
        numbers, arrays = _split_arrays(self.callbacks or [])
        record = {
            "epoch": self.state.epoch,
            "history": self.history.as_record(),
            "settings": self.settings,
            "learning_rate": self.learning_rate,
            "callbacks": numbers,
        }
        text = np.frombuffer(json.dumps(record).encode(), np.uint8)
        arrays |= {"weights": self.state.weights, "optimizer": self.state.optimizer, "record": text}
        with replacement(directory / FILE) as unfinished:
            unfinished.write_bytes(write_npz(arrays))


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the checkpoint of a directory, including those of earlier releases.

    Raises:
        ServiceError: there is none, or it is damaged.
    """
    path = directory / FILE
    try:
        arrays = read_npz(path.read_bytes(), FILE)
        record = json.loads(arrays["record"].tobytes())
        state = State(arrays["weights"], arrays["optimizer"], int(record["epoch"]))
        history = History.from_record(record["history"])
        if "callbacks" not in record:
            return Checkpoint(state, history, dict(record["settings"]))
        states = _join_arrays(record["callbacks"], arrays)
        return Checkpoint(state, history, dict(record["settings"]), float(record["learning_rate"]), states)
    except FileNotFoundError:
        raise NotFoundError(f"there is no training to resume: {path} does not exist") from None
    except (OSError, ModelError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged ({error}): train again without resuming") from error


def _split_arrays(states: list[CallbackState]) -> tuple[list[dict[str, Any]], Arrays]:
    """Separate states into JSON values, with the number of arrays in place of lists of arrays, and the arrays by
    name."""
    arrays: Arrays = {}
    numbers = []
    for at, state in enumerate(states):
        lists = {name: value for name, value in state.items() if isinstance(value, list)}
        for name, values in lists.items():
            arrays |= {f"callback.{at}.{name}.{number}": np.asarray(value) for number, value in enumerate(values)}
        numbers.append(state | {name: {"arrays": len(values)} for name, values in lists.items()})
    return numbers, arrays


def _join_arrays(numbers: list[dict[str, Any]], arrays: Arrays) -> list[CallbackState]:
    def restored(at: int, name: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return [arrays[f"callback.{at}.{name}.{number}"] for number in range(int(value["arrays"]))]

    return [
        {name: restored(at, name, value) for name, value in dict(state).items()} for at, state in enumerate(numbers)
    ]
