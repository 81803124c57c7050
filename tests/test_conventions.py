"""Conventions of all commands; docs/conventions.md has the table."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import psutil
import pyarrow.parquet as pq
import pytest
from typer.main import get_command

from producer.labelled_csv import PATH_COLUMNS
from producer.manifest import read_csv
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import app
from streaming.cli.app import run as cli_run
from streaming.cli.command_line import PANELS
from streaming.cli.console import Spinner, out
from streaming.cli.output import list_rows, print_details, print_table
from streaming.cli.output_formats import Format
from streaming.durations import parse_duration, show_duration
from streaming.errors import UsageError
from streaming.images.corrections import KEYS
from streaming.images.labels_csv import read_labels
from streaming.settings import Settings, option_of, variable_of
from streaming.wording import counted
from tests.conftest import command_here, environment
from tests.streaming.history import commit_batch

CLI = Path(__file__).parent.parent / "streaming" / "cli"


def all_commands(path: str = "", command: Any = None) -> Iterator[tuple[str, Any]]:
    """(name, command) of every visible command except groups: `models list`, …"""
    command = command or get_command(app)
    if command.hidden:
        return
    members = getattr(command, "commands", None)
    if members is None:
        yield path, command
        return
    for name, member in members.items():
        yield from all_commands(f"{path} {name}".strip(), member)


COMMANDS = dict(all_commands())
TAKES_IMAGES = {"features", "predict"}  # their formats have separate tests
LISTING = sorted(name for name, one in COMMANDS.items() if any(param.name == "format_" for param in one.params))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a few predictions and no model."""
    commit_batch(Settings(home=tmp_path / "home"), 0, {0: (0, 4)})
    return tmp_path / "home"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(home: Path) -> Run:
    return lambda *arguments: command_here("--home", home, *arguments)


@pytest.mark.parametrize("name", [name for name in LISTING if name not in TAKES_IMAGES])
def test_listing_command_writes_every_format(name: str, run: Run, tmp_path: Path) -> None:
    arguments = [*name.split(), *(["FROM predictions"] if name == "query" else [])]
    as_csv, as_json, as_lines = (run(*arguments, "--format", one)[1] for one in ("csv", "json", "ndjson"))
    rows = json.loads(as_json)
    assert [json.loads(line) for line in as_lines.splitlines()] == rows or name in {"status", "doctor"}
    heads, *lines = csv.reader(io.StringIO(as_csv))
    assert len(lines) == len(rows)
    assert all(list(row) == heads for row in rows)
    run(*arguments, "--format", "parquet", "--output", tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == len(rows)
    run(*arguments, "--output", tmp_path / "rows.txt")
    assert re.search(rf"^{len(rows):,} rows?$", (tmp_path / "rows.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_listing_commands_accept_all_formats_and_an_output_file() -> None:
    assert {"audit", "config show", "doctor", "models list", "predictions", "query", "report", "status"} <= set(LISTING)
    for name in LISTING:
        options = {option for param in COMMANDS[name].params for option in param.opts}
        assert {"--format", "--output", "-o"} <= options, name
    for name in set(LISTING) - TAKES_IMAGES:
        (param,) = (one for one in COMMANDS[name].params if one.name == "format_")
        assert {*param.type_descriptor.annotation} == {*Format}, name


def test_tables_are_rendered_in_one_module() -> None:
    """A command that renders a table itself would support only one format."""
    users = {path.name for path in CLI.glob("*.py") if re.search(r"rich\.(table|markup)", path.read_text("utf-8"))}
    assert users - {"status.py"} == {"console.py"}


@pytest.mark.parametrize("name", ["models list", "config show", "predictions"])
def test_json_on_standard_output_is_the_summary_alone(name: str, run: Run) -> None:
    code, out, err = run(*name.split(), "--json", "-")
    assert (code, bool(json.loads(out))) == (0, True)
    assert "row" in err
    code, out, err = run(*name.split(), "--json", "-", "--format", "csv")
    assert (code, out) == (2, "")
    assert "both go to standard output" in err


def test_table_in_a_pipe_is_not_truncated(run: Run) -> None:
    code, out, _ = run("query", "SELECT range AS n, repeat('x', 200) AS wide FROM range(300)")
    assert (code, out.count("x" * 200), out.splitlines()[-1]) == (0, 300, "300 rows")


def test_check_that_cannot_be_made_exits_with_3(tmp_path: Path, run: Run) -> None:
    for name in ("audit", "status"):
        log = min((tmp_path / "home" / "tables" / "batches" / "_delta_log").glob("*.json"))
        content = log.read_text(encoding="utf-8")
        log.write_text("damaged", encoding="utf-8")
        code, out, err = run(name)
        log.write_text(content, encoding="utf-8")
        assert (code, out) == (3, ""), err
        assert re.fullmatch(r"error: could not check: [^\n]+\n", err)


LONG_RUNNING = {  # commands that run until they are stopped, with options for output soon after the start
    "maintain": ("--every", "0.01"),
    "status": ("--watch",),
    "broker logs": ("-n", "1", "--follow"),
    "query": ("FROM predictions", "--watch", "--every", "100ms"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", LONG_RUNNING)
def test_signal_stops_a_long_running_command(name: str, number: int, home: Path) -> None:
    log = home / "broker" / "server.log"
    log.parent.mkdir()
    log.write_text("the last line\n", encoding="utf-8")
    output = StringIO()

    def stop_after_first_output() -> None:
        while not output.getvalue():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_after_first_output, daemon=True).start()
    with redirect_stdout(output), redirect_stderr(StringIO()) as err, pytest.raises(SystemExit) as ended:
        cli_run(["--home", str(home), *name.split(), *LONG_RUNNING[name]])
    assert (ended.value.code, err.getvalue()) == (1 if name == "status" else None, "")  # no stream runs: not healthy
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]


def test_sigterm_stops_process_1_of_a_container(home: Path) -> None:
    """The kernel delivers to process 1 only signals that it handles."""
    try:
        subprocess.run([*UNSHARE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not allow PID namespaces")
    log = home / "broker" / "server.log"
    log.parent.mkdir()
    log.write_text("the last line\n", encoding="utf-8")
    command = [sys.executable, "-m", "streaming", "--home", str(home), "broker", "logs", "--follow"]
    with subprocess.Popen([*UNSHARE, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as outer:
        assert outer.stdout
        assert outer.stdout.readline() == "the last line\n"
        (first,) = psutil.Process(outer.pid).children()
        first.send_signal(signal.SIGTERM)
        assert outer.wait(300) == 0
        assert outer.stderr
        assert outer.stderr.read() == ""


@pytest.mark.parametrize("name", ["", "models", "broker", "config", *COMMANDS])
def test_help_at_80_columns_shows_complete_option_names(name: str) -> None:
    with environment(COLUMNS="80"):
        code, out, err = command_here(*name.split(), "--help")
    assert (code, err) == (0, "")
    command = COMMANDS.get(name)
    for param in command.params if command else []:
        if param.param_type_name == "option" and not param.hidden:
            assert all(re.search(rf"(^|\s){re.escape(one)}([,\s]|$)", out) for one in param.opts), param.opts
    assert "…-" not in out
    assert "<bool>" not in out
    assert not re.search(r"[│╭╰]", out)


def test_help_lists_commands_in_sections() -> None:
    _, out, _ = command_here("--help")
    sections = [line.removesuffix(":") for line in out.splitlines() if re.fullmatch(r"\S.*:", line)]
    assert sections[1:] == ["Options", *PANELS, "Settings"] or sections == ["Options", *PANELS, "Settings"]
    tops = {name.split()[0] for name in COMMANDS}
    assert all(re.search(rf"^  {top} ", out, re.MULTILINE) for top in tops)


# A value other than the default for each setting, and its form in `config show` if that differs.
VALUES = {
    "home": "other",
    "config": "other.toml",
    "bootstrap_servers": "kafka:9092",
    "kafka_security_protocol": "SASL_SSL",
    "kafka_sasl_mechanism": "PLAIN",
    "kafka_username": "me",
    "topic": "photos",
    "isolation": "read_uncommitted",
    "master": "local[3]",
    "driver_memory": "3g",
    "engine": "onnx",
    "execution_providers": "cuda",
    "images_per_batch": "7",
    "megabytes_per_batch": "8",
    "metrics_port": "9000",
    "log_format": "json",
    "broker_port": "9093",
    "dashboard_port": "8600",
    "gateway_port": "8700",
    "gateway_requests_per_minute": "60",
    "gateway_key_requests_per_minute": "70",
    "gateway_total_requests_per_minute": "80",
    "metrics_host": "0.0.0.0",  # noqa: S104
    "schema_registry": "http://registry:8081",
    "answers": "both",
    "answers_format": "avro",
    "answers_topic": "answers",
    "answers_bootstrap_servers": "kafka:9093",
    "retention": "2d",
    "max_pixels": "1000",
    "decode_timeout": "90s",
    "decode_memory": "2g",
    "strict_images": "true",
    "mlflow_tracking_uri": "http://here",
}
SHOWN = {"decode_timeout": 90.0, "strict_images": True}


def test_every_setting_is_an_option_a_variable_and_a_file_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("IMAGESTREAM_") or name == "MLFLOW_TRACKING_URI":
            monkeypatch.delenv(name)
    (tmp_path / "other.toml").write_text("")
    values = {name: VALUES.get(name, f"/{name}") for name in Settings.model_fields}
    fields = Settings.model_fields.items()
    options = [
        word
        for name, field in fields
        for word in (option_of(name), values[name])[: 1 if field.annotation is bool else 2]
    ]
    shown = {
        "option before the command": settings_shown(*options, "config", "show"),
        "option after the command": settings_shown("config", "show", *options),
    }
    with environment(**{variable_of(name): value for name, value in values.items()}):
        shown["variable"] = settings_shown("config", "show")
    with (tmp_path / "imagestream.toml").open("w") as file:
        for name, field in fields:
            quoted = isinstance(field.default, int) or name.endswith("_port")
            if name != "config":
                file.write(f"{name} = {values[name]}\n" if quoted else f'{name} = "{values[name]}"\n')
    shown["file"] = settings_shown("config", "show")
    for source, found in shown.items():
        for name, value in values.items():
            if (source, name) != ("file", "config"):
                expected = SHOWN.get(name) or (int(value) if value.isdecimal() else value)
                got = found[name]["value"]
                assert got == expected or str(got).endswith(f"/{expected}"), (name, source, got)
                assert found[name]["from"] != "default", (name, source)


def settings_shown(*arguments: str) -> dict[str, dict[str, Any]]:
    code, out, err = command_here(*arguments, "--json", "-")
    assert code == 0, err
    return dict(json.loads(out))


def test_unknown_variable_is_reported_with_the_closest_setting() -> None:
    links = {"IMAGESTREAM_GATEWAY_PORT": "tcp://10.0.0.1:80", "IMAGESTREAM_GATEWAY_SERVICE_HOST": "10.0.0.1"}
    with environment(IMAGESTREAM_TOPPIC="x", **links):  # as Kubernetes sets them for a service imagestream-gateway
        code, out, err = command_here("config", "show", "--format", "json")
    assert code == 0
    assert err == "IMAGESTREAM_TOPPIC is not a setting, did you mean IMAGESTREAM_TOPIC?\n"
    assert {"setting": "gateway_port", "value": "8080", "from": "default"} in json.loads(out)


@pytest.mark.parametrize(
    ("text", "plain", "seconds"),
    [
        ("10s", "s", 10),
        ("15m", "s", 900),
        ("24h", "s", 86_400),
        ("7d", "s", 604_800),
        ("1.5", "m", 90),
        ("500ms", "s", 0.5),
    ],
)
def test_duration_has_a_unit_or_the_default_one(text: str, plain: str, seconds: float) -> None:
    assert parse_duration(text, plain=plain) == seconds
    assert parse_duration(show_duration(seconds)) == seconds


def test_numbers_of_things_have_the_right_form() -> None:
    assert [counted(n, "batch") for n in (0, 1, 1200)] == ["0 batches", "1 batch", "1,200 batches"]
    assert [counted(n, "row") for n in (1, 2)] == ["1 row", "2 rows"]


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1 h", "1h30m", "9" * 12, "nan", "400d", "1e3s", "١s"])
def test_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a time such as 10s, 15m, 24h or 7d"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("line", "instead", "refusal"),
    [
        ("query SELECT+1 -f csv --watch 5", ["--format csv", "--watch --every 5s"], "no tables yet"),
        ("predictions --watch=0.5", ["--watch --every 0.5s"], "no tables yet"),
        (
            "train --output flat --engine keras --augment 2",
            ["--flat", "--runtime keras", "--augmented-copies 2"],
            "give",
        ),
        ("tune --engines int8 --output pooled", ["--precisions int8", "--pooled"], "need features"),
        ("maintain --retention-hours 48", ["--retention 48h"], "no tables yet"),
        ("stream --log-json --from soon", ["--log-format json"], "--from: expected"),
        ("features no/images --output x.csv", ["--images no/images"], "no/images is not a folder"),
    ],
)
def test_deprecated_spelling_works_with_a_warning(line: str, instead: list[str], refusal: str, tmp_path: Path) -> None:
    _, out, err = command_here("--home", tmp_path / "home", *line.split(), "--bootstrap-servers", "127.0.0.1:1")
    *warnings, last = err.splitlines()
    assert [one.rpartition("write ")[2] for one in warnings] == instead
    assert all("is deprecated and will be removed" in one for one in warnings)
    assert out == ""
    assert refusal in last


def test_option_has_the_same_meaning_in_all_commands() -> None:
    """An option is a flag in all commands or takes a value in all; a short option abbreviates one long option."""
    by_name: dict[str, set[tuple[bool, str]]] = {}
    for command in COMMANDS.values():
        for param in command.params:
            if param.param_type_name == "option":
                for name in param.opts:
                    by_name.setdefault(name, set()).add((param.is_flag, max(param.opts, key=len)))
    assert {name: meanings for name, meanings in by_name.items() if len(meanings) > 1} == {}
    shown = {"--watch": True, "--augment": True, "--output": False, "--every": False, "--format": False}
    assert {name: next(iter(by_name[name]))[0] for name in shown} == shown


def test_label_csv_has_the_same_columns_in_all_commands(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    for column in ("path", "source", "file_name", "name"):
        (tmp_path / "labels.csv").write_text(f"{column},label\na.jpg,cat\n")
        assert [file.label for file in read_csv(tmp_path / "labels.csv").files] == ["cat"]
        assert read_labels(tmp_path / "labels.csv", PATH_COLUMNS).labels == {"a.jpg": "cat"}
        assert read_labels(tmp_path / "labels.csv", KEYS).labels == {"a.jpg": "cat"}


UNTIL_STOPPED = {  # commands that run until they are stopped: always, or with this option
    "dashboard": "",
    "gateway": "",
    "stream": "",
    "broker logs": "--follow",
    "maintain": "--every",
    "predictions": "--watch",
    "publish": "--watch",
    "query": "--watch",
    "retrain": "--every",
    "status": "--watch",
}
CHECKS = {"audit", "status"}


def conventions() -> Iterator[str]:
    """The lines of the table in docs/conventions.md, generated from the commands."""
    yield "| command | `--format` | `--json` | until stopped | exit codes | settings in its help |"
    yield "|---|---|---|---|---|---|"
    for name, command in sorted(COMMANDS.items()):
        options = {option for param in command.params for option in param.opts}
        endless = UNTIL_STOPPED.get(name)
        assert not endless or endless in options, name
        formats = [one for one in command.params if one.name == "format_"]
        cells = (
            f"`{name}`",
            "|".join(map(str, _words(formats[0]))).replace("|", "\\|") if formats else "",
            "yes" if "--json" in options else "",
            "" if endless is None else f"`{endless}`" if endless else "yes",
            "0, 1, 2, 3" if name in CHECKS else "0, 1, 2",
            ", ".join(f"`{option_of(one)}`" for one in command.settings),
        )
        yield "| " + " | ".join(cells) + " |"


def _words(param: Any) -> list[str]:
    annotation = param.type_descriptor.annotation
    return [*annotation] if isinstance(annotation, type) else [*get_args(annotation)]


def test_documented_table_matches_the_commands() -> None:
    written = (CLI.parents[1] / "docs" / "conventions.md").read_text("utf-8")
    assert written.endswith("\n".join(["", *conventions(), ""])), "\n".join(conventions())


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_error_exits_with_2_and_prints_one_line(name: str) -> None:
    code, out, err = command_here(*name.split(), "--nonsense")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "No such option: --nonsense" in err


def test_only_known_commands_have_neither_rows_nor_a_summary() -> None:
    without = {
        name for name, one in COMMANDS.items() if not {"format_", "json_file", "json"} & {p.name for p in one.params}
    }
    assert without == {"setup", "dashboard", "config init", "models show", "broker logs"}


def test_text_is_not_interpreted_as_markup(tmp_path: Path) -> None:
    """A pattern such as `([^/]+)_[0-9]+`, a class called `[red]` and a file `a:smile:b` are printed literally."""
    text = r"--label-pattern '([^/]+)_[0-9]+$' [red]cat[/red] :smile: [/]"
    with redirect_stdout(StringIO()) as output:
        out.print(text)
        print_table(text, [{"name": text}], "name")
        print_details([(text, text)])
        list_rows([{text: text}], {text: str}, Format.TABLE, None)
    assert output.getvalue().count(text) == 7
    spinner = Spinner(text)
    spinner.update(text)
    assert text in str(spinner._status.status)
    users = {
        path.name for path in CLI.glob("*.py") if re.search(r"\bTextColumn\(|err\.status\(", path.read_text("utf-8"))
    }
    assert users == {"console.py"}
