"""The containers: what docker-compose accepts, and what it cannot know: our settings, commands and limits."""

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from producer.message import HEADER_MARGIN_BYTES, MAX_MESSAGE_BYTES
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import app
from streaming.pipeline.metrics import Metrics
from streaming.settings import Settings

CHECKOUT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
DEPLOY = CHECKOUT / "docs" / "deploy"
SECURE = yaml.safe_load((DEPLOY / "secure.yml").read_text(encoding="utf-8"))
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("imagestream:")}
PROFILES = ["", *sorted({one for service in SERVICES.values() for one in service.get("profiles", [])})]
LONG_RUNNING = {name: service for name, service in SERVICES.items() if service.get("restart") == "unless-stopped"}
PINNED = re.compile(r"^[a-z0-9/-]+:(v?\d+\.\d+\.\d+[a-z0-9.-]*|RELEASE\.[\dTZ-]+)$")


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("env_file", ["empty", ".env.example"])
@pytest.mark.parametrize("secured", [False, True], ids=["open", "secured"])
@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_accepts_every_profile(profile: str, secured: bool, env_file: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    path = CHECKOUT / env_file if env_file == ".env.example" else tmp_path / env_file
    environment = {"PATH": os.environ["PATH"]}  # not the variables of whoever runs the tests
    files = ["-f", "docker-compose.yml", *(["-f", "docs/deploy/secure.yml"] if secured else [])]
    chosen = ["--profile", profile] if profile else []
    done = subprocess.run(
        ["docker-compose", "--env-file", str(path), *files, *chosen, "config"],  # noqa: S607
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "variable is not set" not in done.stderr
    assert {name for name, one in SERVICES.items() if profile in one.get("profiles", [])} <= services_of(done.stdout)


def services_of(resolved: str) -> set[str]:
    return set(yaml.safe_load(resolved)["services"])


def test_every_part_of_the_service_keeps_running_and_tells_its_health() -> None:
    always = {"kafka", "spark-master", "spark-worker", "stream", "retrain", "gateway", "dashboard"}
    assert set(LONG_RUNNING) == always | {"prometheus", "grafana", "minio", "s3-copy"}
    for name, service in LONG_RUNNING.items():
        assert service["healthcheck"]["test"][0] == "CMD", name


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_pinned_and_limited(name: str) -> None:
    assert PINNED.match(SERVICES[name]["image"])
    assert {"mem_limit", "cpus", "pids_limit"} <= SERVICES[name].keys()
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SERVICES)
def test_service_refers_only_to_what_is_there(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("depends_on", {})) <= SERVICES.keys()
    for other, on in service.get("depends_on", {}).items():
        assert on["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        assert (CHECKOUT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]
    assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys()
    network = service.get("network_mode", "service:kafka")
    assert network.removeprefix("service:") in SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_of_ours_is_a_setting(name: str) -> None:
    layers = SERVICES[name].get("environment", {}), SECURE["services"].get(name, {}).get("environment", {})
    ours = [key for layer in layers for key in layer if key.startswith("IMAGESTREAM_")]
    assert {key.removeprefix("IMAGESTREAM_").lower() for key in ours} <= Settings.model_fields.keys()


def test_every_command_of_ours_exists() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named: set[str] = set()
    for service in SERVICES.values():
        line = " ".join([*service.get("entrypoint", []), *service.get("command", [])])
        named |= set(re.findall(r"\bimagestream ([a-z]+)", line))
    started = [one["command"] for one in OURS.values() if "command" in one and "entrypoint" not in one]
    named |= {command[0] for command in started}
    assert {"stream", "train", "retrain", "publish", "gateway", "dashboard"} <= named
    assert named <= known


def test_broker_takes_the_largest_image() -> None:
    assert SERVICES["kafka"]["environment"]["KAFKA_MESSAGE_MAX_BYTES"] == MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES


def test_example_environment_holds_exactly_the_variables_with_their_defaults() -> None:
    files = CHECKOUT / "docker-compose.yml", DEPLOY / "secure.yml"
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    example = (CHECKOUT / ".env.example").read_text(encoding="utf-8")
    assert dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE)) == defaults


def test_image_is_pinned_and_does_not_run_as_root() -> None:
    lines = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    sources = [line.split()[1] for line in lines if line.startswith("FROM ")]
    stages = [line.split()[3] for line in lines if line.startswith("FROM ") and " AS " in line]
    assert all(source in stages or PINNED.match(source) for source in sources)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1:] == ["10001"]
    assert any("useradd" in line and "--uid 10001" in line for line in lines)


def test_image_copies_only_what_the_build_context_holds() -> None:
    lines = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {
        source for line in lines if line.startswith("COPY ") and "--from" not in line for source in line.split()[1:-1]
    }
    ignored = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((CHECKOUT / source).exists() for source in copied)


def test_container_of_ours_has_no_rights_beyond_its_user() -> None:
    for name, service in OURS.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"], name
        assert any(place.startswith("/tmp:") for place in service["tmpfs"]), name


def test_pages_of_spark_are_on_the_loopback_of_their_container() -> None:
    for name in ("spark-master", "spark-worker", "stream"):
        assert SERVICES[name]["environment"]["SPARK_LOCAL_IP"] == "127.0.0.1", name
        assert not SERVICES[name].get("ports"), name


def test_keys_of_the_object_store_are_on_no_command_line() -> None:
    (script,) = [part for part in SERVICES["s3-copy"]["entrypoint"] if "mirror" in part]
    lines = [line for line in script.splitlines() if "/run/secrets/" in line]
    assert lines
    assert all(line.strip().startswith("export ") for line in lines)


@pytest.mark.parametrize("name", SERVICES)
def test_port_is_open_to_this_machine_only(name: str) -> None:
    assert all(str(port).startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_no_secret_lies_in_the_files_themselves() -> None:
    for service in (*SERVICES.values(), *SECURE["services"].values()):
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|API_KEY", key):
                assert key.endswith("_FILE"), key
                assert value.startswith(("/run/secrets/", "/secrets/")), key


def test_secured_kafka_has_no_open_listener_beyond_its_container() -> None:
    kafka = SECURE["services"]["kafka"]["environment"]
    protocols = dict(one.split(":") for one in kafka["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    for listener in kafka["KAFKA_LISTENERS"].split(","):
        name, _, address = listener.partition("://")
        assert protocols[name] == "SASL_SSL" or address.startswith("localhost:"), listener
    clients = {name for name, one in SERVICES.items() if "kafka" in one.get("depends_on", {})}
    assert clients <= SECURE["services"].keys()


def test_grafana_asks_for_metrics_that_the_stream_serves() -> None:
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "imagestream.json").read_text(encoding="utf-8"))
    asked = set(re.findall(r"imagestream_\w+", " ".join(one["expr"] for p in board["panels"] for one in p["targets"])))
    served = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    families = {family.name for family in Metrics().registry.collect()}
    for name in asked:
        stem = re.sub("_(total|sum|count|bucket)$", "", name)
        assert name in served or stem in families, name
    port = SERVICES["stream"]["command"][SERVICES["stream"]["command"].index("--metrics-port") + 1]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == [f"127.0.0.1:{port}"]


def test_dockerfile_has_nothing_that_hadolint_minds() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CHECKOUT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_secrets_are_made_as_the_document_says(tmp_path: Path) -> None:
    text = (CHECKOUT / "docs" / "deploy.md").read_text(encoding="utf-8")
    steps = re.search(r"^    mkdir -m 700 secrets &&.*?^    chmod[^\n#]*", text, re.MULTILINE | re.DOTALL)
    assert steps
    script = "\n".join(line.strip() for line in steps[0].splitlines())
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, check=True, timeout=60)  # noqa: S607
    made = tmp_path / "secrets"
    wanted = set(SECURE["secrets"])
    assert wanted <= {path.name for path in made.iterdir()}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made / "broker.pem")
    names = ["-verify_hostname", "kafka", "-CAfile", str(made / "ca.pem"), str(made / "broker.crt")]
    subprocess.run(["openssl", "verify", *names], capture_output=True, check=True)  # noqa: S607
