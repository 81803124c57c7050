"""The root of the `imagestream` command line: global options, and what every command shares."""

import inspect
import json
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer
from rich.text import Text

from models.errors import ModelError
from producer.errors import PublishError
from streaming.cli.command_line import App, Given, given_of, setting_parameters
from streaming.cli.console import claim_stdout, err, out, printable, release_stdout, warn
from streaming.cli.row_formats import STDOUT
from streaming.errors import ServiceError, UncheckedError, UsageError
from streaming.extras import COMMANDS, extras_named
from streaming.json_log import JsonLines
from streaming.platform.scratch import use_scratch
from streaming.settings import Configuration, Settings
from streaming.signals import terminable

EXIT_FAILED = 1  # what was asked for was not done, or not all of it
EXIT_USAGE = 2  # Typer's own
EXIT_UNCHECKED = 3  # of a check, where 1 means that it found something bad
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C
EXIT_CODES = {
    0: "all that was asked for is done, also of what runs until it is stopped with Ctrl-C or SIGTERM",
    EXIT_FAILED: "it is not, or not all of it, or a check found something bad; one line on standard error says why",
    EXIT_USAGE: "wrong usage: no such command, option or value, options that contradict each other, a wrong setting",
    EXIT_UNCHECKED: "a check (`audit`, `status`) could not be made",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C or SIGTERM before it was done",
}

NAME = "imagestream"
app = App(
    name=NAME,
    help="Streaming image classification: Kafka in, CNN on Spark, predictions in Delta, exactly once.\n\n"
    "A setting comes from its option, else from the environment, else from imagestream.toml, else it is the default: "
    "'imagestream config show' shows each. Global options and settings may be given before or after the command.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)


def _summary_chosen(file: Path | None) -> Path | None:
    if file == STDOUT:
        claim_stdout("--json -")
    return file


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", callback=_summary_chosen, help="Write a summary as JSON; - is standard output."
    ),
]
PortOption = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one; default: as the setting says."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"imagestream {version('imagestream')}")
        raise typer.Exit


def root(context: typer.Context, **given: Any) -> None:
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("debug", "version"):
        given.pop(name, None)
    context.obj = Given(given)


def _root_parameters() -> Iterator[inspect.Parameter]:
    yield inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    version = Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ]
    for name, kind in (("debug", debug), ("version", version)):
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
    yield from setting_parameters()


root.__signature__ = inspect.Signature([*_root_parameters()])  # type: ignore[attr-defined]  # what Typer reads
app.callback()(root)


def settings_of(context: typer.Context) -> Settings:
    """The settings that the root command read; scratch files go where they can be written from now on."""
    settings = configuration_of(context).settings
    with suppress(ServiceError):  # what cannot do without says so
        use_scratch(settings.work_dir)
    return settings


def configuration_of(context: typer.Context) -> Configuration:
    """They, and where each comes from."""
    given = given_of(context)
    configuration = given.configuration
    if configuration.settings.log_format == "json" and not isinstance(err.file, JsonLines):
        err.file = cast("IO[str]", JsonLines(err.file))
    for text in given.untold():
        warn(text)
    return configuration


def write_json(path: Path | None, summary: Mapping[str, Any]) -> None:
    """Write `summary` to the file that `--json` named, or to standard output, if it named any."""
    if path is None:
        return
    text = json.dumps(summary, indent=2, default=str) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def program() -> list[str]:
    """The words that start this program from the working directory, for commands that are printed to be typed."""
    started = Path(sys.argv[0])
    if started.name != NAME:  # python -m imagestream
        started = Path(sys.executable).with_name(NAME)
    if not started.is_file():
        return [sys.executable, "-m", NAME]
    on_path = shutil.which(NAME)
    if on_path is not None and started.samefile(on_path):
        return [NAME]
    with suppress(ValueError):
        started = started.absolute().relative_to(Path.cwd())
    return [str(started) if started.name != str(started) else f"./{started}"]


def run(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code; a user's mistake is one line on standard error.

    `--debug` shows the traceback as well.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    release_stdout()
    names = {name for names in COMMANDS.values() for name in names}
    try:
        # Not standalone: Typer would show a usage error in a box of several lines.
        with terminable(), extras_named(next((word for word in arguments if word in names), None)):
            code = app(arguments, prog_name=NAME, standalone_mode=False)
    except typer.TyperException as error:
        code = error.exit_code
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context else ""
        _tell(f"{error.format_message().rstrip('.')}{hint}", arguments)
    except (ServiceError, PublishError, ModelError, OSError) as error:
        code = _code_of(error)
        _tell(str(error), arguments)
    sys.exit(code)


def _code_of(error: Exception) -> int:
    if isinstance(error, UsageError):
        return EXIT_USAGE
    return EXIT_UNCHECKED if isinstance(error, UncheckedError) else EXIT_FAILED


@contextmanager
def wrong_usage() -> Iterator[None]:
    """What the block refuses is wrong in the command itself."""
    try:
        yield
    except (ServiceError, PublishError, ModelError) as error:
        raise UsageError(str(error)) from error


@contextmanager
def checking() -> Iterator[None]:
    """What fails in the block keeps a check from being made, which is not the same as a check that found something."""
    try:
        yield
    except UsageError:
        raise
    except (ServiceError, PublishError, ModelError, OSError) as error:
        raise UncheckedError(f"could not check: {error}") from error


def _tell(message: str, arguments: list[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
    err.print(Text.assemble(("error:", "red"), " ", printable(" ".join(message.split()))))
