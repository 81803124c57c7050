"""`--watch`: the same question again and again, its answer shown anew whenever it has changed."""

import io
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.live import Live
from rich.text import Text

from streaming.cli.console import out
from streaming.cli.row_formats import WRITERS, Format, Rows
from streaming.signals import until_stopped

if TYPE_CHECKING:
    import pyarrow as pa


def watch(ask: Callable[[], AbstractContextManager["pa.RecordBatchReader"]], every_s: float, format_: Format) -> int:
    """Show the answer, then each that differs from the one before, until Ctrl-C; how many were shown.

    A terminal is drawn again in place; elsewhere each answer follows the last.
    """
    shown, last = 0, None
    live = Live(console=out, auto_refresh=False) if out.is_terminal else nullcontext()
    with until_stopped(), live as screen:
        while True:
            answer = _answer(ask, format_)
            if answer != last:
                shown, last = shown + 1, answer
                if screen is None:
                    sys.stdout.write(answer)
                    sys.stdout.flush()
            if screen is not None:
                screen.update(_drawn(answer, every_s), refresh=True)
            threading.Event().wait(every_s)
    return shown


def _answer(ask: Callable[[], AbstractContextManager["pa.RecordBatchReader"]], format_: Format) -> str:
    stream = io.StringIO()
    with ask() as reader:
        WRITERS[format_](Rows.of_arrow(reader), stream)
    return stream.getvalue()


def _drawn(answer: str, every_s: float) -> Text:
    # The clock shows that it is still asked, also where the answer stays.
    footer = f"{datetime.now(UTC):%H:%M:%S} UTC, every {every_s:g} s, Ctrl-C ends"
    return Text(answer + footer, no_wrap=True, overflow="crop")
