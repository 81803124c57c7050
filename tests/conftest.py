"""What tests share: the jars of the checkout, one real broker for the session, and homes with a trained model."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import hypothesis
import pytest

from models.backbone import DEFAULT_BACKBONE, ExportedBackbone, export_backbone
from streaming.platform.broker import start_broker, stop_broker
from streaming.platform.jars import install_jars
from streaming.platform.java import find_java
from streaming.platform.kafka_node import free_port
from streaming.settings import Settings

# No deadline, for machines differ; the same examples in every run, so that what is green stays green.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def jars_dir() -> Path:
    """The checkout's own jars, fetched if they are not there yet."""
    home = CHECKOUT / ".imagestream"
    install_jars(home / "jars", find_java(home))
    return home / "jars"


@pytest.fixture(scope="session")
def broker(jars_dir: Path, exports: Path) -> Iterator[Settings]:
    """Settings with a home of their own and the address of a real broker there, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="imagestream-") as directory:
        home = Path(directory)
        if (CHECKOUT / ".imagestream" / "java").is_dir():  # the Java that `make` installed where there was none
            (home / "java").symlink_to(CHECKOUT / ".imagestream" / "java")
        settings = Settings(home=home, jars=jars_dir, backbones=exports, bootstrap_servers=None)
        state, _ = start_broker(settings, free_port())
        try:
            yield settings.model_copy(update={"bootstrap_servers": state.address})
        finally:
            stop_broker(settings)


@pytest.fixture(scope="session")
def exports() -> Path:
    """The checkout's own exported backbones; their key tells when one is out of date."""
    return CHECKOUT / ".imagestream" / "backbones"


@pytest.fixture(scope="session")
def exported(exports: Path) -> ExportedBackbone:
    """The default backbone with its ImageNet weights."""
    return export_backbone(DEFAULT_BACKBONE, "imagenet", exports)


def imagestream(settings: Settings, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """Run a command of `imagestream` as a process of its own; returns what it wrote for `--json`."""
    summary = settings.home / "summary.json"
    summary.unlink(missing_ok=True)
    command = [sys.executable, "-m", "streaming", "--home", str(settings.home), *map(str, arguments)]
    environment = {"IMAGESTREAM_JARS": str(settings.jars), "IMAGESTREAM_TOPIC": settings.topic}
    if settings.backbones:
        environment["IMAGESTREAM_BACKBONES"] = str(settings.backbones)
    if settings.bootstrap_servers:
        environment["IMAGESTREAM_BOOTSTRAP_SERVERS"] = settings.bootstrap_servers
    done = subprocess.run(
        [*command, "--json", str(summary)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}"
    return json.loads(summary.read_text()) if summary.exists() else {"stderr": done.stderr}


@pytest.fixture(scope="session")
def trained(jars_dir: Path, exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one model version, trained on 300 digits; for copying, not for changing."""
    home = tmp_path_factory.mktemp("trained")
    result = imagestream(
        Settings(home=home, jars=jars_dir, backbones=exports), "train", "--dataset", "digits", "--limit", 300
    )
    assert result["version"] == 1
    assert result["promoted"]
    return home


NewService = Callable[[], Settings]


@pytest.fixture(scope="session")
def new_service(broker: Settings, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> NewService:
    """Makes settings of a service of its own: a home with a trained model, a topic that nobody else uses."""

    def make() -> Settings:
        home = tmp_path_factory.mktemp("service") / "home"
        shutil.copytree(trained, home, symlinks=True)
        return broker.model_copy(update={"home": home, "topic": f"images-{uuid4().hex[:8]}"})

    return make


@pytest.fixture
def service(new_service: NewService) -> Settings:
    """A service of this test alone."""
    return new_service()
