"""Finding files by paths, folders and patterns."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from producer.errors import PublishError
from producer.sources import LabelFrom, find_files


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `photos` in the working directory, with two labels, unusual names and a hidden file."""
    for name in ("cat/b.jpg", "cat/a.jpg", "dog/un été.png", "dog/.hidden", "readme.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*paths: str | Path) -> list[str]:
    return [file.name for file in find_files(paths).files]


def test_folder_yields_every_file_below_it_in_order(tree: Path) -> None:
    assert names("photos") == [
        "photos/cat/a.jpg",
        "photos/cat/b.jpg",
        "photos/dog/.hidden",
        "photos/dog/un été.png",
        "photos/readme.txt",
    ]
    assert names("./photos/dog/") == ["./photos/dog/.hidden", "./photos/dog/un été.png"]
    assert names(tree / "photos/cat")[0] == f"{tree}/photos/cat/a.jpg"


def test_patterns_are_expanded_and_folders_walked(tree: Path) -> None:
    assert names("photos/*/*.jpg") == ["photos/cat/a.jpg", "photos/cat/b.jpg"]
    assert names("photos/**/*.png") == ["photos/dog/un été.png"]
    assert names("photos/c*") == ["photos/cat/a.jpg", "photos/cat/b.jpg"]


def test_file_name_that_looks_like_a_pattern_is_literal(tree: Path) -> None:
    (tree / "a[1].jpg").write_bytes(b"x")
    assert names("a[1].jpg") == ["a[1].jpg"]


def test_file_reached_in_several_ways_is_listed_once(tree: Path) -> None:
    (tree / "photos/cat/z-link.jpg").symlink_to("a.jpg")
    assert names("photos/cat/b.jpg", "photos", "photos/cat", "./photos/cat/*.jpg").count("photos/cat/b.jpg") == 1
    assert names("photos/cat") == ["photos/cat/a.jpg", "photos/cat/b.jpg"]


def test_circular_links_are_walked_once(tree: Path) -> None:
    (tree / "photos/cat/up").symlink_to("..")
    assert len(names("photos")) == 5


def test_linked_folder_is_followed(tree: Path) -> None:
    (tree / "elsewhere").mkdir()
    (tree / "elsewhere/x.jpg").write_bytes(b"x")
    (tree / "photos/more").symlink_to(tree / "elsewhere")
    assert "photos/more/x.jpg" in names("photos")


def test_pipe_in_a_folder_is_ignored(tree: Path) -> None:
    os.mkfifo(tree / "photos/cat/pipe")
    assert names("photos/cat") == ["photos/cat/a.jpg", "photos/cat/b.jpg"]


def test_broken_and_circular_links_are_reported(tree: Path) -> None:
    (tree / "photos/cat/gone.jpg").symlink_to("nowhere")
    (tree / "photos/cat/self.jpg").symlink_to("self.jpg")
    found = find_files(["photos"])
    assert found.unreadable == [
        ("photos/cat/gone.jpg", "broken symbolic link"),
        ("photos/cat/self.jpg", "Too many levels of symbolic links"),
    ]
    assert len(found.files) == 5


def test_label_is_the_name_of_the_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {file.name: file.label for file in find_files(["photos"], LabelFrom.PARENT).files}
    assert labels["photos/cat/a.jpg"] == "cat"
    assert labels["photos/dog/un été.png"] == "dog"
    monkeypatch.chdir(tree / "photos/cat")
    assert {file.label for file in find_files(["a.jpg", "."], "parent").files} == {"cat"}
    assert {file.label for file in find_files(["a.jpg"]).files} == {None}


def make_empty(tree: Path) -> None:
    (tree / "empty/inner").mkdir(parents=True)


def make_pipe(tree: Path) -> None:
    os.mkfifo(tree / "pipe")


def make_nothing(tree: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("path", "prepare", "expected"),
    [
        ("nowhere", make_nothing, "does not exist"),
        ("photos/*.gif", make_nothing, "matches nothing"),
        ("empty", make_empty, "contains no files"),
        ("pipe", make_pipe, "is not a regular file"),
    ],
)
def test_invalid_path_is_a_one_line_error(
    tree: Path, path: str, prepare: Callable[[Path], None], expected: str
) -> None:
    prepare(tree)
    with pytest.raises(PublishError) as caught:
        find_files(["photos", path])
    assert path in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_paths_and_an_unknown_label_source_are_errors(tree: Path) -> None:
    with pytest.raises(PublishError, match="nothing to publish"):
        find_files([])
    with pytest.raises(PublishError, match="expected parent or none, got 'name'"):
        find_files(["photos"], "name")
