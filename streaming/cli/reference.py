"""Generates the reference manual: `python -m streaming.cli.reference > docs/reference.md`.

Commands and options are read from the command line, settings and tables from their definitions.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from typer.main import get_command

from streaming.cli.app import EXIT_CODES, app
from streaming.settings import Settings, option_of, variable_of
from streaming.storage.tables import SCHEMAS

HEAD = """# Reference

Generated from the code by `python -m streaming.cli.reference > docs/reference.md`. The [how-to guides](how-to.md)
explain when to use what. In a clone, `source .venv/bin/activate` puts `imagestream` on the `PATH`.
"""
PRECEDENCE = """
Every setting is an option of every command (before or after its name), an environment variable, and a key of the
configuration file. The option takes precedence over the environment, the environment over the configuration file, and
the file over the default. The configuration file is the one given by `--config` or `IMAGESTREAM_CONFIG`, else
`imagestream.toml` in the working directory. `imagestream config show` lists each value and its origin, `imagestream
config init` writes a file with every setting. A relative path in the file is resolved against the file's folder. An
unknown key in the file is an error; an unknown variable `IMAGESTREAM_…` is reported with the nearest name. A secret is
never a value: its setting names the file that contains it. Times are written as `10s`, `15m`, `24h` or `7d`.
"""
SHELL = """
Results go to standard output; progress, notes, warnings and errors go to standard error. Progress bars are shown on a
terminal only; colours are omitted if the output is not a terminal or `NO_COLOR` is set. Every command that lists rows
takes `--format table|csv|json|ndjson|parquet` and `--output FILE`; a table shows 50 rows on a terminal and all rows in
a pipe or file. `--json FILE` writes a machine-readable summary, to standard output if the file is `-`. `--debug` shows
the traceback of an error. `imagestream --install-completion` installs completion for bash, zsh, fish or PowerShell.
[Conventions](conventions.md) has a table of all commands.
"""
COLUMNS = {
    "damaged": "the file is truncated or has bytes around the image; null in rows of earlier releases",
    "traceparent": "W3C trace context of the message; null if it has none and in rows of earlier releases",
}


def reference() -> str:
    """Return the reference manual as Markdown."""
    return "\n".join([HEAD, *_exit_codes(), *_settings(), *_commands(), *_tables()]) + "\n"


def _exit_codes() -> Iterator[str]:
    yield "## In the shell"
    yield SHELL
    yield from _table("exit code", "meaning", rows=[(str(code), meaning) for code, meaning in EXIT_CODES.items()])


def _settings() -> Iterator[str]:
    yield "\n## Settings"
    yield PRECEDENCE
    rows = [
        (f"`{name}`", f"`{option_of(name)}`", f"`{variable_of(name)}`", _code(field.default), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    yield from _table("setting", "option", "variable", "default", "meaning", rows=rows)


def _commands() -> Iterator[str]:
    yield "\n## Commands"
    yield from _command("imagestream", get_command(app))


def _command(path: str, command: Any) -> Iterator[str]:
    if command.hidden:
        return
    members = getattr(command, "commands", {})
    yield f"\n### `{path}`\n"
    yield from _text(command.help or "")
    hidden = {"help", *(Settings.model_fields if path == "imagestream" else ())}
    options = [param for param in command.params if not getattr(param, "hidden", False) and param.name not in hidden]
    if options:
        yield ""
        yield from _table("option", "default", "meaning", rows=map(_option, options))
    if getattr(command, "settings", ()):
        yield f"\nSettings: {', '.join(f'`{option_of(name)}`' for name in command.settings)}."
    if getattr(command, "deprecated_options", ()):
        old = (f"`{one.name}` for `{one.new.replace('{}', 'VALUE')}`" for one in command.deprecated_options)
        yield f"\nDeprecated spellings, which work with a warning for one release: {', '.join(old)}."
    for name in sorted(members):
        yield from _command(f"{path} {name}", members[name])


def _text(help_: str) -> Iterator[str]:
    """Yield the lines of a help text, with examples as code blocks."""
    for line in inspect.cleandoc(help_).replace("\f", "").splitlines():
        example = line.removeprefix("Example: ")
        if example == line:
            yield line
            continue
        yield "```shell"
        # Parentheses after an example are a comment.
        yield from (re.sub(r" \(([^)\"]*)\)$", r"  # \1", one.strip()) for one in example.split(", or: "))
        yield "```"


def _option(param: Any) -> tuple[str, str, str]:
    names = [*param.opts, *param.secondary_opts]
    if param.param_type_name == "argument":
        names = [param.metavar or param.name.upper()]
    takes = "" if param.param_type_name == "argument" or getattr(param, "is_flag", False) else f" {_value(param)}"
    default = "" if param.default is None or callable(param.default) else _code(param.default)
    required = "required" if param.required else default
    return ", ".join(f"`{name}{takes}`" for name in names), required, param.help or ""


def _value(param: Any) -> str:
    """Return the placeholder of an option's value: its metavar, its choices, or its type."""
    if param.metavar:
        return str(param.metavar)
    annotation = param.type_descriptor.annotation
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(str(member.value) for member in annotation)
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return getattr(annotation, "__name__", "value").upper()


def _tables() -> Iterator[str]:
    yield "\n## Tables\n"
    yield "Delta tables in `HOME/tables/`, written without deletion vectors so that every Delta reader supports them."
    for name, (schema, partition_by) in sorted(SCHEMAS.items()):
        yield f"\n### `{name}`\n"
        rows = [
            (
                f"`{field.name}`",
                f"`{field.type}`",
                "partition column" if field.name == partition_by else COLUMNS.get(field.name, ""),
            )
            for field in schema
        ]
        yield from _table("column", "type", "", rows=rows)


def _code(value: Any) -> str:
    if value is None or value is False or value == []:
        return ""
    if value is True:
        return "on"
    return f"`{value}`"


def _table(*heads: str, rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


if __name__ == "__main__":
    from streaming.cli import commands  # noqa: F401  registers every command

    sys.stdout.write(reference())
