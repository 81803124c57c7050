"""Pins: what a micro-batch is bound to, written durably beside the checkpoint before anything is scored."""

import json
import os
from dataclasses import asdict, dataclass
from datetime import date, datetime
from pathlib import Path

from streaming.errors import ServiceError


@dataclass(frozen=True)
class OffsetRange:
    """The messages of one topic partition in one micro-batch: from `start` to just before `end`."""

    topic: str
    partition: int
    start: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PinnedModel:
    """A model version, by its number and by the SHA-256 of its bundle."""

    version: int
    sha256: str


@dataclass(frozen=True)
class Pin:
    """What a micro-batch is bound to; a retry finds it and scores with the same models."""

    query_id: str
    batch_id: int
    model: PinnedModel
    challenger: PinnedModel | None
    offsets: list[OffsetRange]
    left_out: list[OffsetRange]  # lost before these were read, and accepted as lost
    pinned_at: str

    @property
    def input_rows(self) -> int:
        return sum(one.rows for one in self.offsets)

    @property
    def date(self) -> date:
        """The partition of the predictions: the day of the pin, so that a retry after midnight agrees."""
        return datetime.fromisoformat(self.pinned_at).date()


class Pins:
    """The pins of one stream, a file each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, query_id: str, batch_id: int) -> Pin | None:
        """The pin of a batch; None if there is none, or only one of another query, whose checkpoint was lost.

        Raises:
            ServiceError: the file is damaged.
        """
        path = self._path(batch_id)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["model"] = PinnedModel(**content["model"])
            content["challenger"] = PinnedModel(**content["challenger"]) if content["challenger"] else None
            for name in ("offsets", "left_out"):
                content[name] = [OffsetRange(**one) for one in content.get(name, [])]
            pin = Pin(**content)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ServiceError(f"the pin {path} is damaged: {error}") from error
        return pin if (pin.query_id, pin.batch_id) == (query_id, batch_id) else None

    def write(self, pin: Pin) -> None:
        """Write a pin so that after a crash of process or machine it is there whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(pin.batch_id)
        scratch = path.with_suffix(".tmp")
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(asdict(pin), file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _path(self, batch_id: int) -> Path:
        return self.directory / f"{batch_id}.json"
