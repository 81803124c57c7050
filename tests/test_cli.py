"""The command line: invalid input produces a one-line error; printed commands, `--json` and `--home`."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import program, run
from streaming.images.dataset import digit_images, write_images
from streaming.storage.tables import Table
from tests.conftest import command_here, environment

UNREACHABLE = "127.0.0.1:1"
FAILED, USAGE = 1, 2


def imagestream(home: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a separate process; of the settings, only the given ones are in its environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMAGESTREAM_")}
    command = [sys.executable, "-m", "streaming", "--home", str(home), *map(str, arguments)]
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, check=False, timeout=300
    )


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Like `imagestream`, but in this process, which avoids importing the modules each time."""
    for name in os.environ:
        if name.startswith("IMAGESTREAM_"):
            monkeypatch.delenv(name)

    def run_here(home: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        line = ["--home", str(home), *map(str, arguments)]
        with pytest.raises(SystemExit) as ended:
            run(line)
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return subprocess.CompletedProcess(line, ended.value.code or 0, output.out, output.err)

    return run_here


def assert_refused(done: subprocess.CompletedProcess[str], reason: str, code: int = FAILED) -> None:
    """The command exited with this code, and printed the reason as one line of standard error."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert (done.returncode, len(lines)) == (code, 1), done.stdout + done.stderr
    assert re.search(rf"^error: .*{reason}", lines[0]), lines[0]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("publish no/such/file.png --bootstrap-servers 127.0.0.1:1", "no/such/file.png: expected a file, .* not exist"),
        ("publish README.md", "the one of .*home is not running; run `imagestream broker start`"),
        ("stream", "the one of .*home is not running; run `imagestream broker start`"),
        ("train --images no/such/folder", "no/such/folder is not a folder: expected one folder of images per class"),
        ("train --images README.md", "README.md is not a folder: expected one folder of images per class"),
        ("retrain", "there is no champion model in .* to retrain; run 'imagestream train' first"),
        ("models show 99", "there is no model version 99 in .*models; there are: none"),
        ("models promote 99", "there is no model version 99"),
        ("models verify 99", "there is no model version 99"),
        ("models rollback", "champion has no earlier version to go back to"),
        ("query SELECT+1", "no tables yet in .*tables: run `imagestream demo`"),
        ("predictions", "no tables yet in .*tables"),
    ],
)
def test_failed_command_prints_one_line_and_creates_no_home(
    command: Command, home: Path, arguments: str, reason: str
) -> None:
    assert_refused(command(home, *arguments.split()), reason)
    assert not home.exists() or not any(path.is_file() for path in home.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("frobnicate", r"No such command 'frobnicate' \(see 'imagestream --help'\)"),
        ("models frobnicate", r"No such command 'frobnicate' \(see 'imagestream models --help'\)"),
        ("train --limit -5 --dataset digits", "'--limit': Input should be greater than or equal to 2"),
        ("train --dataset cats", "'--dataset': .*'cats' is not one of 'digits'"),
        ("stream --images-per-batch=-1", "--images-per-batch: Input should be greater than or equal to 1"),
        ("predictions --limit -1", "'--limit': Input should be greater than or equal to 1"),
        ("predictions --limit many", "'--limit': .*valid integer"),
        ("broker start --port 0", "'--port': Input should be greater than or equal to 1"),
        ("models show -- -3", "'version': Input should be greater than or equal to 1"),
        ("models list --frob", "No such option: --frob"),
        ("", "Missing command"),
        ("publish", "Missing argument 'PATH…'"),
        ("train", "give either --images PLACE or --dataset digits"),
        ("train --images . --dataset digits", "give either --images PLACE or --dataset digits"),
        ("train --holdout -0.1 --dataset digits", "holdout should be between 0 and 1, got -0.1"),
        ("train --explained-variance 1.5 --dataset digits", "explained variance should be above 0 and at most 1"),
        ("train --threshold most --dataset digits", "most"),
        ("publish --rate -1 x.jpg", "rate"),
        ("retrain --every never", "expected a time such as 10s"),
        ("report --against 1", "give the other with --model N"),
        ("predictions --since soon", "expected a time such as 2026-11-16"),
        ("stream --from soon --bootstrap-servers 127.0.0.1:1", "--from: expected earliest, latest or a time"),
        ("erase", "give either --id ID"),
        ("query SELECT+1 --format parquet", "give a file with --output FILE"),
    ],
)
def test_usage_error_is_one_line_that_names_the_help(command: Command, home: Path, arguments: str, reason: str) -> None:
    assert_refused(command(home, *arguments.split()), f"{reason}.*see 'imagestream .*--help'|{reason}", USAGE)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("IMAGESTREAM_DRIVER_MEMORY", "lots", "should match pattern .*, got 'lots'"),
        ("IMAGESTREAM_MASTER", "yes", "should match pattern .*, got 'yes'"),
        ("IMAGESTREAM_TOPIC", "../images", "should match pattern .*, got '../images'"),
    ],
)
def test_invalid_variable_is_reported_with_its_value(
    command: Command, home: Path, variable: str, value: str, reason: str
) -> None:
    assert_refused(command(home, "models", "list", **{variable: value}), f"{variable}: .*{reason}", USAGE)


def test_missing_java_is_reported_with_an_install_command(command: Command, home: Path, tmp_path: Path) -> None:
    without = {"PATH": str(tmp_path / "empty"), "JAVA_HOME": str(tmp_path / "empty")}
    for arguments in (("broker", "start"), ("train", "--dataset", "digits", "--limit", "10")):
        done = command(home, *arguments, **without)
        assert_refused(done, "Java 17 or 21 is needed, .*: run `.*(17|21).*`, or set JAVA_HOME to one")


def test_port_in_use_is_reported(command: Command, home: Path, jars_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command(home, "broker", "start", "--port", str(port), IMAGESTREAM_JARS=str(jars_dir))
    assert_refused(done, f"port {port}")


@pytest.mark.parametrize("line", ["publish LICENSE", "stream --until-drained"])
def test_unreachable_broker_is_reported_with_its_address(
    command: Command, home: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.platform.topic.TIMEOUT_MS", 100)
    done = command(home, *line.split(), "--bootstrap-servers", UNREACHABLE)
    assert_refused(done, f"no Kafka broker answer.* at '?{UNREACHABLE}")


def test_home_that_deltalake_cannot_open_is_refused(command: Command, tmp_path: Path) -> None:
    done = command(tmp_path / "home [1]", "query", "SELECT 1")
    assert_refused(done, "has a . in its path, which deltalake", USAGE)


def test_names_in_errors_are_printed_literally(command: Command, home: Path) -> None:
    """Markup and emoji codes are not interpreted."""
    assert_refused(command(home, "train", "--images", "[red]a:b:c"), re.escape("[red]a:b:c is not a folder"))


def test_training_folder_needs_images_of_two_classes(command: Command, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    assert_refused(
        command(home, "train", "--images", folder), "photos contains no images: expected one folder of images per"
    )
    done = command(home, "publish", folder, "--bootstrap-servers", UNREACHABLE)
    assert done.returncode == FAILED
    assert "Traceback" not in done.stderr
    (folder / "cat").mkdir()
    (folder / "cat" / "1.png").write_bytes(b"")
    assert_refused(command(home, "train", "--images", folder), r"expected at least two classes, got only one \(cat\)")


def test_unknown_backbone_or_weights_error_lists_the_known_ones(command: Command, home: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", digit_images(5))
    done = command(home, "train", "--images", folder, "--backbone", "mobilnet_v2")
    assert_refused(done, "unknown backbone 'mobilnet_v2', known are .*did you mean mobilenet_v2")
    done = command(home, "train", "--images", folder, "--weights", "absent.h5")
    assert_refused(done, r"imagenet, random or a file, and there is no file 'absent\.h5'")


@pytest.mark.parametrize("sql", ["DELETE FROM predictions", "DROP TABLE predictions", "COPY predictions TO '{}'"])
def test_sql_that_writes_is_refused(command: Command, home: Path, tmp_path: Path, sql: str) -> None:
    Table(home / "tables", "predictions")
    assert_refused(command(home, "query", sql.format(tmp_path / "stolen.csv")), "(read-only|SELECT)")
    assert not (tmp_path / "stolen.csv").exists()
    assert command(home, "query", "SELECT * FROM predictions").returncode == 0


@pytest.mark.parametrize(
    "arguments", ["broker start", "train --dataset digits --limit 10", "models list", "retrain", "query SELECT+1"]
)
def test_home_below_a_file_is_refused(command: Command, tmp_path: Path, arguments: str) -> None:
    (tmp_path / "file").touch()
    assert_refused(command(tmp_path / "file" / "home", *arguments.split()), "file/home")
    assert (tmp_path / "file").is_file()


def test_damaged_aliases_are_reported(command: Command, home: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "aliases.json").write_text("{")
    assert_refused(command(home, "models", "list"), r"aliases\.json is damaged")


def test_debug_prints_the_traceback_before_the_error(command: Command, home: Path) -> None:
    done = command(home, "--debug", "models", "show", "99")
    assert done.returncode == FAILED
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.splitlines()[-1].startswith("error: there is no model version 99")


def test_version_option_prints_the_package_version(home: Path) -> None:
    done = imagestream(home, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"imagestream {version('imagestream')}\n", "")


@pytest.mark.parametrize(
    ("started", "executable", "on_path", "words"),
    [
        ("clone/.venv/bin/imagestream", "clone/.venv/bin/python", False, [".venv/bin/imagestream"]),
        ("clone/.venv/bin/imagestream", "clone/.venv/bin/python", True, ["imagestream"]),
        ("elsewhere/imagestream/__main__.py", "clone/.venv/bin/python", False, [".venv/bin/imagestream"]),
        ("clone/imagestream", "elsewhere/python", False, ["./imagestream"]),
        ("other/bin/imagestream", "other/bin/python", False, ["{}/other/bin/imagestream"]),
        ("elsewhere/imagestream/__main__.py", "elsewhere/python", False, ["{}/elsewhere/python", "-m", "imagestream"]),
    ],
)
def test_printed_command_runs_the_same_installation(
    started: str, executable: str, on_path: bool, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("clone/.venv/bin/imagestream", "clone/imagestream", "other/bin/imagestream"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setenv("PATH", str(tmp_path / "clone" / ".venv" / "bin") if on_path else "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / started), "demo"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / executable))
    assert program() == [word.format(tmp_path) for word in words]


def test_group_without_a_command_prints_its_help(command: Command, home: Path) -> None:
    for group in ("models", "broker"):
        done = command(home, group)
        assert (done.returncode, done.stderr) == (USAGE, "")
        assert f"Usage: imagestream {group}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "summary"),
    [
        ("models list", 0, {"versions": []}),
        ("broker status", FAILED, {"running": False, "bootstrap_servers": None, "pid": None}),
        ("broker stop", 0, {"stopped": False}),
    ],
)
def test_json_creates_the_file_and_its_folder(
    command: Command, home: Path, tmp_path: Path, arguments: str, code: int, summary: dict[str, object]
) -> None:
    file = tmp_path / "new" / "summary.json"
    assert command(home, *arguments.split(), "--json", file).returncode == code
    assert json.loads(file.read_text()) == summary


def test_home_option_takes_precedence_over_the_environment(command: Command, tmp_path: Path) -> None:
    variable = {"IMAGESTREAM_HOME": str(tmp_path / "variable")}
    done = command(tmp_path / "option", "models", "list", **variable)
    assert f"no models in {tmp_path / 'option' / 'models'}" in done.stderr
    with environment(**variable):
        _, _, err = command_here("models", "list")
    assert f"no models in {tmp_path / 'variable' / 'models'}" in err
