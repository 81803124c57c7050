"""The root of the `imagestream` command line: global options, settings, exit codes and error output."""

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
from streaming.cli.command_line import App, Given, given_settings, setting_parameters
from streaming.cli.console import claim_stdout, err, out, printable, release_stdout, warn
from streaming.cli.output_formats import STDOUT
from streaming.errors import ServiceError, UncheckedError, UsageError
from streaming.extras import COMMANDS, extras_named
from streaming.json_log import JsonLines
from streaming.platform.scratch import use_scratch
from streaming.settings import Configuration, Settings
from streaming.signals import terminable

EXIT_FAILED = 1
EXIT_USAGE = 2  # as in Typer
EXIT_UNCHECKED = 3  # of a check, whose 1 means that it found a problem
EXIT_INTERRUPTED = 130  # as shells report Ctrl-C
STOPPED = "stopped by SIGTERM"
EXIT_CODES = {
    0: "success, including a command that runs until it is stopped with Ctrl-C or SIGTERM",
    EXIT_FAILED: "failure or partial failure, or a check that found a problem; one line on standard error says why",
    EXIT_USAGE: "wrong usage: an unknown command, option or value, conflicting options, or an invalid setting",
    EXIT_UNCHECKED: "a check (`audit`, `status`) could not be completed",
    EXIT_INTERRUPTED: "interrupted by Ctrl-C or SIGTERM before it finished",
}

NAME = "imagestream"
app = App(
    name=NAME,
    help="Classify images from Kafka with a CNN on Spark and write the predictions to Delta tables, exactly once.\n\n"
    "A setting is taken from its option, then the environment, then imagestream.toml, then its default; "
    "'imagestream config show' lists all of them. Global options and settings may precede or follow the command.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)


def _summary_chosen(file: Path | None) -> Path | None:
    if file == STDOUT:
        claim_stdout("--json -")
    return file


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_summary_chosen,
        help="File to write a JSON summary to; - for standard output.",
    ),
]
PortOption = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free port; default: the setting.")
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
    """Return the settings of this invocation, and use a writable folder for scratch files from now on."""
    settings = configuration_of(context).settings
    with suppress(ServiceError):  # reported by the commands that need scratch files
        use_scratch(settings.work_dir)
    return settings


def configuration_of(context: typer.Context) -> Configuration:
    """Return the settings together with the origin of each; print their warnings once."""
    given = given_settings(context)
    configuration = given.configuration
    if configuration.settings.log_format == "json" and not isinstance(err.file, JsonLines):
        err.file = cast("IO[str]", JsonLines(err.file))
    for text in given.new_warnings():
        warn(text)
    return configuration


def write_json(path: Path | None, summary: Mapping[str, Any]) -> None:
    """Write `summary` to `path`, the argument of `--json`; `-` is standard output, None writes nothing."""
    if path is None:
        return
    text = json.dumps(summary, indent=2, default=str) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def program() -> list[str]:
    """The words that start this program from the working directory, for commands that are printed for users to run."""
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
    """Run one command and exit with its code; an expected error is one line on standard error.

    `--debug` shows the traceback as well.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    release_stdout()
    names = {name for names in COMMANDS.values() for name in names}
    try:
        # Not standalone: Typer would show a usage error in a box of several lines.
        with terminable() as termination, extras_named(next((word for word in arguments if word in names), None)):
            try:
                code = app(arguments, prog_name=NAME, standalone_mode=False)
            except Exception:
                if termination.received is None:
                    raise
                # A library replaced the interrupt, or Spark's JVM has ended too, so that closing failed.
                code = EXIT_INTERRUPTED
                _debug(arguments)
            if code == EXIT_INTERRUPTED and termination.by_sigterm and not termination.reported:
                err.print(STOPPED, style="yellow")
    except typer.TyperException as error:
        code = error.exit_code
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context else ""
        _print_error(f"{error.format_message().rstrip('.')}{hint}", arguments)
    except (ServiceError, PublishError, ModelError, OSError) as error:
        code = _code_of(error)
        _print_error(str(error), arguments)
    sys.exit(code)


def _code_of(error: Exception) -> int:
    if isinstance(error, UsageError):
        return EXIT_USAGE
    return EXIT_UNCHECKED if isinstance(error, UncheckedError) else EXIT_FAILED


@contextmanager
def usage_errors() -> Iterator[None]:
    """Report errors of the block as wrong usage (exit code 2)."""
    try:
        yield
    except (ServiceError, PublishError, ModelError) as error:
        raise UsageError(str(error)) from error


@contextmanager
def checking() -> Iterator[None]:
    """Report errors of the block as a check that could not be completed (exit code 3), not as a problem found."""
    try:
        yield
    except UsageError:
        raise
    except (ServiceError, PublishError, ModelError, OSError) as error:
        raise UncheckedError(f"could not check: {error}") from error


def _print_error(message: str, arguments: list[str]) -> None:
    _debug(arguments)
    err.print(Text.assemble(("error:", "red"), " ", printable(" ".join(message.split()))))


def _debug(arguments: list[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
