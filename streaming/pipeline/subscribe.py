"""Parses the options for the topics of a stream and for where it begins."""

import re
from datetime import datetime

from streaming.errors import UsageError
from streaming.pipeline.stream import EARLIEST, LATEST, Begin
from streaming.platform.topic import Subscription
from streaming.settings import TOPIC, Settings


def chosen_topics(
    settings: Settings, topics: str | None, pattern: str | None, name: str | None
) -> tuple[str, Subscription]:
    """The name of the stream, and its subscription.

    Args:
        settings: with the default topic.
        topics: names separated by commas; by default the settings' topic.
        pattern: a regular expression that must match whole names, instead of `topics`.
        name: of the stream; by default that of its only topic.

    Raises:
        ServiceError: the options contradict each other, or a name or pattern is not valid.
    """
    if topics and pattern:
        raise UsageError("expected --topic or --topic-pattern, got both: leave one out")
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--topic-pattern: expected a regular expression, got {pattern!r}: {error}") from error
        if name is None:
            raise UsageError("--topic-pattern: expected a name for the stream: add --stream NAME")
        return _checked(name, "--stream"), Subscription(pattern=pattern)
    names = tuple(dict.fromkeys(_checked(one.strip(), "--topic") for one in (topics or settings.topic).split(",")))
    if name is None and len(names) > 1:
        raise UsageError(f"--topic: several topics need a stream name: add --stream NAME, got {','.join(names)!r}")
    return _checked(name or names[0], "--stream"), Subscription(names)


def chosen_begin(text: str) -> Begin:
    """Parse where the first start begins.

    Raises:
        ServiceError: it is neither earliest, latest nor a time with a time zone.
    """
    if text == EARLIEST:
        return EARLIEST
    if text == LATEST:
        return LATEST
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise UsageError(f"--from: expected earliest, latest or a time such as 2026-11-16T08:00Z, got {text!r}")
    return when


def _checked(name: str, option: str) -> str:
    if not re.fullmatch(TOPIC, name):
        raise UsageError(f"{option}: expected a name of letters, digits, '.', '_' and '-', got {name[:80]!r}")
    return name
