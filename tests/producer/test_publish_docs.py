"""The Python and Java examples of docs/publish.md publish messages according to the contract."""

import os
import re
import shutil
import subprocess
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from producer import message as contract
from producer.message import EVENT_TYPE, read_headers
from streaming.platform.broker import bootstrap_servers
from streaming.platform.jars import broker_classpath
from streaming.platform.java import find_java
from streaming.settings import Settings
from tests.producer.topics import messages

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "publish.md").read_text(encoding="utf-8")
JPEG = b"\xff\xd8\xff and some bytes"
NAMES = {value for name, value in vars(contract).items() if name.startswith("HEADER_") and isinstance(value, str)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture
def servers(broker: Settings) -> str:
    return bootstrap_servers(broker)


@pytest.fixture
def local(servers: str) -> Callable[[str], tuple[str, str]]:
    """A function that adapts an example to the broker of the tests and a new topic; returns it and the topic."""

    def adapt(text: str) -> tuple[str, str]:
        topic = f"docs-{uuid.uuid4().hex[:8]}"
        return text.replace("127.0.0.1:9092", servers).replace('"images"', f'"{topic}"'), topic

    return adapt


def test_documented_headers_match_the_contract() -> None:
    table = DOCUMENT[DOCUMENT.index("| part | content |") : DOCUMENT.index("These are [CloudEvents]")]
    first_column = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`([^`]+)`", first_column)) == NAMES
    for language in ("sh", "java", "go"):
        (example,) = blocks(language)
        assert {name for name in NAMES if name.startswith("ce_") or name == "content-type"} <= set(
            re.findall(r"ce_[a-z]+|content-type", example)
        )
        assert EVENT_TYPE in example


def test_python_examples_publish(
    servers: str, local: Callable[[str], tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(JPEG)
    files, sender = blocks("python")
    names: dict[str, Any] = {"jpeg_bytes": JPEG}
    exec(local(files)[0], names)  # noqa: S102
    text, topic = local(sender)
    exec(text, names)  # noqa: S102
    (sent,) = messages(servers, topic)
    assert (sent.partition, sent.offset) == (names["place"].partition, names["place"].offset)
    assert (sent.value, read_headers(sent.headers).label) == (JPEG, "cat")


def test_java_example_publishes_an_equivalent_message(
    broker: Settings, servers: str, local: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    java = find_java(broker.work_dir)
    if not shutil.which("javac", path=os.pathsep.join([str(java.parent), os.environ["PATH"]])):
        pytest.skip("Java without a compiler")
    (example,) = blocks("java")
    text, topic = local(example)
    imports = "java.nio.charset.*", "java.nio.file.*", "java.security.*", "java.time.*", "java.util.*"
    imports += "org.apache.kafka.clients.producer.*", "org.apache.kafka.common.serialization.*"
    body = textwrap.indent(text, "        ")
    lines = [*(f"import {name};" for name in imports), "public class Publish {"]
    lines += ["    public static void main(String[] arguments) throws Exception {", body, "    }", "}"]
    (tmp_path / "Publish.java").write_text("\n".join(lines))
    (tmp_path / "cat.jpg").write_bytes(JPEG)
    command = [str(java), "-cp", broker_classpath(broker.jars_dir), "Publish.java"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (sent,) = messages(servers, topic)
    expected = contract.build_message(JPEG, "cat.jpg", label="cat")
    assert (sent.key, sent.value) == (expected.key, expected.value)
    without_time = {name: value for name, value in expected.headers if name != contract.HEADER_TIME}
    assert without_time.items() <= dict(sent.headers).items()
    assert set(dict(sent.headers)) == set(dict(expected.headers))
    assert f"{sent.partition} {sent.offset}" in done.stdout
