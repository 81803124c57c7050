"""How long commands end when they are interrupted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from streaming.cli.app import EXIT_INTERRUPTED, STOPPED
from streaming.cli.console import err
from streaming.errors import ServiceError
from streaming.signals import terminable


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: Spark stops, nothing half made is left behind, and no library logs it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what goes wrong comes as an exception, too
    try:
        with terminable():
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def stoppable(hint: str) -> Iterator[None]:
    """Ctrl-C or SIGTERM ends the block with a line that says how to continue."""
    try:
        with terminable() as termination:
            yield
    except (KeyboardInterrupt, ServiceError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__  # Spark cancels its jobs, and reports that on top
        if cause is None:
            raise
        err.print(f"{STOPPED if termination.received else 'interrupted'}; {hint}", style="yellow")
        termination.reported = True
        raise typer.Exit(EXIT_INTERRUPTED) from error
