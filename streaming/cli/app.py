"""The root of the `imagestream` command line: global options, and what every command shares."""

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from models.errors import ModelError
from producer.errors import PublishError
from streaming.errors import ServiceError
from streaming.extras import COMMANDS, extras_named
from streaming.json_log import JsonLines
from streaming.platform.scratch import use_scratch
from streaming.settings import Configuration, Settings, read_configuration

EXIT_FAILED = 1  # what was asked for was not done, or not all of it
EXIT_USAGE = 2  # Typer's own
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C
EXIT_CODES = {
    0: "all that was asked for is done",
    EXIT_FAILED: "it is not, or not all of it; one line on standard error says why",
    EXIT_USAGE: "no such command, option or value of an option",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C, or SIGTERM",
}

# No emoji codes: a file or a host may be called a:b:c. What goes into a pipe or file is never cut to fit a terminal.
out = Console(soft_wrap=True, emoji=False, width=None if sys.stdout.isatty() else 10_000)
err = Console(stderr=True, soft_wrap=True, emoji=False)

app = typer.Typer(
    name="imagestream",
    help="Streaming image classification: Kafka in, CNN on Spark, predictions in Delta, exactly once.\n\n"
    "Settings come from options, else from the environment, else from imagestream.toml, else they are defaults: "
    "`imagestream config show` tells.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write a machine-readable summary.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"imagestream {version('imagestream')}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    home: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Folder, or s3://, gs:// or az:// URI, of tables and models (IMAGESTREAM_HOME; .imagestream).",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings as TOML (IMAGESTREAM_CONFIG; imagestream.toml, if it is there)."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # Read by the command that asks for them: help, and `config init`, work beside a file that is wrong.
    context.obj = cache(partial(read_configuration, home, config))


def settings_of(context: typer.Context) -> Settings:
    """The settings that the root command read; scratch files go where they can be written from now on."""
    settings = configuration_of(context).settings
    with suppress(ServiceError):  # what cannot do without says so
        use_scratch(settings.work_dir)
    return settings


def configuration_of(context: typer.Context) -> Configuration:
    """They, and where each comes from."""
    read: Callable[[], Configuration] = context.obj or read_configuration  # a command called without its root
    configuration = read()
    if configuration.settings.log_format == "json" and not isinstance(err.file, JsonLines):
        err.file = cast("IO[str]", JsonLines(err.file))
    return configuration


def write_json(path: Path | None, summary: Mapping[str, Any]) -> None:
    """Write `summary` to the file that `--json` named, if it named one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=2, default=str) + "\n", encoding="utf-8")


def run(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code; a user's mistake is one line on standard error.

    `--debug` shows the traceback as well.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    names = {name for names in COMMANDS.values() for name in names}
    err.file = cast("IO[str]", None)  # standard error as it is now, whatever an earlier command set
    try:
        # Not standalone: Typer would tell a usage error in a box of several lines.
        with extras_named(next((word for word in arguments if word in names), None)):
            code = app(arguments, prog_name="imagestream", standalone_mode=False)
    except typer.TyperException as error:
        code = error.exit_code
        if error.format_message():  # a group without its command has printed its help, and says nothing more
            context = getattr(error, "ctx", None)
            hint = f" (see '{context.command_path} --help')" if context else ""
            _tell(f"{error.format_message().rstrip('.')}{hint}", arguments)
    except (ServiceError, PublishError, ModelError, OSError) as error:
        code = EXIT_FAILED
        _tell(str(error), arguments)
    sys.exit(code)


def _tell(message: str, arguments: list[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
    err.print(Text.assemble(("error:", "red"), " ", printable(" ".join(message.split()))))


def printable(text: str) -> str:
    """The text with what is no letter, sign or space replaced: names and data may hold a terminal's commands."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
