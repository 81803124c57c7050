"""The errors of the service, by what a caller can do about them.

The command line maps the types to exit codes (`streaming.cli.app`), the gateway to HTTP status codes
(`streaming.gateway.problems`), and the stream decides by them whether to try again (`streaming.pipeline.stream`).

Another process reports an exception as text: Spark the traceback of a Python worker. Functions that run there are
wrapped by `reported`, which adds the error's kind as JSON to the traceback; `encode` writes that line and `decode`
reads it, so that no text is searched for the names of classes.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MARK = "imagestream-error: "
_MARKED = re.compile(rf"^{MARK}(\{{.*\}})\s*$", re.MULTILINE)


class ServiceError(Exception):
    """An operation that failed; the base of all errors of the service.

    Args:
        message: what was expected and what was found, in one line.
        hint: how to fix it; appended to the message.
        named: for a second base class, such as the `name` of an ImportError.

    Attributes:
        kind: the name of the type where it crosses a process boundary; a subclass inherits it unless it defines one.
        problem: the message without the hint.
        hint: empty if the message needs none.
    """

    kind: ClassVar[str] = "service"

    def __init__(self, message: str = "", *, hint: str = "", **named: Any) -> None:
        super().__init__(f"{message}: {hint}" if hint else message, **named)
        self.problem = message
        self.hint = hint


class ConfigurationError(ServiceError):
    """A setting, an option, a permission or the machine does not allow the operation: change it, then try again."""

    kind = "configuration"


class UsageError(ConfigurationError):
    """Options, arguments or settings that are invalid or contradict each other."""

    kind = "usage"


class UnavailableError(ServiceError):
    """A broker, a store or another service does not answer: the same operation may succeed later."""

    kind = "unavailable"


class StoreAwayError(UnavailableError):
    """The store does not answer, so that the outcome of a request is not known yet."""

    kind = "store-unavailable"


class DataError(ServiceError):
    """Input that is malformed, hostile, or not enough for the operation."""

    kind = "data"


class DamagedError(ServiceError):
    """What the service itself stored is damaged, or contradicts itself: restore it from a copy."""

    kind = "damaged"


class ConflictError(ServiceError):
    """Another process or stream holds or changed what the operation needs, or it already exists."""

    kind = "conflict"


class NotFoundError(ServiceError):
    """What the operation needs does not exist, or does not exist yet."""

    kind = "not-found"


class UncheckedError(ServiceError):
    """A check that could not be completed, so that its result is unknown."""

    kind = "unchecked"


KINDS: dict[str, type[ServiceError]] = {
    one.kind: one
    for one in (
        *(ServiceError, ConfigurationError, UsageError, UnavailableError, StoreAwayError),
        *(DataError, DamagedError, ConflictError, NotFoundError, UncheckedError),
    )
}


def encode(error: ServiceError) -> str:
    """One line of ASCII that `decode` finds in a text, such as Spark's traceback of an exception."""
    return MARK + json.dumps({"kind": error.kind, "message": error.problem, "hint": error.hint})


def decode(text: str) -> ServiceError | None:
    """The error that was encoded last in a text, as the type of its kind; None where there is none."""
    for found in reversed(_MARKED.findall(text)):
        try:
            content = json.loads(found)
            return KINDS[content["kind"]](str(content["message"]), hint=str(content["hint"]))
        except (ValueError, KeyError, TypeError, RecursionError):  # not one that `encode` wrote
            continue
    return None


def reported(function: Callable[[T], Iterator[R]]) -> Callable[[T], Iterator[R]]:
    """Wrap a function that Spark calls in a worker, so that `decode` finds an error's kind in the driver's text."""

    def run(given: T) -> Iterator[R]:
        try:
            yield from function(given)
        except ServiceError as error:
            error.add_note(encode(error))  # Python appends it to the traceback
            raise

    return run


def with_message(error: ServiceError, message: str) -> ServiceError:
    """An error of the same kind with another message, which may quote it."""
    return KINDS[error.kind](message)
