"""The service of imagestream: scores images from Kafka into Delta tables with Spark, trains models, and serves them.

In notebooks and scripts, `from streaming import predictions, quarantine, sql` gives functions that read the tables.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming.answers import predictions, quarantine, sql

DISTRIBUTION = "imagestream"  # read without an import, see `imagestream._taken`
__all__ = ["predictions", "quarantine", "sql"]


def __getattr__(name: str) -> Any:
    # Imported lazily, so that a worker that unpickles a function of a submodule imports no more than it needs.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streaming import answers

    return getattr(answers, name)
