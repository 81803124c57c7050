"""A stream of a few batches, committed with their answers but without Spark."""

from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from streaming.pipeline.answers_topic import AnswersTopic
from streaming.pipeline.decisions import Decisions
from streaming.pipeline.finish import Tables, apply
from streaming.platform.topic import Subscription
from streaming.settings import Settings
from tests.streaming.history import begin_stream, decision_of, new_topic

BATCHES, ROWS = 4, 5  # rows of each of two partitions
BAD = {3}  # offsets that are quarantined
EXPECTED = [(partition, offset) for offset in range(BATCHES * ROWS) for partition in (0, 1) if offset not in BAD]


def begun(home: Settings, broker: Settings | None, **given: Any) -> Settings:
    """Settings of a stream that was started in an empty home; with a broker, it has a new answers topic."""
    more: dict[str, Any] = {"topic": new_topic()}
    if broker is not None:
        more |= {"answers_topic": f"answers-{uuid4().hex[:8]}", "answers": "both"}
        more |= {"bootstrap_servers": broker.bootstrap_servers}
    settings = home.model_copy(update=more | given)
    begin_stream(settings)
    return settings


def commit(settings: Settings, first: int, last: int) -> None:
    """Commit the batches `first` to `last`, with their answers if an answers topic is set."""
    with closing(AnswersTopic(settings)) as answers:
        answers.prepare(Subscription((settings.topic,)))
        for number in range(first, last + 1):
            ranges = (ROWS * (number - 1), ROWS * number)
            decision = decision_of(settings, number, {0: ranges, 1: ranges}, bad=BAD)
            decision = replace(decision, answers=answers.due, decided_at=datetime.now(UTC))
            assert Decisions(settings.place.store, settings.topic).decide(decision)
            apply(decision, Tables(settings.place.tables), fresh=True, answers=answers)
