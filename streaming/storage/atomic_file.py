"""Local files that are replaced atomically: a reader sees the old content or the new one, never a part.

They are not synced, so they may be lost when the machine fails; state that must survive belongs in a store.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A path next to `path` for the new content, which replaces `path` at the end of the block.

    The folder is created if necessary; after an error, the old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Replace a file by anything that `json.dumps` takes; its folder is created if necessary.

    Raises:
        OSError: it cannot be written.
    """
    with replacement(path) as unfinished:
        unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
