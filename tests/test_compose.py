"""The containers: what docker-compose accepts, and what it cannot know: our settings, commands and limits."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from producer.message import HEADER_MARGIN_BYTES, MAX_MESSAGE_BYTES
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import app
from streaming.settings import Settings

CHECKOUT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
LONG_RUNNING = {name: service for name, service in SERVICES.items() if service.get("restart") == "unless-stopped"}
PINNED = re.compile(r"^[a-z0-9/-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*$")


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("env_file", ["empty", ".env.example"])
def test_docker_compose_accepts_the_file(env_file: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    path = CHECKOUT / env_file if env_file == ".env.example" else tmp_path / env_file
    environment = {"PATH": os.environ["PATH"]}  # not the variables of whoever runs the tests
    done = subprocess.run(
        ["docker-compose", "--env-file", str(path), "config", "-q"],  # noqa: S607
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "variable is not set" not in done.stderr


def test_every_part_of_the_service_keeps_running_and_tells_its_health() -> None:
    assert set(LONG_RUNNING) == {"kafka", "spark-master", "spark-worker", "stream", "retrain"}
    for name, service in LONG_RUNNING.items():
        assert service["healthcheck"]["test"][0] == "CMD", name


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_pinned_and_limited(name: str) -> None:
    assert PINNED.match(SERVICES[name]["image"])
    assert {"mem_limit", "cpus"} <= SERVICES[name].keys()


@pytest.mark.parametrize("name", SERVICES)
def test_service_refers_only_to_what_is_there(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("depends_on", {})) <= SERVICES.keys()
    for other, on in service.get("depends_on", {}).items():
        assert on["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
    for volume in service["volumes"]:
        assert volume.split(":")[0] in COMPOSE["volumes"]
    network = service.get("network_mode", "service:kafka")
    assert network.removeprefix("service:") in SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_of_ours_is_a_setting(name: str) -> None:
    ours = [key for key in SERVICES[name]["environment"] if key.startswith("IMAGESTREAM_")]
    assert {key.removeprefix("IMAGESTREAM_").lower() for key in ours} <= Settings.model_fields.keys()


def test_every_command_of_ours_exists() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named: set[str] = set()
    for service in SERVICES.values():
        line = " ".join([*service.get("entrypoint", ["imagestream"]), *service.get("command", [])])
        named |= set(re.findall(r"\bimagestream ([a-z]+)", line))
    assert {"stream", "train", "retrain", "publish"} <= named
    assert named <= known


def test_broker_takes_the_largest_image() -> None:
    assert SERVICES["kafka"]["environment"]["KAFKA_MESSAGE_MAX_BYTES"] == MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES


def test_example_environment_holds_exactly_the_variables_with_their_defaults() -> None:
    text = (CHECKOUT / "docker-compose.yml").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    example = (CHECKOUT / ".env.example").read_text(encoding="utf-8")
    assert dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE)) == defaults


def test_image_is_pinned_and_does_not_run_as_root() -> None:
    lines = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    sources = [line.split()[1] for line in lines if line.startswith("FROM ")]
    stages = [line.split()[3] for line in lines if line.startswith("FROM ") and " AS " in line]
    assert all(source in stages or PINNED.match(source) for source in sources)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1:] == ["imagestream"]


def test_image_copies_only_what_the_build_context_holds() -> None:
    lines = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {
        source for line in lines if line.startswith("COPY ") and "--from" not in line for source in line.split()[1:-1]
    }
    ignored = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((CHECKOUT / source).exists() for source in copied)
