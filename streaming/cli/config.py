"""`imagestream config`: what the settings are, where each comes from, and a file to write them in."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from streaming.cli.app import JsonOption, app, configuration_of, write_json
from streaming.cli.command_line import START, App
from streaming.cli.console import out
from streaming.cli.row_formats import Format
from streaming.cli.rows import FormatOption, OutputOption, list_rows
from streaming.config_file import DEFAULT_FILE
from streaming.errors import ConflictError
from streaming.settings import Settings, variable_of

config_app = App(name="config", help="Show the settings, and write a file for them.")
app.add_typer(config_app, rich_help_panel=START)
COLUMNS = {"setting": str, "value": str, "from": str}


@config_app.command()
def show(
    context: typer.Context,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """Show every setting, its value, and where the value comes from.

    An option wins over the environment, the environment over the configuration file, the file over the default. Of a
    secret only the file that holds it is shown, and of a URL not its password.

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
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write; it must not be there.")
    ] = DEFAULT_FILE,
) -> None:
    """Write a configuration file that names every setting, each commented out with its default.

    Example: imagestream config init
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.writelines(lines())
    except FileExistsError as error:
        raise ConflictError(f"{file} is there already: give another name, or edit it") from error
    out.print(f"wrote {file}: every setting is in it, with its default")


def lines() -> Iterator[str]:
    """The lines of a new configuration file."""
    yield "# Settings of imagestream. An option or an environment variable wins over this file.\n"
    yield "# A relative path lies beside this file.\n"
    for name, field in Settings.model_fields.items():
        if name == "config":
            continue
        yield f"\n# {field.description} ({variable_of(name)})\n"
        # Without a default there is no value to show, and TOML takes no line without one.
        yield f"# {name} = {_toml(field.default)}".rstrip() + "\n"


def shown(value: Any) -> Any:
    """A setting's value for people: a URL without its password."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", str(value))


def _toml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
