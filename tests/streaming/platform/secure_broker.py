"""A Kafka broker with TLS, SCRAM users and ACLs, and certificates that are created for each test run."""

import ipaddress
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    KafkaAdminClient,
    ResourcePattern,
    ResourceType,
    UserScramCredentialUpsertion,
)

from streaming.platform.jars import broker_classpath
from streaming.platform.java import find_java
from streaming.platform.kafka_node import HOST, KafkaNode, free_port
from streaming.settings import Settings
from tests.producer.topics import create_topic

DAY = timedelta(days=1)
PASSWORD = 'p"a\\ss=w;ord'  # noqa: S105  with characters that JAAS escapes
USERS = ("publisher", "streamer", "outsider")


class CertificateAuthority:
    """Signs certificates, and writes them as PEM files."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._name, self._key, datetime.now(UTC) - DAY, 30 * DAY)
        self._certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(
            self._key, hashes.SHA256()
        )
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(self._certificate.public_bytes(Encoding.PEM))

    def issue(self, name: str, host: str = HOST, *, begin: datetime | None = None, lasts: timedelta = 20 * DAY) -> Path:
        """Issue a certificate for `host`; returns the stem of NAME.crt, NAME.key, and NAME.pem with both."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        builder = self._builder(subject, key, begin or datetime.now(UTC) - DAY, lasts)
        certificate = builder.add_extension(x509.SubjectAlternativeName([alternative]), critical=False).sign(
            self._key, hashes.SHA256()
        )
        stem = self._directory / name
        chain = certificate.public_bytes(Encoding.PEM)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        stem.with_suffix(".crt").write_bytes(chain)
        stem.with_suffix(".key").write_bytes(secret)
        stem.with_suffix(".pem").write_bytes(secret + chain)
        return stem

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime, lasts: timedelta
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(begin).not_valid_after(begin + lasts)


@dataclass(frozen=True)
class SecureBroker:
    """The addresses of a running broker by listener, and the files of its clients."""

    listeners: dict[str, str]
    directory: Path
    ca_file: Path

    def settings(self, base: Settings, user: str, listener: str = "SECURE") -> Settings:
        """Settings of a user at a listener."""
        secured = {
            "bootstrap_servers": self.listeners[listener],
            "kafka_security_protocol": "SASL_SSL",
            "kafka_username": user,
            "kafka_password_file": self.directory / "password",
            "kafka_ca_file": self.ca_file,
        }
        return Settings.model_validate(base.model_dump() | secured)

    def allow(self, user: str, name: str, *operations: ACLOperation, kind: ResourceType = ResourceType.TOPIC) -> None:
        """Create the topic, if it is one, and grant permissions as its operator."""
        pattern = ResourcePattern(kind, name)
        with closing(KafkaAdminClient(bootstrap_servers=self.listeners["PLAINTEXT"])) as admin:
            if kind is ResourceType.TOPIC and name not in admin.list_topics():
                create_topic(self.listeners["PLAINTEXT"], name, partitions=2)
            if operations:
                admin.create_acls(
                    [ACL(f"User:{user}", "*", one, ACLPermissionType.ALLOW, pattern) for one in operations]
                )


@contextmanager
def secure_broker(directory: Path, jars_dir: Path) -> Iterator[SecureBroker]:
    """Run a broker for the block; clients of the PLAINTEXT listener are super users, others have no permissions."""
    authority = CertificateAuthority(directory, "ca")
    certificates = {
        "SECURE": authority.issue("good"),
        "CLIENTS": authority.issue("clients"),
        "EXPIRED": authority.issue("expired", begin=datetime.now(UTC) - 10 * DAY, lasts=9 * DAY),
        "ELSEWHERE": authority.issue("elsewhere", "kafka.example"),
    }
    authority.issue("client")
    (directory / "password").write_text(f"{PASSWORD}\n")
    ports = {name: free_port() for name in ("PLAINTEXT", *certificates)}
    controller = free_port()
    listeners = {name: f"{HOST}:{port}" for name, port in ports.items()}
    at = ",".join(f"{name}://{address}" for name, address in listeners.items())
    protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", "CLIENTS": "SSL"}
    protocols |= {name: "SASL_SSL" for name in certificates if name != "CLIENTS"}
    extra = {
        "listeners": f"{at},CONTROLLER://{HOST}:{controller}",
        "advertised.listeners": at,
        "controller.quorum.voters": f"1@{HOST}:{controller}",
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
        "inter.broker.listener.name": "PLAINTEXT",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    for name, stem in certificates.items():
        prefix = f"listener.name.{name.lower()}.ssl"
        extra |= {f"{prefix}.keystore.type": "PEM", f"{prefix}.keystore.location": str(stem.with_suffix(".pem"))}
        module = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        extra[f"listener.name.{name.lower()}.scram-sha-512.sasl.jaas.config"] = module
    extra |= {
        "listener.name.clients.ssl.client.auth": "required",
        "listener.name.clients.ssl.truststore.type": "PEM",
        "listener.name.clients.ssl.truststore.location": str(authority.file),
    }
    node = KafkaNode(directory, ports["PLAINTEXT"], find_java(jars_dir.parent), broker_classpath(jars_dir), extra)
    node.configure()
    node.format_storage()
    process = node.launch()
    try:
        node.await_ready(process, 300)
        with closing(KafkaAdminClient(bootstrap_servers=listeners["PLAINTEXT"])) as admin:
            users = [UserScramCredentialUpsertion(user, "SCRAM-SHA-512", PASSWORD) for user in USERS]
            assert set(admin.alter_user_scram_credentials(users).values()) == {None}
        yield SecureBroker(listeners, directory, authority.file)
    finally:
        process.terminate()
        process.wait(300)
