"""Where a training stands after its last epoch, in one file that is replaced as a whole."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.arrays import Arrays, read_npz, write_npz
from models.errors import ModelError
from streaming.distributed.course import State
from streaming.distributed.history import History
from streaming.errors import ServiceError

FILE = "checkpoint.npz"


@dataclass(frozen=True)
class Checkpoint:
    """A state, how it came about, and the settings that it belongs to."""

    state: State
    history: History
    settings: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Replace the directory's checkpoint; a process that is killed meanwhile leaves the old one."""
        directory.mkdir(parents=True, exist_ok=True)
        record = {"epoch": self.state.epoch, "history": self.history.as_record(), "settings": self.settings}
        text = np.frombuffer(json.dumps(record).encode(), np.uint8)
        arrays: Arrays = {"weights": self.state.weights, "optimizer": self.state.optimizer, "record": text}
        scratch = directory / f"{FILE}.{os.getpid()}.tmp"
        scratch.write_bytes(write_npz(arrays))
        scratch.replace(directory / FILE)


def read_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint of the directory.

    Raises:
        ServiceError: there is none, or it is damaged.
    """
    path = directory / FILE
    try:
        arrays = read_npz(path.read_bytes(), FILE)
        record = json.loads(arrays["record"].tobytes())
        state = State(arrays["weights"], arrays["optimizer"], int(record["epoch"]))
        return Checkpoint(state, History.from_record(record["history"]), dict(record["settings"]))
    except FileNotFoundError:
        raise ServiceError(f"there is no training to resume: {path} does not exist") from None
    except (OSError, ModelError, ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"{path} is damaged ({error}): train again without resuming") from error
