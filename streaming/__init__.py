"""The service of imagestream on Spark: Kafka to scored rows to Delta tables, training, and all around the stream.

For notebooks and scripts, `from streaming import predictions, quarantine, sql` read its tables.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming.answers import predictions, quarantine, sql

__all__ = ["predictions", "quarantine", "sql"]


def __getattr__(name: str) -> Any:
    # Imported only when asked for: a worker that unpickles a function of a module below imports no more than it needs.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streaming import answers

    return getattr(answers, name)
