"""Finds out why a Kafka broker denies access, by one short exchange before a client connects.

Kafka clients treat a failed handshake as an outage: they retry until their timeout and then report that no broker was
available. Here the first broker that accepts a connection is probed once:

    1. TLS, if the protocol uses it: the broker's certificate and name, and the client's certificate
    2. one request that needs no permission, which distinguishes listeners without protection, with SASL and with TLS
    3. user and password, if there are any: kafka-python 3.0.12 usually loses the broker's response to wrong ones

Brokers that cannot be reached are not reported: the client waits for them up to its own timeout.
"""

import socket
import ssl
import struct
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from streaming.errors import ConfigurationError

TIMEOUT_S = 5.0
SIZE_BYTES = 4  # before every request and answer
MIN_ANSWER_BYTES = 6  # correlation id and error code
MIN_SASL_BYTES = 8  # and the length of a message
MAX_ANSWER_BYTES = 64 * 1024
PROTOCOL = "IMAGESTREAM_KAFKA_SECURITY_PROTOCOL"

# Requests of the Kafka protocol: key, version, correlation id 1, no client id; then the body.
METADATA_OF_NO_TOPIC = struct.pack(">hhihi", 3, 1, 1, -1, 0)
SASL_HANDSHAKE = struct.pack(">hhih", 17, 1, 1, -1)
SASL_AUTHENTICATE = struct.pack(">hhih", 36, 0, 1, -1)
UNSUPPORTED_SASL_MECHANISM, ILLEGAL_SASL_STATE = 33, 34

EXPIRED, NOT_YET_VALID = 10, 9  # X509_V_ERR_…, in ssl.SSLCertVerificationError.verify_code
WRONG_NAME = {62, 64}  # host name, IP address


class RefusedError(ConfigurationError):
    """A broker denies access to a client with these settings; the message names the setting to check."""


def check_broker(bootstrap_servers: str, client: Mapping[str, Any]) -> None:
    """Check that the first broker that accepts a connection accepts the client's protocol and credentials.

    Args:
        client: security arguments from `kafka_security.client_arguments`.

    Raises:
        RefusedError: it does not.
    """
    for server in bootstrap_servers.split(","):
        host, _, port = server.strip().rpartition(":")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S)
        except (OSError, ValueError):
            continue
        with closing(connection):
            _check(connection, host.strip("[]"), server.strip(), client)
        return


def _check(connection: socket.socket, host: str, server: str, client: Mapping[str, Any]) -> None:
    protocol = client.get("security_protocol", "PLAINTEXT")
    try:
        if protocol.endswith("SSL"):
            connection = _with_tls(connection, host, server, client)
        if protocol.startswith("SASL"):
            _check_sasl(connection, server, client)
        elif not _exchange(connection, METADATA_OF_NO_TOPIC):
            raise RefusedError(_why_closed(host, server, protocol))
    except TimeoutError:
        return  # no answer, or a slow one: left to the client
    except ssl.SSLError as error:  # TLS 1.3 reports a missing or rejected client certificate after the handshake
        raise RefusedError(
            f"the broker at {server} rejects the client certificate ({error.reason}): check "
            "IMAGESTREAM_KAFKA_CERTIFICATE_FILE and IMAGESTREAM_KAFKA_KEY_FILE"
        ) from error
    except OSError as error:
        raise RefusedError(_why_closed(host, server, protocol)) from error
    finally:
        connection.close()


def _with_tls(connection: socket.socket, host: str, server: str, client: Mapping[str, Any]) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=client.get("ssl_cafile"))
    if client.get("ssl_certfile"):
        context.load_cert_chain(client["ssl_certfile"], client.get("ssl_keyfile"))
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise RefusedError(_untrusted_reason(error, host, server)) from error
    except TimeoutError:
        raise
    except OSError as error:
        if "ALERT" in _reason(error):  # the broker uses TLS, but rejected the client's certificate
            raise
        raise RefusedError(
            f"the broker at {server} does not use TLS ({_reason(error)}): check {PROTOCOL}, or use its TLS port"
        ) from error


def _untrusted_reason(error: ssl.SSLCertVerificationError, host: str, server: str) -> str:
    if error.verify_code in {EXPIRED, NOT_YET_VALID}:
        when = "has expired" if error.verify_code == EXPIRED else "is not valid yet"
        return f"the certificate of the broker at {server} {when}: renew it, or check this machine's clock"
    if error.verify_code in WRONG_NAME:
        return (
            f"the certificate of the broker at {server} is not for {host!r}: check IMAGESTREAM_BOOTSTRAP_SERVERS, "
            "which must name the broker as its certificate does"
        )
    return (
        f"the certificate of the broker at {server} is not trusted ({error.verify_message}): check "
        "IMAGESTREAM_KAFKA_CA_FILE, which must contain the certificate of its issuer"
    )


def _check_sasl(connection: socket.socket, server: str, client: Mapping[str, Any]) -> None:
    mechanism = str(client["sasl_mechanism"])
    answer = _exchange(connection, SASL_HANDSHAKE + struct.pack(">h", len(mechanism)) + mechanism.encode())
    if not answer:
        raise RefusedError(f"the broker at {server} closed the connection: it may require TLS; check {PROTOCOL}")
    code = struct.unpack_from(">h", answer, 4)[0]
    if code == UNSUPPORTED_SASL_MECHANISM:
        raise RefusedError(
            f"the broker at {server} does not support {mechanism}: check IMAGESTREAM_KAFKA_SASL_MECHANISM"
        )
    if code == ILLEGAL_SASL_STATE:
        raise RefusedError(f"the broker at {server} does not accept users on this port: check {PROTOCOL}")
    _authenticate(connection, server, client)


def _authenticate(connection: socket.socket, server: str, client: Mapping[str, Any]) -> None:
    from kafka.net.sasl import get_sasl_mechanism

    mechanism = get_sasl_mechanism(client["sasl_mechanism"])(host=server, **client)
    while not mechanism.is_done():
        said = mechanism.auth_bytes()
        answer = _exchange(connection, SASL_AUTHENTICATE + struct.pack(">i", len(said)) + said)
        code, message_bytes = struct.unpack_from(">hh", answer, 4) if len(answer) >= MIN_SASL_BYTES else (-1, 0)
        try:
            if code == 0:
                mechanism.receive(answer[MIN_SASL_BYTES + max(message_bytes, 0) + SIZE_BYTES :])
        except ValueError:  # the broker does not know the password either, so it is not trusted
            code = -1
        if code != 0:
            raise RefusedError(
                f"the broker at {server} rejects user {client['sasl_plain_username']!r}: check "
                "IMAGESTREAM_KAFKA_USERNAME and the password in IMAGESTREAM_KAFKA_PASSWORD_FILE"
            )


def _why_closed(host: str, server: str, protocol: str) -> str:
    if not protocol.endswith("SSL") and _talks_tls(host, server):
        return f"the broker at {server} requires TLS, got {protocol}: set {PROTOCOL} to SSL or SASL_SSL"
    wanted = protocol if protocol.startswith("SASL") else {"SSL": "SASL_SSL"}.get(protocol, "SASL_PLAINTEXT")
    return f"the broker at {server} closed the connection: it may require a user; set {PROTOCOL} to {wanted}"


def _talks_tls(host: str, server: str) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False  # no data is sent: this only tests whether the other side uses TLS
    context.verify_mode = ssl.CERT_NONE
    try:
        plain = socket.create_connection((host, int(server.rpartition(":")[2])), TIMEOUT_S)
        with closing(plain), context.wrap_socket(plain, server_hostname=host):
            return True
    except OSError:
        return False


def _exchange(connection: socket.socket, request: bytes) -> bytes:
    """The response to a request; empty if the connection was closed, or the response is invalid."""
    connection.sendall(struct.pack(">i", len(request)) + request)
    head = _receive(connection, SIZE_BYTES)
    size = struct.unpack(">i", head)[0] if len(head) == SIZE_BYTES else 0
    answer = _receive(connection, min(size, MAX_ANSWER_BYTES)) if size >= MIN_ANSWER_BYTES else b""
    return answer if len(answer) >= MIN_ANSWER_BYTES else b""


def _receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count and (more := connection.recv(count - len(received))):
        received += more
    return received


def _reason(error: OSError) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or str(error)
