"""Declaration of commands and groups: global options in any position, help of any width, deprecated spellings.

A setting is an option of every command: `imagestream --topic photos publish` and `imagestream publish --topic photos`
are the same. The help of a command shows its most common settings; the others are in `imagestream --help`.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from streaming.cli.console import warn
from streaming.durations import parse_duration
from streaming.settings import Configuration, Settings, option_of, read_configuration, variable_of

SHORT = {"bootstrap_servers": "-b", "topic": "-t"}
SETTINGS = "Settings"
DEFAULT_PANELS = ("Arguments", "Options")
METAVARS = {
    "home": "PLACE",
    "bootstrap_servers": "HOST:PORT,…",
    "topic": "NAME",
    "answers_topic": "NAME",
    "answers_bootstrap_servers": "HOST:PORT,…",
    "metrics_port": "PORT",
    "broker_port": "PORT",
    "dashboard_port": "PORT",
    "gateway_port": "PORT",
    "driver_memory": "SIZE",
    "decode_memory": "SIZE",
    "retention": "TIME",
}
SPARK = ("master", "driver_memory")  # settings of commands that start Spark
# The sections of the help, in order.
START, IMAGES, MODELS, OPERATION = PANELS = "Start", "Images and predictions", "Models", "Operation"


@dataclass
class Given:
    """Settings given on the command line, and the configuration that results.

    The configuration is read on first access, so that help and `config init` work with an invalid configuration file.
    """

    options: dict[str, Any] = field(default_factory=dict)
    warned: bool = False

    @cached_property
    def configuration(self) -> Configuration:
        return read_configuration(**self.options)

    def new_warnings(self) -> Iterator[str]:
        """Yield the warnings of the configuration, once."""
        if not self.warned:
            self.warned = True
            yield from self.configuration.warnings


@dataclass(frozen=True)
class Deprecated:
    """A spelling of an earlier release, which is accepted with a warning.

    Attributes:
        name: the option.
        new: its replacement, with `{}` for its value.
        only: pattern of the values that it is deprecated with.
    """

    name: str
    new: str
    only: str = ".*"

    @property
    def takes_value(self) -> bool:
        return "{}" in self.new

    def means(self, value: str | None) -> bool:
        """Return whether the option with this value is the deprecated spelling."""
        return not self.takes_value or (value is not None and re.fullmatch(self.only, value, re.DOTALL) is not None)


class _Globals:
    """Mixin of commands and groups: accepts the options of `imagestream` itself, and formats help in sections."""

    settings: tuple[str, ...] = ()  # shown in its help
    deprecated_options: tuple[Deprecated, ...] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)  # type: ignore[misc]
        if ctx.parent is None:
            return list(own)
        taken = {name for one in own for name in (*one.opts, *one.secondary_opts)}
        everywhere = [one for one in ctx.find_root().command.params if getattr(one, "name", "") in GLOBAL]
        return [*own, *(self._option_copy(one) for one in everywhere if not taken & {*one.opts, *one.secondary_opts})]

    def _option_copy(self, option: Any) -> Any:
        """Copy an option of `imagestream` for this command."""
        here = copy(option)
        here.expose_value, here.callback, here.default = False, _store_option, None
        here.hidden = option.name not in self.settings
        return here

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if self.deprecated_options and not ctx.resilient_parsing:
            args = [*replace_deprecated(args, self.deprecated_options)]
        return list(super().parse_args(ctx, args))  # type: ignore[misc]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            sections.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
        _write_sections(formatter, {title: sections.pop(title) for title in DEFAULT_PANELS if title in sections})
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)
        _write_sections(formatter, sections)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)  # type: ignore[misc]
        if ctx.parent is not None:
            formatter.write_paragraph()
            formatter.write_text("Global options and settings are accepted in any position: see 'imagestream --help'.")


class Command(_Globals, TyperCommand):
    """A command of `imagestream`."""


class Group(_Globals, TyperGroup):
    """A group of commands, shown in sections; without a command it prints its help and exits with code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                summary = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
                title = getattr(command, "rich_help_panel", None) or "Commands"
                sections.setdefault(title, []).append((name, summary))
        known = [title for title in PANELS if title in sections]
        _write_sections(formatter, {title: sections.pop(title) for title in known} | sections)


def _write_sections(formatter: Any, sections: Mapping[str, list[tuple[str, str]]]) -> None:
    for title, rows in sections.items():
        with formatter.section(title):
            formatter.write_dl(rows)


class App(typer.Typer):
    """A group of commands that accept the global options."""

    def __init__(self, **given: Any) -> None:
        super().__init__(
            cls=Group,
            no_args_is_help=True,
            rich_markup_mode=None,  # Rich's tables truncate option names and read brackets as styles
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
            **given,
        )

    def command(  # type: ignore[override]
        self,
        name: str | None = None,
        *,
        panel: str | None = None,
        settings: tuple[str, ...] = (),
        deprecated: tuple[Deprecated, ...] = (),
        hidden: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Declare a command.

        Args:
            name: name of the command; default: the function's name.
            panel: section of the group's help that lists the command.
            settings: names of the settings shown in its help.
            deprecated: spellings of earlier releases that are still accepted.
            hidden: leave the command out of the group's help.
        """
        kind = type("Command", (Command,), {"settings": settings, "deprecated_options": deprecated})
        return super().command(name, cls=kind, rich_help_panel=panel, hidden=hidden)


def replace_deprecated(args: list[str], deprecated: tuple[Deprecated, ...]) -> Iterator[str]:
    """Yield the arguments with deprecated spellings replaced, and warn about each."""
    place = 0
    while place < len(args):
        word = args[place]
        place += 1
        if word == "--":  # only arguments follow
            yield word
            yield from args[place:]
            return
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        following = value if equals else args[place] if place < len(args) else None
        found = next((one for one in deprecated if one.name == name and one.means(following)), None)
        if found is None:
            yield word
            continue
        if found.takes_value and not equals:
            place += 1
        new = [part.replace("{}", following or "") for part in found.new.split()]
        warn(f"{name} is deprecated and will be removed: write {' '.join(new)}")
        yield from new


def setting_parameters() -> Iterator[inspect.Parameter]:
    """Yield an option for every setting, for the callback of `imagestream` itself."""
    for name, setting in Settings.model_fields.items():
        text = setting.description or ""
        kind: Any = bool if setting.annotation is bool else str
        flags = [option_of(name), *([SHORT[name]] if name in SHORT else [])]
        if kind is bool:
            flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
        default = (
            "" if setting.default is None else f"; {str(setting.default).lower() if kind is bool else setting.default}"
        )
        option = typer.Option(
            *flags,
            metavar=None if kind is bool else _metavar(name, setting.annotation),
            help=f"{text[:1].upper()}{text[1:].rstrip('.')} ({variable_of(name)}{default}).",
            rich_help_panel=None if name in {"home", "config"} else SETTINGS,
            show_default=False,
        )
        annotation = Annotated[kind | None, option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def given_settings(context: typer.Context) -> Given:
    """Return the settings given on the command line; none if a command is called without its root."""
    return context.obj if isinstance(context.obj, Given) else Given()


def _store_option(context: typer.Context, option: Any, value: Any) -> None:
    is_given = option.secondary_opts if value is False else value is not None
    if is_given and isinstance(context.obj, Given):
        context.obj.options[option.name] = value


def _metavar(name: str, annotation: Any) -> str:
    if name in METAVARS:
        return METAVARS[name]
    kinds = (annotation, *get_args(annotation))
    for one in kinds:
        if get_origin(one) is Literal:
            return "|".join(map(str, get_args(one)))
    if Path in kinds:
        return "FILE" if name.endswith("file") or name == "config" else "DIR"
    return "N" if int in kinds else "TIME" if float in kinds else "TEXT"


GLOBAL = frozenset({"debug", *Settings.model_fields})


def seconds(text: Any) -> float:
    """Parse the value of an option that takes a duration; a plain number is in seconds."""
    return parse_duration(text)
