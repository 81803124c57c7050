"""A broker with TLS, users and ACLs: permitted access, and refusals that are reported in one line."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from kafka.admin import ACLOperation, ResourceType

from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import run
from streaming.errors import ServiceError
from streaming.images.dataset import digit_images, write_images
from streaming.pipeline.answers_topic import AnswersTopic
from streaming.pipeline.offsets import TopicOffsets
from streaming.platform.broker import bootstrap_servers
from streaming.platform.doctor import check_broker
from streaming.platform.kafka_probe import RefusedError
from streaming.platform.kafka_security import client_arguments, spark_options
from streaming.platform.topic import Subscription, TopicOperation, check_access, describe_topic
from streaming.settings import Settings
from tests.conftest import imagestream
from tests.streaming.platform.secure_broker import PASSWORD, SecureBroker, secure_broker

TOPIC = "guarded"
CERTIFICATE = {"kafka_certificate_file": "crt", "kafka_key_file": "key"}


@pytest.fixture(scope="module")
def secured(jars_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    """A broker where `publisher` may write to one topic, `streamer` may read it, and `outsider` has no permissions."""
    with secure_broker(tmp_path_factory.mktemp("secured"), jars_dir) as started:
        started.allow("publisher", TOPIC, ACLOperation.WRITE)
        started.allow("streamer", TOPIC, ACLOperation.READ)
        yield started


@pytest.fixture
def base(jars_dir: Path, tmp_path: Path) -> Settings:
    """Settings of an empty home, without a broker."""
    return Settings(home=tmp_path / "home", jars=jars_dir, topic=TOPIC)


def environment(settings: Settings) -> dict[str, str]:
    """The environment variables of these settings."""
    names = [name for name in Settings.model_fields if name.startswith("kafka_")]
    given = {name: getattr(settings, name) for name in (*names, "bootstrap_servers", "topic", "jars", "backbones")}
    return {f"IMAGESTREAM_{name.upper()}": str(value) for name, value in given.items() if value is not None}


def refused(case: str, secured: SecureBroker, base: Settings, tmp_path: Path) -> Settings:
    """Settings with one mistake."""
    good = secured.settings(base, "streamer")
    (tmp_path / "wrong").write_text("guessed\n")
    change: dict[str, Any] = {
        "wrong password": {"kafka_password_file": tmp_path / "wrong"},
        "unknown user": {"kafka_username": "nobody"},
        "no permission": {"kafka_username": "outsider"},
        "plaintext to a TLS port": {"kafka_security_protocol": "PLAINTEXT"},
        "TLS to a plaintext port": {"bootstrap_servers": secured.listeners["PLAINTEXT"]},
        "expired certificate": {"bootstrap_servers": secured.listeners["EXPIRED"]},
        "wrong host name": {"bootstrap_servers": secured.listeners["ELSEWHERE"]},
        "unknown authority": {"kafka_ca_file": None},
        "no user": {"kafka_security_protocol": "SSL"},
        "no TLS": {"kafka_security_protocol": "SASL_PLAINTEXT"},
        "another mechanism": {"kafka_sasl_mechanism": "SCRAM-SHA-256"},
        "no client certificate": {
            "bootstrap_servers": secured.listeners["CLIENTS"],
            "kafka_security_protocol": "SSL",
        },
    }[case]
    return good.model_copy(update=change)


REFUSALS = {
    "wrong password": r"rejects user 'streamer': check IMAGESTREAM_KAFKA_USERNAME and .*KAFKA_PASSWORD_FILE",
    "no permission": r"user 'outsider' is not authorized to \w+ topic 'guarded': .* check .*_KAFKA_USERNAME",
    "plaintext to a TLS port": r"requires TLS, got PLAINTEXT: set IMAGESTREAM_KAFKA_SECURITY_PROTOCOL to",
    "expired certificate": r"the certificate of the broker at [\d.:]+ has expired",
    "wrong host name": r"is not for '127\.0\.0\.1': check IMAGESTREAM_BOOTSTRAP_SERVERS",
}
OTHER_REFUSALS = {
    "unknown user": r"rejects user 'nobody'",
    "TLS to a plaintext port": r"does not use TLS .*check IMAGESTREAM_KAFKA_SECURITY_PROTOCOL",
    "unknown authority": r"is not trusted \(.*\): check IMAGESTREAM_KAFKA_CA_FILE",
    "no user": r"may require a user; set IMAGESTREAM_KAFKA_SECURITY_PROTOCOL to SASL_SSL",
    "no TLS": r"may require TLS; check IMAGESTREAM_KAFKA_SECURITY_PROTOCOL",
    "another mechanism": r"does not support SCRAM-SHA-256: check IMAGESTREAM_KAFKA_SASL_MECHANISM",
    "no client certificate": r"rejects the client certificate .*check IMAGESTREAM_KAFKA_CERTIFICATE_FILE",
}


@pytest.mark.parametrize("command", ["publish", "stream", "gateway", "status"])
@pytest.mark.parametrize("case", REFUSALS)
def test_command_reports_its_refusal_in_one_line(
    case: str,
    command: str,
    secured: SecureBroker,
    base: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment(refused(case, secured, base, tmp_path)).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "image.png").write_bytes(b"never read")
    more = {
        "publish": [str(tmp_path / "image.png")],
        "stream": [],
        "gateway": ["--port", "0"],
        "status": ["--json", str(tmp_path / "status.json")],
    }

    with pytest.raises(SystemExit) as ended:
        run(["--home", str(base.home), command, *more[command]])

    assert ended.value.code == 1
    output = capsys.readouterr()
    if command == "status":
        lines = json.loads((tmp_path / "status.json").read_text())["reasons"][:1]
    else:
        lines = output.err.splitlines()
        assert output.out == ""
    assert len(lines) == 1
    assert re.search(REFUSALS[case], lines[0]), lines
    assert "guessed" not in output.out + output.err


@pytest.mark.parametrize("case", REFUSALS | OTHER_REFUSALS)
def test_refusal_names_the_setting_to_check(case: str, secured: SecureBroker, base: Settings, tmp_path: Path) -> None:
    settings = refused(case, secured, base, tmp_path)
    with pytest.raises(RefusedError, match=(REFUSALS | OTHER_REFUSALS)[case]):
        describe_topic(str(settings.bootstrap_servers), TOPIC, client_arguments(settings))


def test_doctor_reports_the_refusal(secured: SecureBroker, base: Settings, tmp_path: Path) -> None:
    for case in ("wrong password", "expired certificate"):
        found = check_broker(refused(case, secured, base, tmp_path))
        assert not found.ok
        assert re.search(REFUSALS[case], found.fix or "")
    assert check_broker(secured.settings(base, "streamer")).ok


def test_users_with_minimal_permissions_publish_and_stream(
    secured: SecureBroker, trained: Path, base: Settings, exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "service"
    shutil.copytree(trained, home, symlinks=True)
    publisher = secured.settings(base.model_copy(update={"home": home, "backbones": exports}), "publisher")
    write_images(tmp_path / "digits", digit_images(10, 300))

    for name, value in environment(publisher).items():
        monkeypatch.setenv(name, value)
    assert imagestream(publisher, "publish", tmp_path / "digits")["sent"] == 10
    monkeypatch.setenv("IMAGESTREAM_KAFKA_USERNAME", "streamer")
    assert imagestream(publisher, "stream", "--until-drained")["predicted"] == 10

    assert DeltaTable(home / "tables" / "predictions").count() == 10
    offsets = TopicOffsets(str(publisher.bootstrap_servers), [TOPIC], client_arguments(publisher))
    assert sum(one.end for one in (offsets.read() or {}).values()) == 10
    offsets.close()
    for file in home.rglob("*"):  # Spark's log, checkpoint, tables, and state of the stream
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            assert PASSWORD.encode() not in content, file
            assert PASSWORD.replace("\\", "\\\\").replace('"', '\\"').encode() not in content, file


def test_answers_topic_requires_permissions_for_topic_id_and_group(secured: SecureBroker, base: Settings) -> None:
    settings = secured.settings(base, "outsider").model_copy(update={"answers_topic": "answers"})

    def refusal() -> str | None:
        try:
            with closing(AnswersTopic(settings)) as answers:
                answers.prepare(Subscription((TOPIC,)))
                answers.begin("7", 0)
        except ServiceError as error:
            return str(error)
        return None

    refusals = []
    for kind, name, *operations in (
        (ResourceType.TOPIC, "answers", ACLOperation.WRITE),
        (ResourceType.TOPIC, "answers", ACLOperation.READ),
        (ResourceType.TRANSACTIONAL_ID, "imagestream-7", ACLOperation.WRITE, ACLOperation.DESCRIBE),
        (ResourceType.GROUP, "imagestream-7", ACLOperation.READ),
    ):
        secured.allow("outsider", name, kind=kind)  # the topic exists, also without permissions
        refusals.append(refusal())
        secured.allow("outsider", name, *operations, kind=kind)
    assert refusal() is None
    expected = (
        *("not authorized to write topic 'answers'", "not authorized to read topic 'answers'"),
        *("no permission for transactional id 'imagestream-7'", "no permission for group 'imagestr"),
    )
    for text, part in zip(refusals, expected, strict=True):
        assert text is not None
        assert part in text
        assert "grant it with `kafka-acls.sh --add" in text


def test_users_of_the_compose_file_get_the_required_permissions(
    secured: SecureBroker, base: Settings, tmp_path: Path
) -> None:
    for user in ("streamer", "publisher", "operator"):
        (tmp_path / f"kafka-{user}").write_text(f"{PASSWORD}\n")
    script = Path(__file__).parents[3] / "docs" / "deploy" / "kafka_users.py"
    command = [sys.executable, str(script), secured.listeners["PLAINTEXT"], "composed", str(tmp_path)]
    for _ in range(2):  # it runs with every `up`
        subprocess.run(command, check=True, timeout=300)

    granted: dict[str, list[TopicOperation]] = {}
    for user in ("streamer", "publisher", "operator"):
        settings = secured.settings(base, user)
        for right in TopicOperation:
            try:
                check_access(str(settings.bootstrap_servers), "composed", client_arguments(settings), right)
            except RefusedError:
                continue
            granted[user] = [*granted.get(user, []), right]
    assert granted == {
        "streamer": [TopicOperation.READ],
        "publisher": [TopicOperation.WRITE],
        "operator": [TopicOperation.READ, TopicOperation.WRITE],
    }


def test_client_certificate_authenticates_a_user(secured: SecureBroker, base: Settings) -> None:
    certificate = {name: secured.directory / f"client.{end}" for name, end in CERTIFICATE.items()}
    change = {"bootstrap_servers": secured.listeners["CLIENTS"], "kafka_security_protocol": "SSL", **certificate}
    settings = secured.settings(base, "ignored").model_copy(update=change)
    check = partial(
        check_access, str(settings.bootstrap_servers), TOPIC, client_arguments(settings), TopicOperation.WRITE
    )
    with pytest.raises(
        RefusedError, match="the owner of IMAGESTREAM_KAFKA_CERTIFICATE_FILE is not authorized to write"
    ):
        check()
    secured.allow("CN=client", TOPIC, ACLOperation.WRITE)
    for _ in range(50):  # ACLs take a moment to propagate
        with contextlib.suppress(RefusedError):
            check()
            return
        time.sleep(0.1)
    check()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"kafka_password_file": None}, "SASL_SSL needs a user: set .*_USERNAME and IMAGESTREAM_KAFKA_PASSWORD_FILE"),
        ({"kafka_password_file": Path("missing")}, "_KAFKA_PASSWORD_FILE: missing cannot be read: No such file"),
        ({"kafka_password_file": Path("two lines")}, "_KAFKA_PASSWORD_FILE: expected one line, the password, in two"),
        ({"kafka_ca_file": Path("two lines")}, "_KAFKA_CA_FILE: expected certificates as PEM in two lines"),
        ({"kafka_certificate_file": Path("two lines")}, "_CERTIFICATE_FILE and .*_KEY_FILE go together: set both"),
        (
            {"kafka_certificate_file": Path("two lines"), "kafka_key_file": Path("two lines")},
            "_KAFKA_KEY_FILE: expected a PKCS#8 key without a passphrase in two lines",
        ),
    ],
)
def test_invalid_credential_file_is_a_one_line_error(
    change: dict[str, Any], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two lines").write_text("one\ntwo\n")
    (tmp_path / "password").write_text("secret\n")
    good = Settings(
        kafka_security_protocol="SASL_SSL", kafka_username="somebody", kafka_password_file=tmp_path / "password"
    )
    for convert in (client_arguments, spark_options):
        assert convert(good)
        with pytest.raises(ServiceError, match=error):
            convert(good.model_copy(update=change))


def test_password_for_spark_is_escaped_for_jaas(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    settings = Settings(
        kafka_security_protocol="SASL_PLAINTEXT", kafka_username="me", kafka_password_file=tmp_path / "password"
    )
    assert spark_options(settings) == {
        "kafka.security.protocol": "SASL_PLAINTEXT",
        "kafka.sasl.mechanism": "SCRAM-SHA-512",
        "kafka.sasl.jaas.config": "org.apache.kafka.common.security.scram.ScramLoginModule required "
        r'username="me" password="p\"a\\ss=w;ord";',  # pragma: allowlist secret
    }


def test_home_broker_is_refused_for_a_secure_protocol(broker: Settings) -> None:
    own = broker.model_copy(update={"bootstrap_servers": None, "kafka_security_protocol": "SASL_SSL"})
    with pytest.raises(ServiceError, match="uses PLAINTEXT, not SASL_SSL: set IMAGESTREAM_BOOT"):
        bootstrap_servers(own)
