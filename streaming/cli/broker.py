"""`imagestream broker`: manage the embedded broker."""

from contextlib import nullcontext
from itertools import chain
from typing import Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, settings_of, write_json
from streaming.cli.command_line import OPERATION, App
from streaming.cli.console import err, out
from streaming.signals import until_stopped

broker = App(help="The embedded broker: a real single-node Kafka on loopback.")
app.add_typer(broker, name="broker", rich_help_panel=OPERATION)


@broker.command()
def start(
    context: typer.Context,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Port to listen on; default: --broker-port, else the previous port, 9092, or a free port.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Start the broker in the background and wait until it is ready.

    Example: imagestream broker start
    """
    from streaming.platform.broker import start_broker

    settings = settings_of(context)
    state, started = start_broker(
        settings,
        settings.broker_port if port is None else port,
        on_progress=lambda done, total, text: err.print(text if done == 0 else f"{done} of {total} {text}"),
    )
    done = "started" if started else "is already running"
    out.print(f"the broker {done} at {state.address}")
    write_json(json_file, {"bootstrap_servers": state.address, "pid": state.pid, "started": started})


@broker.command()
def stop(context: typer.Context, json_file: JsonOption = None) -> None:
    """Stop the broker; its data is kept.

    Example: imagestream broker stop
    """
    from streaming.platform.broker import stop_broker

    stopped = stop_broker(settings_of(context))
    out.print("the broker is stopped" if stopped else "the broker was not running")
    write_json(json_file, {"stopped": stopped})


@broker.command()
def status(context: typer.Context, json_file: JsonOption = None) -> None:
    """Show whether and where the broker is running; the exit code is 1 if it is not.

    Example: imagestream broker status
    """
    from streaming.platform.broker import running_broker

    state = running_broker(settings_of(context))
    out.print(f"running at {state.address}, process {state.pid}" if state else "not running")
    write_json(
        json_file,
        {
            "running": state is not None,
            "bootstrap_servers": state.address if state else None,
            "pid": state.pid if state else None,
        },
    )
    if state is None:
        raise typer.Exit(EXIT_FAILED)


@broker.command()
def logs(
    context: typer.Context,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Number of lines to print.")] = 40,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines as they are written, until Ctrl-C.")
    ] = False,
) -> None:
    """Print the last lines of the broker's log.

    Example: imagestream broker logs -n 20 --follow
    """
    from streaming.platform.broker import added_lines, last_lines, log_file

    path = log_file(settings_of(context))
    with until_stopped() if follow else nullcontext():
        for line in chain(last_lines(path, lines), added_lines(path) if follow else ()):
            typer.echo(line, nl=False)
