"""`--watch`: repeats a query and shows its result whenever it changes."""

import io
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.live import Live
from rich.text import Text

from streaming.cli.console import out
from streaming.cli.output_formats import WRITERS, Format, Rows
from streaming.signals import until_stopped

if TYPE_CHECKING:
    import pyarrow as pa


def watch(ask: Callable[[], AbstractContextManager["pa.RecordBatchReader"]], every_s: float, format_: Format) -> int:
    """Show the result, then each result that differs from the previous one, until Ctrl-C; return the number shown.

    A terminal is redrawn in place; elsewhere the results are written one after another.
    """
    shown, last = 0, None
    live = Live(console=out, auto_refresh=False) if out.is_terminal else nullcontext()
    with until_stopped() as stop, live as screen:
        while True:
            answer = _answer(ask, format_)
            if answer != last:
                shown, last = shown + 1, answer
                if screen is None:
                    sys.stdout.write(answer)
                    sys.stdout.flush()
            if screen is not None:
                screen.update(_drawn(answer, every_s), refresh=True)
            stop.wait(every_s)
    return shown


def _answer(ask: Callable[[], AbstractContextManager["pa.RecordBatchReader"]], format_: Format) -> str:
    stream = io.StringIO()
    with ask() as reader:
        WRITERS[format_](Rows.of_arrow(reader), stream)
    return stream.getvalue()


def _drawn(answer: str, every_s: float) -> Text:
    # The clock shows that the query still runs although its result is unchanged.
    footer = f"{datetime.now(UTC):%H:%M:%S} UTC, every {every_s:g} s, Ctrl-C to stop"
    return Text(answer + footer, no_wrap=True, overflow="crop")
