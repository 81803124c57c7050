"""Interruption of long-running commands by Ctrl-C and SIGTERM."""

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
    """Make SIGTERM end the block like Ctrl-C: Spark is stopped, partial results are removed, and no library logs it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # failures are raised as exceptions, too
    try:
        with terminable():
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def stoppable(hint: str) -> Iterator[None]:
    """End the block on Ctrl-C or SIGTERM with a message that says how to continue."""
    try:
        with terminable() as termination:
            yield
    except (KeyboardInterrupt, ServiceError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__  # Spark wraps the interrupt when it cancels its jobs
        if cause is None:
            raise
        err.print(f"{STOPPED if termination.by_sigterm else 'interrupted'}; {hint}", style="yellow")
        termination.reported = True
        raise typer.Exit(EXIT_INTERRUPTED) from error
