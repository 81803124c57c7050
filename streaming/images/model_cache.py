"""The model that a Python worker process keeps between tasks of a job."""

from collections.abc import Callable
from typing import Any

_cached: dict[str, Any] = {}


def cached_model(kind: str, sha256: str, load: Callable[[], Any]) -> Any:
    """Return the cached model, or load and cache it; at most one model is kept, so that memory does not grow.

    Args:
        kind: what is loaded, such as `engine`: one file may be loaded in several ways.
    """
    key = f"{kind} {sha256}"
    if key not in _cached:
        _cached.clear()
        _cached[key] = load()
    return _cached[key]
