"""Which topic a row came from, for good: Kafka's name of it, and how many topics had that name before.

Offsets name a message only within one topic. A topic that is deleted and made again under its name starts them over,
so the tables know each later one by its name and a number: `images`, `images~2`. Kafka allows no `~` in a name.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from streaming.errors import ServiceError
from streaming.settings import Settings

SEPARATOR = "~"
FILE = "topic.json"


@dataclass(frozen=True)
class Incarnation:
    """One topic of a name: the id that Kafka gave it, and which of that name it is, from 1."""

    id: str
    number: int = 1


def name_in_tables(topic: str, number: int) -> str:
    """What the column `topic` holds for the messages of the `number`th topic of this name."""
    return topic if number == 1 else f"{topic}{SEPARATOR}{number}"


def name_in_kafka(recorded: str) -> str:
    """The topic's name in Kafka, of what a column `topic` holds."""
    return recorded.split(SEPARATOR, maxsplit=1)[0]


def number_of(recorded: str) -> int:
    """Which topic of its name it is, of what a column `topic` holds."""
    number = recorded.partition(SEPARATOR)[2]
    return int(number) if number.isdecimal() else 1


def read_incarnation(settings: Settings) -> Incarnation | None:
    """The topic that this home's stream read last; None where nothing is remembered.

    Raises:
        ServiceError: the file is damaged.
    """
    path = _path(settings)
    try:
        return Incarnation(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ServiceError(f"{path}, which names the topic that was read, is damaged: {error}") from error


def write_incarnation(settings: Settings, incarnation: Incarnation) -> None:
    """Remember the topic; the file is there whole or not at all."""
    path = _path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"id": incarnation.id, "number": incarnation.number}), encoding="utf-8")
    scratch.replace(path)


def _path(settings: Settings) -> Path:
    return settings.checkpoints_dir / settings.topic / FILE
