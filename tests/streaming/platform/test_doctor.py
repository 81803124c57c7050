"""`imagestream doctor`: checks of the machine, the home, the jars and the broker, with fixes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.platform.broker import running_broker
from streaming.platform.doctor import diagnose, missing_variables
from streaming.platform.kafka_node import free_port
from streaming.settings import Settings
from tests.object_store import BUCKET, ObjectStoreServer


def doctor(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streaming", "--home", str(home), "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def test_this_machine_passes_every_check(broker: Settings) -> None:
    assert [check for check in diagnose(broker) if not check.ok] == []
    home_broker = broker.model_copy(update={"bootstrap_servers": None})
    state = running_broker(home_broker)
    assert state is not None
    assert f"running at {state.address}" in [check.found for check in diagnose(home_broker)]


def test_missing_requirements_are_reported_with_their_fixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    silent = f"127.0.0.1:{free_port()}"
    checks = diagnose(Settings(home=tmp_path / "file" / "home", bootstrap_servers=silent))
    failed = {check.name: check.fix or "" for check in checks if not check.ok}
    assert set(failed) == {"Java", "home", "jars", "broker", "champion"}
    assert "openjdk" in failed["Java"]
    assert "--home" in failed["home"]
    assert "imagestream setup" in failed["jars"]
    assert "IMAGESTREAM_BOOTSTRAP_SERVERS" in failed["broker"]


def test_bucket_is_checked_and_unset_variables_are_named(
    object_store: ObjectStoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.options["aws_endpoint"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.options["aws_access_key_id"])
    (tmp_path / "file").touch()

    def checks(prefix: str, work: Path) -> dict[str, tuple[str, str | None]]:
        settings = Settings(home=f"s3://{BUCKET}/{prefix}", work=work)
        return {check.name: (check.found, check.fix) for check in diagnose(settings) if check.name in {"home", "work"}}

    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    refused = checks("doctor-refused", tmp_path / "file" / "work")
    assert "file/work" in refused["work"][0]
    assert "IMAGESTREAM_WORK" in str(refused["work"][1])
    assert "cannot put an object" in refused["home"][0]
    assert "set AWS_SECRET_ACCESS_KEY, unless" in str(refused["home"][1])

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.options["aws_secret_access_key"])
    found = checks("doctor", tmp_path / "work")
    assert {name: fix for name, (_, fix) in found.items()} == {"work": None, "home": None}
    assert list(Settings(home=f"s3://{BUCKET}/doctor", work=tmp_path / "work").place.store.list()) == []


@pytest.mark.parametrize(
    ("scheme", "present", "missing"),
    [
        ("s3", {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"}, []),
        ("s3", {"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_ENDPOINT_URL"}, []),
        ("s3", set(), ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"]),
        ("s3", {"AWS_ROLE_ARN", "AWS_REGION"}, ["AWS_WEB_IDENTITY_TOKEN_FILE"]),
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS"}, []),
        ("gs", set(), ["GOOGLE_SERVICE_ACCOUNT"]),
        ("az", {"AZURE_CLIENT_ID"}, ["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_CLIENT_SECRET", "AZURE_TENANT_ID"]),
    ],
)
def test_missing_variables_of_a_bucket_are_named(scheme: str, present: set[str], missing: list[str]) -> None:
    assert missing_variables(scheme, present) == missing


def test_damaged_jar_is_detected_by_its_hash(jars_dir: Path, tmp_path: Path) -> None:
    for jar in jars_dir.glob("*/*.jar"):
        copy = tmp_path / jar.relative_to(jars_dir)
        copy.parent.mkdir(exist_ok=True)
        copy.symlink_to(jar)
    copy.unlink()
    copy.write_bytes(b"\0" * jar.stat().st_size)
    (jars,) = (check for check in diagnose(Settings(home=tmp_path, jars=tmp_path)) if check.name == "jars")
    assert copy.name in jars.found
    assert jars.fix == "run `imagestream setup`"


def test_command_fails_without_java_and_writes_its_findings(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json", str(tmp_path / "doctor.json"), PATH="", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert not found["ok"]
    failed = {check["name"]: check["fix"] for check in found["checks"] if not check["ok"]}
    assert set(failed) == {"Java", "jars"}
    assert all(fix in done.stdout for fix in failed.values())
