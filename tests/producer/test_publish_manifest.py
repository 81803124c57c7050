"""Manifests: files named in a CSV or on standard input."""

import io
import os
import re
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.errors import PublishError
from producer.labelled_csv import PATH_COLUMNS
from producer.manifest import MAX_LINE_BYTES, read_csv, read_lines
from producer.message import read_headers
from producer.sources import LabelFrom
from streaming.images.labels_csv import read_labels
from streaming.platform.broker import bootstrap_servers
from streaming.settings import Settings
from tests.producer.topics import messages

JPEG = b"\xff\xd8\xff"


def rows(path: Path) -> list[tuple[str, str | None]]:
    return [(file.name, file.label) for file in read_csv(path).files]


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    return tmp_path / "list.csv"


def test_paths_are_relative_to_the_csv_and_names_are_arbitrary(listed: Path) -> None:
    listed.write_text('label, Path ,other\ncat,"a, b.jpg",x\n,sub/*.jpg,\n"un ""été""",/abs/c.jpg,\n\n', "utf-8-sig")
    folder = str(listed.parent)
    assert rows(listed) == [(f"{folder}/a, b.jpg", "cat"), (f"{folder}/sub/*.jpg", None), ("/abs/c.jpg", 'un "été"')]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "expected a header path,label and at least one row, got an empty file"),
        (b"path,label\n", "expected a header path,label and at least one row, got only the header"),
        (b"a.jpg,cat\n", "line 1: expected a header with the columns label and one of path, .*, got 'a.jpg,cat'"),
        (b"path,label\na.jpg,cat\n,dog\n", "line 3: expected a path, got ''"),
        (b"path,label\na\0.jpg,cat\n", "line 2: expected a path, got"),
        (b"path,label\na.jpg,\xff\n", "line 1 or later: not UTF-8"),
        (b'path,label\na.jpg,"cat\n', "line 2: not valid CSV: unexpected end of data"),
        (b"path,label\na.jpg," + b"x" * 1025, "line 2: the label has 1,025 characters"),
        (b"path,label\n" + b"a" * (MAX_LINE_BYTES + 1), "line 2: longer than 16,384 characters"),
        (b'path,label\na.jpg,"' + b"x\n" * 200_000, "line [0-9]+: not valid CSV: field larger than field limit"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_csv_is_rejected_with_its_name_and_line(listed: Path, content: bytes, reason: str) -> None:
    listed.write_bytes(content)
    with pytest.raises(PublishError) as refused:
        read_csv(listed)
    assert str(listed) in str(refused.value)
    assert re.search(reason, str(refused.value)), refused.value


def test_csv_with_too_many_rows_is_rejected(listed: Path) -> None:
    listed.write_text("path,label\n" + "".join(f"{n}.jpg,cat\n" for n in range(6)))
    assert len(rows(listed)) == 6
    with pytest.raises(PublishError, match="line 7: more than 5 rows; split the file"):
        read_csv(listed, max_rows=5)


CONTENT = "path,label\na.jpg,NA\nb c.jpg,007\nd.jpg,\n"
LABELS = {"a.jpg": "NA", "b c.jpg": "007", "d.jpg": None}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbf" + CONTENT.replace("\n", "\r\n").encode(), LABELS),
        (b"sep=;\r\n" + CONTENT.replace(",", ";").encode(), LABELS),
        (CONTENT.replace(",", "\t").encode("utf-16"), LABELS),
        (CONTENT.encode("utf-16-le"), LABELS),
        (CONTENT.replace("path", "File Name").replace("label", "Class").encode(), LABELS),
        (CONTENT.replace("\n", ",\n").encode(), LABELS),  # a comma at the end of each line
        (CONTENT.replace("\n", "\r").encode(), LABELS),
        (b'path,label\n"a.jpg","big\ncat"\n"b c.jpg"," 7.0"\n', {"a.jpg": "big cat", "b c.jpg": "7.0"}),
        (b'path,label\n"a.jpg","a \\"big\\" cat"\n"b c.jpg","a, b"\n', {"a.jpg": 'a "big" cat', "b c.jpg": "a, b"}),
        (b"path,label\nC:\\photos\\cats\\a.jpg,None\ncats\\b.jpg,nan\n", {"cats/a.jpg": "None", "cats/b.jpg": "nan"}),
        (
            b"path,label\n/photos/cats/a.jpg,<b>\n/photos/cats/c.jpg,x\n",
            {"cats/a.jpg": "<b>", "/photos/cats/c.jpg": "x"},
        ),
        (b"path,label\na.jpg,1\n./a.jpg,1\na.jpg,1\n", {"a.jpg": "1", "./a.jpg": "1"}),
        ("path,label\nK\u00f6ln.jpg,P\u00eache\n".encode(), {"Ko\u0308ln.jpg": "P\u00eache"}),
        ("path,label\na.jpg,Pe\u0302che\n".encode(), {"a.jpg": "P\u00eache"}),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_common_csv_dialects_are_read(listed: Path, content: bytes, expected: dict[str, str | None]) -> None:
    (listed.parent / "cats").mkdir()
    for name in ("cats/a.jpg", "cats/b.jpg", "Ko\u0308ln.jpg"):
        (listed.parent / name).touch()
    listed.write_bytes(content)
    below = {os.path.join(listed.parent, name): label for name, label in expected.items()}  # noqa: PTH118
    assert dict(rows(listed)) == below
    # Training reads the same labels.
    assert set(read_labels(listed, PATH_COLUMNS).labels.values()) == {label for label in below.values() if label}


def test_file_with_conflicting_labels_is_skipped_and_reported(listed: Path) -> None:
    listed.write_text("path,label\na.jpg,cat\na.jpg,dog\nb.jpg,cat\n")
    found = read_csv(listed)
    assert [file.label for file in found.files] == ["cat"]
    assert found.unreadable == [(f"{listed.parent}/a.jpg", "rows of the CSV give it different labels")]


@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"path,label\n" + content)
    with suppress(PublishError):
        assert rows(path)


def test_lines_are_read_lazily(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as source, os.fdopen(writing, "wb", buffering=0) as target:
        sources = read_lines(source, LabelFrom.PARENT)
        files = iter(sources.files)
        target.write(b"cat/a b.jpg \r\n")
        first = next(files)
        assert (first.name, first.label) == ("cat/a b.jpg ", "cat")
        target.write(b"\n\xff.jpg\n")
        assert next(files).name == os.fsdecode(b"\xff.jpg")
        assert sources.total is None


def test_line_that_is_too_long_is_rejected_with_its_number() -> None:
    files = iter(read_lines(io.BytesIO(b"a.jpg\n" + b"x" * (MAX_LINE_BYTES + 1))).files)
    assert next(files).name == "a.jpg"
    with pytest.raises(PublishError, match="standard input, line 2: longer than"):
        next(files)


def test_command_publishes_a_csv_or_standard_input_and_reports_missing_files(broker: Settings, tmp_path: Path) -> None:
    servers, topic = bootstrap_servers(broker), f"lists-{uuid.uuid4().hex[:8]}"
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(JPEG + name.encode())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list.csv").write_text("path,label\na.jpg,cat\nb.jpg,\ngone.jpg,cat\npipe,cat\n.,cat\n")
    command = [sys.executable, "-m", "streaming", "publish", "--bootstrap-servers", servers, "--topic", topic]

    done = subprocess.run(
        [*command, "--from-csv", str(tmp_path / "list.csv")], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert "sent 2 of 5 files" in done.stdout
    for name, reason in (
        ("gone.jpg", "No such file or directory"),
        ("pipe", "not a regular file"),
        (".", "not a regular"),
    ):
        assert f"{tmp_path}/{name}: unreadable: {reason}" in done.stderr

    done = subprocess.run(
        [*command, "-", "--label-from", "parent", "--rate", "20"],
        input=f"{tmp_path}/a.jpg\n\n{tmp_path}/b.jpg\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "sent 2 of 2 files" in done.stdout
    found = [(message.value[3:], read_headers(message.headers).label) for message in messages(servers, topic)]
    expected = [(b"a.jpg", "cat"), (b"a.jpg", tmp_path.name), (b"b.jpg", None), (b"b.jpg", tmp_path.name)]
    assert sorted(found, key=str) == sorted(expected, key=str)
