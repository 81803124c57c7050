"""`imagestream predictions --follow`: write new predictions as JSON lines."""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from streaming.cli.console import err
from streaming.follow import Idle, follow_settings
from streaming.settings import Settings
from streaming.signals import stop_signals
from streaming.wording import counted


def follow_lines(
    settings: Settings, after: str, limit: int | None, wanted: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """Write new predictions until SIGTERM, Ctrl-C or `limit` of them; return their number and the position after them.

    Args:
        after: position after which to start: `latest`, `earliest`, or that of an earlier line.
        limit: maximum number of predictions; None for no limit.
        wanted: selects predictions by their row.
    """
    lines, position = 0, after
    with stop_signals() as stop, closing(follow_settings(settings, after)) as answers:
        for answer in answers:
            if stop.is_set():
                break
            position = answer.position
            if isinstance(answer, Idle):
                sys.stdout.flush()
                continue
            if wanted(answer.row):
                print(json.dumps({"position": position} | answer.row, ensure_ascii=False))
                lines += 1
                if lines == limit:
                    break
    sys.stdout.flush()
    err.print(f"{counted(lines, 'prediction')}; continue with --after {position}")
    return {"answers": lines, "position": position}
