"""The manifests of docs/deploy/kubernetes, and the executors that Spark starts with their settings."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pyspark.sql import SparkSession

from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import app
from streaming.errors import ServiceError
from streaming.platform.executor import BACKEND, executor_command
from streaming.platform.kafka_node import free_port
from streaming.settings import Settings

CHECKOUT = Path(__file__).parent.parent
FILES = sorted((CHECKOUT / "docs" / "deploy" / "kubernetes").glob("*.yaml"))
MANIFESTS: list[Any] = [one for file in FILES for one in yaml.safe_load_all(file.read_text(encoding="utf-8"))]
SPARK: dict[str, str] = next(one["data"] for one in MANIFESTS if one["metadata"]["name"] == "imagestream-spark")
CONF = dict(line.split(maxsplit=1) for line in SPARK["spark-defaults.conf"].splitlines())


def name_of(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    pod: dict[str, Any] = spec.get("jobTemplate", {"spec": spec})["spec"]["template"]["spec"]
    return pod


PODS = {name_of(one): pod_of(one) for one in MANIFESTS if one["kind"] in {"Deployment", "Job", "CronJob"}}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=name_of)
def test_manifest_matches_the_schema_of_kubernetes(manifest: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="run `make setup` to install it")
    validator.validate(manifest, "1.37", strict=True)


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_references_of_a_pod_exist_and_secrets_are_not_inline(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    names = {(one["kind"], one["metadata"]["name"]) for one in MANIFESTS}
    assert ("ServiceAccount", pod["serviceAccountName"]) in names
    assert pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["image"] == CONF["spark.kubernetes.container.image"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    kept = [volume for volume in pod["volumes"] if not {"secret", "configMap"} & volume.keys()]
    assert [(one["name"], set(one)) for one in kept] == [("work", {"name", "emptyDir"})]  # no shared volume
    for source in container["envFrom"]:
        assert ("ConfigMap", source["configMapRef"]["name"]) in names
    for variable in container["env"]:
        if re.search("KEY|SECRET|PASSWORD|TOKEN", variable["name"]) and not variable["name"].endswith("_FILE"):
            assert set(variable["valueFrom"]) == {"secretKeyRef"}, variable["name"]


def test_probes_and_scrapes_use_ports_that_the_pod_serves() -> None:
    stream = next(one for one in MANIFESTS if name_of(one) == "Deployment imagestream-stream")
    (container,) = PODS["Deployment imagestream-stream"]["containers"]
    (port,) = container["ports"]
    args, variables = container["args"], {one["name"]: one.get("value") for one in container["env"]}
    assert int(args[args.index("--metrics-port") + 1]) == port["containerPort"]
    assert variables["IMAGESTREAM_METRICS_HOST"] == "0.0.0.0"  # noqa: S104  of the pod alone
    assert stream["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    for name in ("imagestream-stream", "imagestream-gateway"):
        (container,) = PODS[f"Deployment {name}"]["containers"]
        ports = {one for port in container["ports"] for one in port.values()}
        for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
            found = container[probe]["httpGet"]
            assert (found["path"], found["port"] in ports) == (path, True), name


def test_settings_and_commands_in_the_manifests_exist() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    shared: dict[str, str] = next(one["data"] for one in MANIFESTS if name_of(one) == "ConfigMap imagestream")
    variables, named = set(shared), set()
    for pod in PODS.values():
        (container,) = pod["containers"]
        variables |= {variable["name"] for variable in container["env"]}
        named |= set(container.get("args", [])[:1])
        named |= set(re.findall(r"\bimagestream ([a-z]+)", " ".join(container.get("command", []))))
    settings = {name.removeprefix("IMAGESTREAM_").lower() for name in variables if name.startswith("IMAGESTREAM_")}
    assert settings <= Settings.model_fields.keys()
    assert {"stream", "train", "retrain", "maintain", "gateway", "dashboard"} <= named <= known


@pytest.fixture(scope="module")
def executor(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The executor pod that Spark requests from Kubernetes with the settings of the manifests."""
    jvm: Any = spark.sparkContext._jvm
    template = tmp_path_factory.mktemp("kubernetes") / "executor.yaml"
    template.write_text(SPARK["executor.yaml"])
    driver = {
        "spark.app.name": "imagestream",
        "spark.master": "k8s://https://kubernetes.default.svc",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.port": str(free_port()),
        "spark.executor.extraJavaOptions": "-Dfirst=1 '-Dsecond=with a space'",
        "spark.kubernetes.executor.podTemplateFile": str(template),
    }
    conf = jvm.org.apache.spark.SparkConf(False)
    for name, value in (CONF | driver).items():
        conf.set(name, value)
    none = jvm.scala.Option.empty()
    default_entry = getattr(jvm.org.apache.spark.SecurityManager, "$lessinit$greater$default$3")()
    security = jvm.org.apache.spark.SecurityManager(conf, none, default_entry)
    security.initializeAuth()
    pods = jvm.org.apache.spark.deploy.k8s.KubernetesExecutorConf(conf, "spark-application-1", "7", none, 0)
    profiles = jvm.java.lang.Class.forName("org.apache.spark.resource.ResourceProfile$").getField("MODULE$").get(None)
    client = jvm.io.fabric8.kubernetes.client.KubernetesClientBuilder().build()
    try:
        builder = jvm.org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBuilder()
        built = builder.buildFromFeatures(pods, security, client, profiles.getOrCreateDefaultProfile(conf)).pod()
        as_yaml = jvm.io.fabric8.kubernetes.client.utils.Serialization.asYaml
        pod = yaml.safe_load(as_yaml(built.pod()))
        yield pod | {"container": yaml.safe_load(as_yaml(built.container()))}
    finally:
        client.close()


def variables_of(executor: dict[str, Any]) -> dict[str, str]:
    """The variables of the executor's container, including those that Kubernetes fills in."""
    given = {one["name"]: one.get("value", "") for one in executor["container"]["env"]}
    return given | {"SPARK_EXECUTOR_POD_IP": "127.0.0.1", "SPARK_EXECUTOR_POD_NAME": executor["metadata"]["name"]}


def test_executor_pod_has_keys_by_reference_and_no_privileges(executor: dict[str, Any]) -> None:
    container = executor["container"]
    assert container["image"] == CONF["spark.kubernetes.container.image"]
    assert container["args"] == ["executor"]
    assert "command" not in container
    by_reference = {
        one["name"]: one["valueFrom"]["secretKeyRef"]["name"]
        for one in container["env"]
        if "secretKeyRef" in one.get("valueFrom", {})
    }
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert by_reference == dict.fromkeys(keys, "imagestream-s3-writer")
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert executor["spec"]["securityContext"]["runAsUser"] == 10001
    assert executor["spec"]["serviceAccountName"] == "imagestream"
    assert executor["spec"]["automountServiceAccountToken"] is False
    assert [volume for volume in executor["spec"]["volumes"] if "persistentVolumeClaim" in volume] == []


def test_executor_command_follows_the_variables_of_the_pod(executor: dict[str, Any]) -> None:
    given = variables_of(executor)
    command = executor_command(Path("/java"), Path("/spark"), given | {"SPARK_JAVA_OPT_10": "-Dlast=1"})
    at = command.index(BACKEND)
    options, arguments = command[1:at], command[at + 1 :]
    assert options[:2] == ["-Dfirst=1", "-Dsecond=with a space"]
    memory, classes = given["SPARK_EXECUTOR_MEMORY"], f"{given['SPARK_CONF_DIR']}:/spark/jars/*"
    assert options[-5:] == ["-Dlast=1", f"-Xms{memory}", f"-Xmx{memory}", "-cp", classes]
    assert dict(zip(arguments[::2], arguments[1::2], strict=True)) == {
        "--driver-url": given["SPARK_DRIVER_URL"],
        "--executor-id": "7",
        "--cores": given["SPARK_EXECUTOR_CORES"],
        "--app-id": "spark-application-1",
        "--hostname": "127.0.0.1",
        "--resourceProfileId": "0",
        "--podName": given["SPARK_EXECUTOR_POD_NAME"],
    }
    with pytest.raises(ServiceError, match="SPARK_DRIVER_URL is not set"):
        executor_command(Path("/java"), Path("/spark"), given | {"SPARK_DRIVER_URL": ""})


def test_executor_process_connects_to_its_driver(executor: dict[str, Any], tmp_path: Path) -> None:
    given = variables_of(executor) | {"SPARK_EXECUTOR_MEMORY": "400m", "IMAGESTREAM_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "streaming", *executor["container"]["args"]],
        env={name: value for name, value in os.environ.items() if not name.startswith("SPARK_")} | given,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    port = re.search(r":(\d+)$", given["SPARK_DRIVER_URL"])
    assert port
    assert done.returncode != 0
    assert re.search(rf"Connection refused: (localhost)?/127\.0\.0\.1:{port[1]}", done.stderr + done.stdout), (
        json.dumps([done.stdout[-2000:], done.stderr[-2000:]])
    )
