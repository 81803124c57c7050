"""The containers: docker-compose accepts the files, and their settings, commands and limits are correct."""

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
from streaming.durations import parse_duration
from streaming.errors import ServiceError
from streaming.pipeline.metrics import Metrics
from streaming.settings import Settings
from streaming.storage.store import Store, open_store
from tests.faults.harness import wait_until
from tests.object_store import WEED, free_pair
from tests.test_topology import process

CHECKOUT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
DEPLOY = CHECKOUT / "docs" / "deploy"
SECURE = yaml.safe_load((DEPLOY / "secure.yml").read_text(encoding="utf-8"))
S3 = yaml.safe_load((DEPLOY / "s3.yml").read_text(encoding="utf-8"))
LAYERS = {"open": [], "secured": ["secure"], "s3": ["s3"], "secured-s3": ["secure", "s3"]}  # on docker-compose.yml
ADDED: dict[str, Any] = {name: S3["services"][name] for name in ("s3", "first-bucket")}
OWN_SERVICES = {name: service for name, service in SERVICES.items() if service["image"].startswith("imagestream:")}
PROFILES = ["", *sorted({one for service in SERVICES.values() for one in service.get("profiles", [])})]
LONG_RUNNING = {name: service for name, service in SERVICES.items() if service.get("restart") == "unless-stopped"}
PINNED = re.compile(r"imagestream:\d+\.\d+\.\d+|[a-z0-9/-]+:v?\d+\.\d+(\.\d+[a-z0-9.-]*)?@sha256:[0-9a-f]{64}")
needs_docker_compose = pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="docker-compose is not installed"
)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder with the env files that docker-compose itself reads; it passes only the paths of other secrets."""
    for name in ("writer", "reader"):
        (tmp_path / f"s3-{name}.env").write_text(f"AWS_ACCESS_KEY_ID={name}\nAWS_SECRET_ACCESS_KEY=hidden-{name}\n")
    return tmp_path


def resolved(layers: list[str], secrets: Path, *options: str, env_file: Path) -> dict[str, Any]:
    """The services as docker-compose resolves them from the files."""
    files = ["docker-compose.yml", *(f"docs/deploy/{layer}.yml" for layer in layers)]
    chosen = [word for file in files for word in ("-f", file)]
    done = subprocess.run(
        ["docker-compose", "--env-file", str(env_file), *chosen, *options, "config"],  # noqa: S607
        cwd=CHECKOUT,
        env={"PATH": os.environ["PATH"], "SECRETS_DIR": str(secrets)},  # not the variables of the test process
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "variable is not set" not in done.stderr
    services: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
    return services


@needs_docker_compose
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_accepts_every_profile(profile: str, layers: list[str], secrets: Path) -> None:
    (secrets / "empty").touch()
    found = resolved(layers, secrets, *(["--profile", profile] if profile else []), env_file=secrets / "empty")
    assert {name for name, one in SERVICES.items() if profile in one.get("profiles", [])} <= found.keys()


@needs_docker_compose
def test_containers_share_no_state_with_the_home_in_a_bucket(secrets: Path) -> None:
    options = ["--profile", "by-hand", "--profile", "observability"]
    found = resolved(["s3"], secrets, *options, env_file=CHECKOUT / ".env.example")
    mounted = [
        volume.split(":")[0] for one in found.values() for volume in one["volumes"] if not volume.startswith("/")
    ]
    assert {volume for volume in mounted if mounted.count(volume) > 1} == {"secrets", "scrape", "spark-conf"}
    local = {name for name in OWN_SERVICES if not found[name]["environment"]["IMAGESTREAM_HOME"].startswith("s3://")}
    assert local == {"spark-master", "first-secrets"}  # they use no home
    keys = {name: one["environment"].get("AWS_ACCESS_KEY_ID") for name, one in found.items() if "environment" in one}
    writers = {"spark-worker", "first-bucket", "first-model", "stream", "retrain", "maintain", "dashboard", "cli"}
    assert {name for name, key in keys.items() if key == "writer"} == writers
    assert {name for name, key in keys.items() if key == "reader"} == {"gateway"}
    for name, one in found.items():
        assert "hidden-" not in json.dumps([one.get("entrypoint"), one.get("command"), one.get("healthcheck")]), name


def test_long_running_services_have_health_checks() -> None:
    always = {"kafka", "spark-master", "spark-worker", "stream", "retrain", "maintain", "gateway", "dashboard"}
    assert set(LONG_RUNNING) == always | {"prometheus", "grafana"}
    for name, service in (*LONG_RUNNING.items(), ("s3", ADDED["s3"])):
        assert service["healthcheck"]["test"][0] == "CMD", name


@pytest.mark.parametrize(("name", "service"), (SERVICES | ADDED).items(), ids=SERVICES | ADDED)
def test_service_has_a_pinned_image_and_resource_limits(name: str, service: dict[str, Any]) -> None:
    assert PINNED.fullmatch(service["image"])
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_references_of_a_service_exist(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("depends_on", {})) <= SERVICES.keys()
    for other, on in service.get("depends_on", {}).items():
        assert on["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        assert (CHECKOUT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]
    network = service.get("network_mode", "service:kafka")
    assert network.removeprefix("service:") in SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_imagestream_variables_are_settings(name: str) -> None:
    layers = SERVICES[name], SECURE["services"].get(name, {}), S3["services"].get(name, {})
    variables = [key for layer in layers for key in layer.get("environment", {}) if key.startswith("IMAGESTREAM_")]
    assert {key.removeprefix("IMAGESTREAM_").lower() for key in variables} <= Settings.model_fields.keys()


def test_imagestream_commands_exist() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named: set[str] = set()
    for service in SERVICES.values():
        line = " ".join([*service.get("entrypoint", []), *service.get("command", [])])
        named |= set(re.findall(r"\bimagestream ([a-z]+)", line))
    started = [one["command"] for one in OWN_SERVICES.values() if "command" in one and "entrypoint" not in one]
    named |= {command[0] for command in started}
    assert {"stream", "train", "retrain", "maintain", "publish", "gateway", "dashboard"} <= named
    assert named <= known


def test_broker_accepts_the_largest_image() -> None:
    assert SERVICES["kafka"]["environment"]["KAFKA_MESSAGE_MAX_BYTES"] == MAX_MESSAGE_BYTES + HEADER_MARGIN_BYTES


def test_example_environment_lists_every_variable_with_its_default() -> None:
    files = CHECKOUT / "docker-compose.yml", DEPLOY / "secure.yml", DEPLOY / "s3.yml"
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    example = (CHECKOUT / ".env.example").read_text(encoding="utf-8")
    assert dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE)) == defaults


def test_image_has_pinned_bases_and_a_non_root_user() -> None:
    lines = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    sources = [line.split()[1] for line in lines if line.startswith("FROM ")]
    stages = [line.split()[3] for line in lines if line.startswith("FROM ") and " AS " in line]
    assert all(source in stages or PINNED.fullmatch(source) for source in sources)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1:] == ["10001"]
    assert any("useradd" in line and "--uid 10001" in line for line in lines)


def test_image_copies_exactly_the_build_context() -> None:
    lines = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {
        source for line in lines if line.startswith("COPY ") and "--from" not in line for source in line.split()[1:-1]
    }
    ignored = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((CHECKOUT / source).exists() for source in copied)


def test_image_contains_jars_and_backbones_at_the_configured_paths() -> None:
    text = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8")
    places = set(re.findall(r"IMAGESTREAM_(?:JARS|BACKBONES)=(\S+)", text))
    assert len(places) == 2
    assert places == set(re.findall(r"^COPY --from=build --chown=\S+ (/opt/imagestream\S*) \1$", text, re.MULTILINE))


def test_containers_drop_all_capabilities_and_are_read_only() -> None:
    for name, service in OWN_SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"], name
        assert any(place.startswith("/tmp:") for place in service["tmpfs"]), name


def test_web_uis_of_spark_listen_on_loopback() -> None:
    for name in ("spark-master", "spark-worker", "stream"):
        assert SERVICES[name]["environment"]["SPARK_LOCAL_IP"] == "127.0.0.1", name
        assert not SERVICES[name].get("ports"), name


def test_only_spark_containers_mount_the_cluster_secret() -> None:
    conf = "spark-conf:/etc/spark"
    mounts = {
        name: [one for one in service["volumes"] if one.startswith("spark-conf:")]
        for name, service in OWN_SERVICES.items()
    }
    cluster = {"spark-master", "spark-worker", "stream"}
    assert {name: found for name, found in mounts.items() if found} == {
        "first-secrets": [conf],
        **{name: [f"{conf}:ro"] for name in cluster},
    }
    assert {name for name in OWN_SERVICES if "SPARK_CONF_DIR" in SERVICES[name]["environment"]} == cluster
    assert {SERVICES[name]["environment"]["SPARK_CONF_DIR"] for name in cluster} == {"/etc/spark"}
    install = next(line for line in (CHECKOUT / "Dockerfile").read_text().splitlines() if "-m 700" in line)
    assert install.split()[-2:] == ["/secrets", "/etc/spark"]


def test_first_secrets_are_random_private_and_created_once(tmp_path: Path) -> None:
    script = SERVICES["first-secrets"]["entrypoint"][2]
    for folder in ("/secrets", "/scrape", "/etc/spark"):
        (tmp_path / folder.strip("/")).mkdir(parents=True)
        script = script.replace(f'"{folder}/', f'"{tmp_path}{folder}/')
    contents = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        copy = files.pop(1)
        assert [path.name for path in files] == ["spark-defaults.conf", "dashboard-token", "gateway-api-key"]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
        assert copy.read_text() == files[-1].read_text()
        contents.append([path.read_text() for path in files])
    assert contents[0] == contents[1]
    conf, *keys = contents[0]
    settings = dict(line.split() for line in conf.splitlines())
    assert (settings["spark.authenticate"], settings["spark.network.crypto.enabled"]) == ("true", "true")
    random = [settings["spark.authenticate.secret"], *keys]
    assert len(set(random)) == len(random)
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in random)


def test_compose_files_contain_no_secret() -> None:
    for service in (one for file in (COMPOSE, SECURE, S3) for one in file["services"].values()):
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|API_KEY", key):
                assert key.endswith("_FILE"), key
                assert value.startswith(("/run/secrets/", "/secrets/")), key


def test_secured_kafka_has_no_plaintext_listener_outside_its_container() -> None:
    kafka = SECURE["services"]["kafka"]["environment"]
    protocols = dict(one.split(":") for one in kafka["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    for listener in kafka["KAFKA_LISTENERS"].split(","):
        name, _, address = listener.partition("://")
        assert protocols[name] == "SASL_SSL" or address.startswith("localhost:"), listener
    clients = {name for name, one in SERVICES.items() if "kafka" in one.get("depends_on", {})}
    assert clients <= SECURE["services"].keys()


def test_grafana_queries_only_exported_metrics() -> None:
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "imagestream.json").read_text(encoding="utf-8"))
    queried = set(
        re.findall(r"imagestream_\w+", " ".join(one["expr"] for p in board["panels"] for one in p["targets"]))
    )
    exported = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    families = {family.name for family in Metrics().registry.collect()}
    for name in queried:
        stem = re.sub("_(total|sum|count|bucket)$", "", name)
        assert name in exported or stem in families, name
    port = SERVICES["stream"]["command"][SERVICES["stream"]["command"].index("--metrics-port") + 1]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scraped}
    gateway = SERVICES["gateway"]["command"][SERVICES["gateway"]["command"].index("--port") + 1]
    assert targets == {"imagestream": [f"127.0.0.1:{port}"], "imagestream-gateway": [f"gateway:{gateway}"]}
    key = Path(scraped[1]["authorization"]["credentials_file"])
    users = {name for name, one in SERVICES.items() if any(v.startswith("scrape:") for v in one["volumes"])}
    assert (str(key), users) == ("/scrape/gateway-api-key", {"first-secrets", "prometheus"})
    assert f"scrape:{key.parent}:ro" in SERVICES["prometheus"]["volumes"]
    if shutil.which("promtool"):
        command = ["promtool", "check", "config", "--syntax-only", str(DEPLOY / "prometheus.yml")]
        assert subprocess.run(command, check=False).returncode == 0


def test_intervals_have_a_unit_and_are_at_least_an_hour() -> None:
    for name in ("retrain", "maintain"):
        found = re.search(r":-(\w+)\}", SERVICES[name]["command"][2])
        assert found
        assert parse_duration(found[1], plain=None) >= 3_600


def test_hadolint_accepts_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CHECKOUT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def make_secrets(heading: str, folder: Path) -> Path:
    """Run the commands of a section of docs/deploy.md that create secret files."""
    text = (CHECKOUT / "docs" / "deploy.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    steps = re.search(r"^    mkdir -m 700.*?^    chmod[^\n#]*", text, re.MULTILINE | re.DOTALL)
    assert steps
    script = "\n".join(line.removeprefix("    ") for line in steps[0].splitlines())
    subprocess.run(["bash", "-ec", script], cwd=folder, capture_output=True, check=True, timeout=300)  # noqa: S607
    return folder / "secrets"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_documented_commands_create_the_secrets(tmp_path: Path) -> None:
    secrets = make_secrets("Kafka with TLS, users and rights", tmp_path)
    assert set(SECURE["secrets"]) <= {path.name for path in secrets.iterdir()}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(secrets / "broker.pem")
    names = ["-verify_hostname", "kafka", "-CAfile", str(secrets / "ca.pem"), str(secrets / "broker.crt")]
    subprocess.run(["openssl", "verify", *names], capture_output=True, check=True)  # noqa: S607


def created(store: Store) -> bool:
    try:
        store.create("a", b"")
    except ServiceError:
        return False
    return True


@pytest.mark.skipif(
    not WEED.exists() or shutil.which("openssl") is None, reason="SeaweedFS or openssl is not installed"
)
def test_s3_server_accepts_objects_of_the_writer_only(tmp_path: Path) -> None:
    secrets = make_secrets("A home in a bucket", tmp_path)
    ports = {name: free_pair() for name in ("master", "volume", "filer", "s3")}
    places = {"-dir=/objects": f"-dir={tmp_path}", "-s3.config=/run/secrets/s3.json": f"-s3.config={secrets}/s3.json"}
    arguments = [places.get(word, word) for word in ADDED["s3"]["entrypoint"][1:] if not word.startswith("-s3.port=")]
    command = [str(WEED), *arguments, *(f"-{name}.port={port}" for name, port in ports.items())]
    with process("s3", tmp_path, command) as server:
        options = {"aws_endpoint": f"http://127.0.0.1:{ports['s3']}", "aws_region": "us-east-1"}
        stores = {}
        for role in ("writer", "reader"):
            lines = (secrets / f"s3-{role}.env").read_text().split()
            keys = {name.lower(): value for name, _, value in (line.partition("=") for line in lines)}
            stores[role] = open_store("s3://imagestream/home", {**options, **keys, "aws_allow_http": "true"})
        # The first object creates the bucket; a server that has just started may refuse it.
        wait_until(lambda: created(stores["writer"]), lambda: "no bucket")
        stores["writer"].put("a", b"1")
        assert stores["reader"].get("a") == b"1"
        assert [one.key for one in stores["reader"].list()] == ["a"]
        for change in (lambda: stores["reader"].put("a", b"2"), lambda: stores["reader"].delete(["a"])):
            with pytest.raises(ServiceError):
                change()
        assert stores["writer"].get("a") == b"1"
        server.kill()  # a regular exit waits to notify other servers, and there are none
