"""Small local JSON files that are replaced atomically."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Replace a file: a reader sees the old content or the new one, never a part.

    The file is not synced, so it may be lost when the machine fails; state that must survive belongs in a store.

    Args:
        path: of the file; its folder is created if necessary.
        content: anything that `json.dumps` takes.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
