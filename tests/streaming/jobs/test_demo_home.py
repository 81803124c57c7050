"""The demo removes an earlier demo if the user agrees, and nothing else."""

from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.jobs.demo_home import new_demo_home, record_contents
from streaming.settings import Settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Settings(home=tmp_path / "home")


def write(path: Path, content: str = "data") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def agree(question: str) -> bool:
    return True


def fake_demo(settings: Settings) -> Path:
    """Write the relevant files of a finished demo; returns its home."""
    demo = new_demo_home(settings, agree)
    for name in ("tables/predictions/part-0.parquet", "models/versions/00000001.json", "broker/data/images-0/0.log"):
        write(demo.work_dir / name)
    record_contents(demo)
    return demo.work_dir


@pytest.mark.parametrize(
    "made", ["tables/predictions/part-0.parquet", "models/versions/00000001.json", "broker/data/a-0/0.log"]
)
def test_users_home_is_unchanged(settings: Settings, made: str) -> None:
    file = write(settings.work_dir / made)
    for _ in range(2):
        assert fake_demo(settings) == settings.work_dir / "demo"
    assert file.read_text(encoding="utf-8") == "data"


def test_jars_and_backbones_are_shared(settings: Settings) -> None:
    write(settings.work_dir / "jars" / "spark" / "a.jar")
    assert (new_demo_home(settings, agree).jars_dir / "spark" / "a.jar").is_file()
    new_demo_home(settings, agree)
    assert (settings.work_dir / "jars" / "spark" / "a.jar").is_file()  # the link was removed, not its target


def test_earlier_demo_is_removed_only_if_the_user_agrees(settings: Settings) -> None:
    home = fake_demo(settings)
    asked: list[str] = []
    with pytest.raises(ServiceError, match="was kept: choose another home with --home PLACE"):
        new_demo_home(settings, lambda question: bool(asked.append(question)))
    assert asked == [f"Remove the earlier demo in {home}?"]
    assert (home / "models" / "versions" / "00000001.json").is_file()
    new_demo_home(settings, agree)
    assert not (home / "models").exists()


def test_killed_demo_can_be_removed(settings: Settings) -> None:
    file = write(new_demo_home(settings, agree).work_dir / "tables" / "predictions" / "part-0.parquet")
    new_demo_home(settings, agree)
    assert not file.exists()


@pytest.mark.parametrize(
    "name",
    [
        "tables/predictions/part-1.parquet",  # streamed
        "models/versions/00000002.json",  # trained
        "broker/data/images-0/0.log",  # published, not yet scored
        "broker/data/photos-0/0.log",  # published to another topic
        "photos/cat.jpg",
        "notes.txt",
    ],
)
def test_user_data_in_the_demo_home_is_never_removed(settings: Settings, name: str) -> None:
    home = fake_demo(settings)
    file = write(home / name, "user data")
    with pytest.raises(ServiceError, match=rf"holds data that the demo did not create \({name}\)"):
        new_demo_home(settings, agree)
    assert file.read_text(encoding="utf-8") == "user data"


@pytest.mark.parametrize("record", [None, "", "{", '{"made": 7}', '{"made": {}}', "[]"])
def test_folder_without_a_valid_record_is_not_a_demo(settings: Settings, record: str | None) -> None:
    file = write(settings.work_dir / "demo" / "models" / "versions" / "00000001.json")
    if record is not None:
        write(settings.work_dir / "demo" / "demo.json", record)
    with pytest.raises(ServiceError, match="data that the demo did not create"):
        new_demo_home(settings, agree)
    assert file.is_file()


def test_log_files_are_not_user_data(settings: Settings) -> None:
    home = fake_demo(settings)
    for name in ("spark.log", "spark.log.1", "log4j2.properties", "rewrite.lock", "broker/server.log", "report.png"):
        write(home / name)
    new_demo_home(settings, agree)
    assert not (home / "tables").exists()
