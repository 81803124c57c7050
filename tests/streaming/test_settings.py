"""Settings: the precedence of option, environment, file and default, and errors with the place of a mistake."""

import json
import os
import subprocess
import tomllib
from datetime import date
from pathlib import Path

import pytest

from streaming.cli.config import lines, shown
from streaming.errors import ServiceError
from streaming.jobs.demo import _command as demo_command
from streaming.platform.doctor import check_jars
from streaming.platform.jars import spark_jars
from streaming.query import query
from streaming.settings import Settings, is_place, read_configuration, read_settings, variable_of
from tests.conftest import command_here
from tests.conftest import environment as variables
from tests.streaming.history import commit_batch


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new working directory, and no settings in the environment."""
    for name in os.environ:
        if name.startswith("IMAGESTREAM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def imagestream(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with variables(**environment):
        return subprocess.CompletedProcess(arguments, *command_here(*arguments))


def test_precedence_is_option_environment_file_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_configuration().origins == {}
    write(folder / "imagestream.toml", 'home = "of-file"\ntopic = "of-file"\nmaster = "local[1]"\n')
    monkeypatch.setenv("IMAGESTREAM_HOME", "of-environment")
    monkeypatch.setenv("IMAGESTREAM_TOPIC", "of-environment")
    configuration = read_configuration(home=Path("of-option"))
    settings = configuration.settings
    assert (settings.home, settings.topic) == (str(folder / "of-option"), "of-environment")
    assert (settings.master, settings.driver_memory) == ("local[1]", "2g")
    assert configuration.origins == {
        "home": "--home",
        "topic": "IMAGESTREAM_TOPIC",
        "master": f"{folder / 'imagestream.toml'}: master",
        "config": "the working directory",
    }


def test_paths_in_a_file_are_relative_to_it(folder: Path) -> None:
    file = write(folder / "etc" / "own.toml", 'home = "data"\njars = "/opt/jars"\nbackbones = "~/backbones"\n')
    settings = read_settings(config=file)
    assert (settings.home, settings.jars) == (str(folder / "etc" / "data"), Path("/opt/jars"))
    assert settings.backbones == Path.home() / "backbones"


def test_named_file_replaces_that_of_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "imagestream.toml", 'topic = "here"\n')
    first, second = write(folder / "1.toml", 'topic = "one"\n'), write(folder / "2.toml", 'topic = "two"\n')
    assert read_settings().topic == "here"
    monkeypatch.setenv("IMAGESTREAM_CONFIG", str(first))
    assert read_settings().topic == "one"
    assert read_settings(config=second).topic == "two"
    monkeypatch.setenv("IMAGESTREAM_CONFIG", "")
    assert read_settings().topic == "here"


def test_setting_with_a_third_party_variable_has_its_own_key_in_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "imagestream.toml", 'mlflow_tracking_uri = "http://file"\n')
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert read_settings().mlflow_tracking_uri == "http://file"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    configuration = read_configuration()
    assert configuration.settings.mlflow_tracking_uri == "http://environment"
    assert configuration.origins["mlflow_tracking_uri"] == "MLFLOW_TRACKING_URI"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('toipc = "x"', r"imagestream\.toml: there is no setting 'toipc', did you mean topic\?"),
        ('driver-memory = "1g"', r"there is no setting 'driver-memory', did you mean driver_memory\?"),
        ("zzz = 1", "there is no setting 'zzz', there are: .*home, .*topic"),
        ('config = "other.toml"', "there is no setting 'config'"),
        ("[stream]\nx = 1", "there is no setting 'stream'"),
        ("topic = 5", r"imagestream\.toml: topic: Input should be a valid string, got 5"),
        ("home = 5", r"imagestream\.toml: home: .*string, got 5"),
        ('topic = "../up"', r"imagestream\.toml: topic: String should match pattern .*, got '\.\./up'"),
        ('schema_registry = "registry:8081"', "schema_registry: String should match pattern .*, got 'registry:8081'"),
        ("topic = ", "imagestream.toml is not valid TOML: Invalid value"),
        ("a = " + "[" * 60_000, "imagestream.toml is not valid TOML"),
        ("# " + "x" * 70_000, "is larger than 65,536 bytes"),
    ],
)
def test_mistake_in_the_file_is_a_one_line_error(folder: Path, text: str, reason: str) -> None:
    write(folder / "imagestream.toml", text)
    with pytest.raises(ServiceError, match=reason) as caught:
        read_settings()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a [1]", "has a [ in its path"),
        ("a%20b", "has a % in its path, which deltalake treats as an escape"),
        ("a\\b", "has a \\ in its path"),
        ("date=2020-01-01", "has a = in its path, which DuckDB and Spark treat as a partition"),
        ("new\nline", "has a line break or another control character"),
        (os.fsdecode(b"caf\xe9"), "is not UTF-8"),
        ("/".join(["x" * 250] * 15), "has more than 3,500 bytes"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_home_that_a_library_would_misread_is_refused(folder: Path, name: str, why: str) -> None:
    with pytest.raises(ServiceError) as refused:
        read_settings(home=folder / name / "home")
    assert why in str(refused.value)
    assert "choose another with --home DIR" in str(refused.value)
    assert not list(folder.iterdir())


def test_unusual_paths_and_links_are_accepted(folder: Path) -> None:
    for name in ("fran\u00e7ois m\u00fcller", "a, b: c; #1 & 'c' \"d\" $e {f} (g) + ?*|<>~@!^`", "\u65e5\u672c"):
        (folder / name).mkdir()
        (folder / "link").unlink(missing_ok=True)
        (folder / "link").symlink_to(folder / name)
        for home in (folder / name / "home", folder / "link" / "other"):
            settings = read_settings(home=home)
            commit_batch(settings, 0, {0: (0, 4)})
            commit_batch(settings, 1, {0: (4, 8)})
            found = query(settings, "SELECT date, count(*) AS n FROM predictions GROUP BY 1").to_pylist()
            assert found == [{"date": date(2024, 5, 6), "n": 8}]
            assert home.is_dir()


def test_file_with_a_byte_order_mark_is_read(folder: Path) -> None:
    (folder / "imagestream.toml").write_text('topic = "marked"\n', "utf-8-sig")
    assert read_settings().topic == "marked"


def test_missing_named_file_is_reported(folder: Path) -> None:
    with pytest.raises(ServiceError, match=r"absent\.toml cannot be read: No such file"):
        read_settings(config=Path("absent.toml"))


def test_config_show_prints_each_value_and_its_origin(folder: Path) -> None:
    file = write(folder / "own.toml", 'home = "data"\nmaster = "local[1]"\n')
    arguments = ("--config", str(file), "config", "show", "--json", "settings.json")
    done = imagestream(*arguments, IMAGESTREAM_TOPIC="photos", MLFLOW_TRACKING_URI="https://me:secret@host/x")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert found["home"] == {"value": str(folder / "data"), "from": f"{file}: home"}
    assert found["topic"] == {"value": "photos", "from": "IMAGESTREAM_TOPIC"}
    assert found["driver_memory"] == {"value": "2g", "from": "default"}
    assert found["config"] == {"value": str(file), "from": "--config"}
    assert found["mlflow_tracking_uri"] == {"value": "https://***@host/x", "from": "MLFLOW_TRACKING_URI"}
    assert set(found) == set(Settings.model_fields)
    assert "secret" not in done.stdout
    assert all(name in done.stdout for name in found)
    assert f"{file}: home" in done.stdout  # not truncated outside a terminal


def test_url_is_shown_without_its_password() -> None:
    assert shown("https://user:pass@host/path") == "https://***@host/path"  # pragma: allowlist secret
    assert shown("host:9092") == "host:9092"


def test_config_init_writes_every_setting_and_changes_none(folder: Path) -> None:
    before = read_settings()
    assert imagestream("config", "init").returncode == 0
    text = (folder / "imagestream.toml").read_text(encoding="utf-8")
    assert text == "".join(lines())
    assert read_settings().model_dump(exclude={"config"}) == before.model_dump(exclude={"config"})
    assert all(
        f"\n# {name} = " in text or f"\n# {name} =\n" in text for name in Settings.model_fields.keys() - {"config"}
    )
    uncommented = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ") and " = " in line]
    assert tomllib.loads("\n".join(uncommented))["topic"] == before.topic
    again = imagestream("config", "init")
    assert (again.returncode, again.stderr) == (
        1, "error: imagestream.toml already exists: give another name, or edit it\n",
    )  # fmt: skip
    assert (folder / "imagestream.toml").read_text(encoding="utf-8") == text


def test_help_and_init_work_with_an_invalid_file(folder: Path) -> None:
    write(folder / "imagestream.toml", "nonsense")
    assert imagestream("models", "list", "--help").returncode == 0
    assert imagestream("config", "init", "new.toml").returncode == 0
    refused = imagestream("models", "list").stderr
    assert refused.startswith("error: configuration file imagestream.toml is not valid TOML")


def test_processes_of_the_demo_read_the_same_file(folder: Path) -> None:
    file = write(folder / "etc" / "own.toml", 'home = "data"\ntopic = "photos"\n')
    settings = read_settings(config=file)
    command = demo_command(settings, "config", "show", "--json", "settings.json")
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert found["topic"] == {"value": "photos", "from": f"{file}: topic"}
    assert found["home"] == {"value": str(folder / "etc" / "data"), "from": "--home"}


def test_jars_and_backbones_are_per_user_unless_the_home_has_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    first, second = read_settings(home=folder / "1"), read_settings(home=folder / "2")
    assert first.jars_dir == second.jars_dir == folder / "cache" / "imagestream" / "jars"
    assert first.backbones_dir == folder / "cache" / "imagestream" / "backbones"
    (folder / "2" / "jars").mkdir(parents=True)  # as in earlier versions
    assert second.jars_dir == folder / "2" / "jars"
    monkeypatch.setenv("IMAGESTREAM_JARS", str(folder / "own"))
    assert read_settings(home=folder / "2").jars_dir == folder / "own"
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))  # nothing can be created there
    assert first.jars_dir == folder / "1" / "jars"


def test_jars_in_a_folder_with_a_comma_are_refused(folder: Path) -> None:
    with pytest.raises(ServiceError, match="has a , in its path: choose another folder with IMAGESTREAM_JARS"):
        spark_jars(folder / "a, b")
    check = check_jars(Settings(home=folder, jars=folder / "a, b"))
    assert (check.found, check.ok) == (f"{folder / 'a, b'} has a , in its path", False)


def test_relative_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ivy, Kafka and Spark run in other folders, where relative paths would fail or point elsewhere."""
    names = [name for name in Settings.model_fields if is_place(name) and name != "config"]
    for name in names:
        monkeypatch.setenv(variable_of(name), f"places/{name}")
    settings = read_settings()
    assert {name: str(getattr(settings, name)) for name in names} == {
        name: str(folder / "places" / name) for name in names
    }
