"""Converts the settings for Kafka's security (protocol, user, certificates) to arguments of each kind of client.

The password is read from a file and only passed to clients: to kafka-python as an argument, and to Spark as an option
that its logs and pages redact.
"""

import ssl
from pathlib import Path
from typing import Any

from streaming.errors import ConfigurationError
from streaming.secret_files import check_secret_file
from streaming.settings import Settings

SECRET = {"kafka_password_file", "kafka_key_file"}
MAX_FILE_BYTES = 256 * 1024
LOGIN_MODULES = {
    "SCRAM-SHA-512": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "SCRAM-SHA-256": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "PLAIN": "org.apache.kafka.common.security.plain.PlainLoginModule",
}
# Spark's redaction: its own defaults, and the secrets in `spark_options`.
REDACTION = {
    "spark.redaction.regex": "(?i)secret|password|token|access[.]?key|sasl[.]jaas|keystore[.]key",
    "spark.sql.redaction.options.regex": "(?i)url|password|sasl[.]jaas|keystore[.]key",
}


def client_arguments(settings: Settings) -> dict[str, Any]:
    """The security arguments of kafka-python clients; empty for PLAINTEXT.

    Raises:
        ServiceError: a setting that the protocol needs is missing, or a file cannot be read or is invalid.
    """
    protocol = settings.kafka_security_protocol
    if protocol == "PLAINTEXT":
        return {}
    arguments: dict[str, Any] = {"security_protocol": protocol}
    if protocol.startswith("SASL"):
        user, password = _credentials(settings)
        arguments |= {"sasl_mechanism": settings.kafka_sasl_mechanism}
        arguments |= {"sasl_plain_username": user, "sasl_plain_password": password}
    if protocol.endswith("SSL"):
        _check_certificates(settings)
        files = {
            "ssl_cafile": settings.kafka_ca_file,
            "ssl_certfile": settings.kafka_certificate_file,
            "ssl_keyfile": settings.kafka_key_file,
        }
        arguments |= {name: str(path) for name, path in files.items() if path is not None}
    return arguments


def spark_options(settings: Settings) -> dict[str, str]:
    """The security options of Spark's Kafka source; empty for PLAINTEXT.

    Certificates are passed as text, since the files may not exist on the executors' machines. Java verifies the
    broker's host name by default.

    Raises:
        ServiceError: see `client_arguments`.
    """
    protocol = settings.kafka_security_protocol
    if protocol == "PLAINTEXT":
        return {}
    options: dict[str, str] = {"security.protocol": protocol}
    if protocol.startswith("SASL"):
        mechanism = settings.kafka_sasl_mechanism
        user, password = map(_quoted, _credentials(settings))
        options["sasl.mechanism"] = mechanism
        options["sasl.jaas.config"] = f"{LOGIN_MODULES[mechanism]} required username={user} password={password};"
    if protocol.endswith("SSL"):
        _check_certificates(settings)
        if settings.kafka_ca_file is not None:
            options["ssl.truststore.type"] = "PEM"
            options["ssl.truststore.certificates"] = _text("kafka_ca_file", settings.kafka_ca_file)
        if settings.kafka_certificate_file is not None and settings.kafka_key_file is not None:
            options["ssl.keystore.type"] = "PEM"
            options["ssl.keystore.certificate.chain"] = _text("kafka_certificate_file", settings.kafka_certificate_file)
            options["ssl.keystore.key"] = _text("kafka_key_file", settings.kafka_key_file)
    return {f"kafka.{name}": value for name, value in options.items()}


def _credentials(settings: Settings) -> tuple[str, str]:
    if settings.kafka_username is None or settings.kafka_password_file is None:
        raise ConfigurationError(
            f"{settings.kafka_security_protocol} needs a user: set IMAGESTREAM_KAFKA_USERNAME and "
            "IMAGESTREAM_KAFKA_PASSWORD_FILE"
        )
    password = _text("kafka_password_file", settings.kafka_password_file).rstrip("\r\n")
    if not password or not password.isprintable():
        raise ConfigurationError(
            f"IMAGESTREAM_KAFKA_PASSWORD_FILE: expected one line, the password, in {settings.kafka_password_file}"
        )
    return settings.kafka_username, password


def _check_certificates(settings: Settings) -> None:
    """Reject files that Python or Java would not accept; clients report this late, or retry."""
    ca, certificate, key = settings.kafka_ca_file, settings.kafka_certificate_file, settings.kafka_key_file
    if (certificate is None) != (key is None):
        raise ConfigurationError(
            "IMAGESTREAM_KAFKA_CERTIFICATE_FILE and IMAGESTREAM_KAFKA_KEY_FILE go together: set both"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is not None:
        try:
            context.load_verify_locations(cadata=_text("kafka_ca_file", ca))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigurationError(
                f"IMAGESTREAM_KAFKA_CA_FILE: expected certificates as PEM in {ca}: {error}"
            ) from error
    if certificate is None or key is None:
        return
    _text("kafka_certificate_file", certificate)
    if "-----BEGIN PRIVATE KEY-----" not in _text("kafka_key_file", key):  # pragma: allowlist secret
        raise ConfigurationError(
            f"IMAGESTREAM_KAFKA_KEY_FILE: expected a PKCS#8 key without a passphrase in {key}; "
            "make it one with `openssl pkcs8 -topk8 -nocrypt`"
        )
    try:
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(
            f"IMAGESTREAM_KAFKA_CERTIFICATE_FILE and IMAGESTREAM_KAFKA_KEY_FILE: {certificate} and {key} are not a "
            f"certificate as PEM and its key: {error}"
        ) from error


def _text(setting: str, path: Path) -> str:
    """The content of a setting's file."""
    try:
        if setting in SECRET:
            check_secret_file(path)
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigurationError(f"IMAGESTREAM_{setting.upper()}: {path} is larger than {MAX_FILE_BYTES:,} bytes")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigurationError(f"IMAGESTREAM_{setting.upper()}: {path} cannot be read: {reason}") from error


def _quoted(text: str) -> str:
    """A quoted value of a JAAS configuration, with C-style escapes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
