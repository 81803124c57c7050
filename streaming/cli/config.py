"""`imagestream config`: show the settings and their origins, or write a configuration file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from streaming.cli.app import JsonOption, app, configuration_of, write_json
from streaming.cli.command_line import START, App
from streaming.cli.console import out
from streaming.cli.output import FormatOption, OutputOption, list_rows
from streaming.cli.output_formats import Format
from streaming.config_file import DEFAULT_FILE
from streaming.errors import ConflictError
from streaming.settings import Settings, variable_of

config_app = App(name="config", help="Show the settings or write a configuration file.")
app.add_typer(config_app, rich_help_panel=START)
COLUMNS = {"setting": str, "value": str, "from": str}


@config_app.command()
def show(
    context: typer.Context,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """Show every setting, its value and the origin of the value.

    An option takes precedence over the environment, the environment over the configuration file, and the file over the
    default. Secrets are shown as the names of their files, and URLs without passwords.

    Example: imagestream config show
    """
    configuration = configuration_of(context)
    rows, summary = [], {}
    for name in Settings.model_fields:
        value = shown(getattr(configuration.settings, name))
        origin = configuration.origins.get(name, "default")
        rows.append({"setting": name, "value": None if value is None else str(value), "from": origin})
        summary[name] = {"value": value, "from": origin}
    list_rows(rows, COLUMNS, format_, output)
    write_json(json_file, summary)


@config_app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write; it must not exist.")] = DEFAULT_FILE,
) -> None:
    """Write a configuration file with every setting commented out at its default.

    Example: imagestream config init
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.writelines(lines())
    except FileExistsError as error:
        raise ConflictError(f"{file} already exists: give another name, or edit it") from error
    out.print(f"wrote {file} with every setting at its default")


def lines() -> Iterator[str]:
    """Yield the lines of a new configuration file."""
    yield "# Settings of imagestream. Options and environment variables take precedence over this file.\n"
    yield "# Relative paths are resolved against the folder of this file.\n"
    for name, field in Settings.model_fields.items():
        if name == "config":
            continue
        yield f"\n# {field.description} ({variable_of(name)})\n"
        # TOML allows no key without a value: without a default, the line ends at the equals sign.
        yield f"# {name} = {_toml(field.default)}".rstrip() + "\n"


def shown(value: Any) -> Any:
    """Return a setting's value for display, with the password of a URL masked."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", str(value))


def _toml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
