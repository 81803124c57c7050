"""The protocol between workers and the parameter server, over TCP.

A frame consists of a header of fixed layout, a short JSON object (counts, an error), and little-endian float32 values,
whose number must match the network. No part of a frame is executed. Both ends prove knowledge of the training's token
by HMAC-SHA256 of the other's nonce. Each direction of a connection has a key derived from the nonces and the token,
with which every frame and its sequence number are authenticated (BLAKE2b, RFC 7693), so that frames cannot be modified,
replayed or inserted. The header is verified before memory is allocated. Frames are not encrypted.
"""

import hashlib
import hmac
import json
import secrets
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaming.errors import UnavailableError

Values = NDArray[np.float32]

MAGIC = b"ISD1"
HEADER = struct.Struct("!4sB3xIIIQQIQ")
MAX_META_BYTES = 64 * 1024
NONCE_BYTES = 32
HANDSHAKE_TIMEOUT_S = 10.0
TAG_BYTES = 16
NO_VALUES: Values = np.empty(0, np.float32)


class MessageKind(IntEnum):
    """The type of a frame."""

    HELLO = 1  # worker: its number and task attempt
    READY = 11  # worker: number of its images
    START = 2  # server: initial weights and optimizer state
    PROGRESS = 3  # heartbeat: worker is computing, or server is waiting for other workers
    REDUCE = 4  # worker: its operand of a reduction
    REDUCED = 5  # server: the result of the reduction
    PUSH = 6  # worker: its update of the weights
    WEIGHTS = 7  # server: the current weights, in reply to PUSH
    EPOCH = 8  # worker: counts of an epoch
    NEXT = 9  # server: whether to continue, and the learning rate
    FAILED = 10  # server: why this worker must end


class LostPeerError(UnavailableError):
    """The other end has disconnected, is silent, or violates the protocol."""


class Keys(NamedTuple):
    """The keys that authenticate the frames of a connection in each direction."""

    sends: bytes = b""
    receives: bytes = b""

    @classmethod
    def of(cls, token: bytes, nonces: bytes, *, server: bool) -> "Keys":
        session = hmac.digest(token, b"session" + nonces, "sha256")
        keys = [hmac.digest(session, who, "sha256") for who in (b"worker", b"server")]
        return cls(*reversed(keys)) if server else cls(*keys)


@dataclass(frozen=True)
class PeerMessage:
    """A frame.

    Attributes:
        rows: number of images that the values are computed from.
        version: number of updates of the server's weights.
    """

    kind: MessageKind
    worker: int = 0
    epoch: int = 0
    step: int = 0
    rows: int = 0
    version: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    values: Values = field(default_factory=lambda: NO_VALUES)


class Channel:
    """An authenticated connection; `sent` and `received` are the numbers of bytes so far."""

    def __init__(
        self,
        connection: socket.socket,
        sizes: frozenset[int],
        timeout_s: float,
        keys: Keys = Keys(),  # noqa: B008
    ) -> None:
        """Wrap a socket.

        Args:
            sizes: permitted numbers of values of a frame, besides 0.
            timeout_s: time after which a silent other end is considered lost.
            keys: the result of `accept`.
        """
        self._keys = keys
        self._frames_sent = 0
        self._frames_received = 0
        self._socket = connection
        self._sizes = sizes
        self._socket.settimeout(timeout_s)
        self.sent = 0
        self.received = 0

    def send(self, message: PeerMessage) -> None:
        """Send a frame; raises LostPeerError if the other end is lost."""
        meta = json.dumps(message.meta).encode() if message.meta else b""
        values = np.ascontiguousarray(message.values, "<f4")
        numbers = (message.worker, message.epoch, message.step, message.rows, message.version)
        header = HEADER.pack(MAGIC, message.kind, *numbers, len(meta), len(values))
        number, self._frames_sent = self._frames_sent, self._frames_sent + 1
        body = _bytes_of(values)
        try:
            self._socket.sendall(header + _tag(self._keys.sends, number, header) + meta)
            if len(values):
                self._socket.sendall(body)
            if meta or len(values):
                self._socket.sendall(_tag(self._keys.sends, number, meta, body))
        except OSError as error:
            raise LostPeerError(f"the connection broke: {error}") from error
        self.sent += len(header) + TAG_BYTES + len(meta) + values.nbytes + (TAG_BYTES if meta or len(values) else 0)

    def receive(self) -> PeerMessage:
        """Return the next frame; raises LostPeerError if there is none in time, or it is invalid."""
        number, self._frames_received = self._frames_received, self._frames_received + 1
        header, tag = _receive(self._socket, HEADER.size), _receive(self._socket, TAG_BYTES)
        if not hmac.compare_digest(tag, _tag(self._keys.receives, number, header)):
            raise LostPeerError("got a frame that fails authentication")
        magic, kind, worker, epoch, step, rows, version, n_meta, n_values = HEADER.unpack(header)
        if magic != MAGIC or kind not in set(MessageKind) or n_meta > MAX_META_BYTES:
            raise LostPeerError("got an invalid frame")
        if n_values and n_values not in self._sizes:
            raise LostPeerError(f"got a frame of {n_values} values, expected one of {sorted(self._sizes)}")
        text = _receive(self._socket, n_meta)
        values = np.empty(n_values, "<f4")
        _receive_into(self._socket, _bytes_of(values))
        if n_meta or n_values:
            tag = _receive(self._socket, TAG_BYTES)
            if not hmac.compare_digest(tag, _tag(self._keys.receives, number, text, _bytes_of(values))):
                raise LostPeerError("got a frame that fails authentication")
        try:
            meta = json.loads(text) if n_meta else {}
        except (ValueError, RecursionError) as error:
            raise LostPeerError("got a frame with invalid JSON") from error
        if not isinstance(meta, dict):
            raise LostPeerError("got a frame whose JSON is not an object")
        self.received += HEADER.size + TAG_BYTES + n_meta + values.nbytes + (TAG_BYTES if n_meta or n_values else 0)
        return PeerMessage(MessageKind(kind), worker, epoch, step, rows, version, meta, values)

    def close(self) -> None:
        self._socket.close()


def accept(connection: socket.socket, token: bytes) -> Keys:
    """Authenticate a worker.

    Raises:
        LostPeerError: it does not know the token, or does not prove it within HANDSHAKE_TIMEOUT_S.
    """
    connection.settimeout(HANDSHAKE_TIMEOUT_S)
    nonce = secrets.token_bytes(NONCE_BYTES)
    _send(connection, nonce)
    answer = _receive(connection, NONCE_BYTES + hashlib.sha256().digest_size, monotonic() + HANDSHAKE_TIMEOUT_S)
    theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(token, b"worker", nonce)):
        raise LostPeerError("the other end does not know the token")
    _send(connection, _proof(token, b"server", theirs))
    return Keys.of(token, nonce + theirs, server=True)


def connect(address: tuple[str, int], token: bytes, sizes: frozenset[int], timeout_s: float) -> Channel:
    """Connect to the server and authenticate it.

    Args:
        sizes: permitted numbers of values of a frame, besides 0.
        timeout_s: time after which a silent server is considered lost.

    Raises:
        LostPeerError: the server cannot be reached or does not know the token.
    """
    try:
        connection = socket.create_connection(address, HANDSHAKE_TIMEOUT_S)
    except OSError as error:
        raise LostPeerError(f"the parameter server at {address[0]}:{address[1]} cannot be reached: {error}") from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    theirs, nonce = _receive(connection, NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    _send(connection, nonce + _proof(token, b"worker", theirs))
    proof = _receive(connection, hashlib.sha256().digest_size)
    if not hmac.compare_digest(proof, _proof(token, b"server", nonce)):
        raise LostPeerError("the other end does not know the token")
    return Channel(connection, sizes, timeout_s, Keys.of(token, theirs + nonce, server=False))


def _bytes_of(values: Values) -> memoryview:
    return values.view(np.uint8).data if len(values) else memoryview(bytearray())


def _tag(key: bytes, number: int, *parts: bytes | memoryview) -> bytes:
    """Return the authentication tag of the header or body of frame `number`."""
    digest = hashlib.blake2b(struct.pack("!QB", number, len(parts)), digest_size=TAG_BYTES, key=key)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _proof(token: bytes, who: bytes, nonce: bytes) -> bytes:
    return hmac.digest(token, who + nonce, "sha256")


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError as error:
        raise LostPeerError(f"the connection broke: {error}") from error


def _receive(connection: socket.socket, size: int, until: float | None = None) -> bytes:
    data = bytearray(size)
    _receive_into(connection, memoryview(data), until)
    return bytes(data)


def _receive_into(connection: socket.socket, view: memoryview, until: float | None = None) -> None:
    """Fill `view`, each part within the connection's timeout, and all of it by the time `until` if given."""
    while len(view):
        if until is not None and monotonic() >= until:
            raise LostPeerError("the other end is too slow")
        try:
            n = connection.recv_into(view)
        except TimeoutError as error:
            raise LostPeerError(f"no message for {connection.gettimeout():.0f} s") from error
        except OSError as error:
            raise LostPeerError(f"the connection broke: {error}") from error
        if n == 0:
            raise LostPeerError("the connection was closed")
        view = view[n:]
