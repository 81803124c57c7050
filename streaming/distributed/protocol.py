"""What workers and the parameter server say to each other over TCP.

A frame is a header of fixed layout, a little JSON (counts, an error), and float32 values in little-endian order, as
many as the layout of the network says and no others. Nothing in a frame can become code. Both ends prove by HMAC-SHA256
of the other's nonce that they know the training's token; frames are not encrypted.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming.errors import ServiceError

Values = NDArray[np.float32]

MAGIC = b"ISD1"
HEADER = struct.Struct("!4sB3xIIIQQIQ")
MAX_META_BYTES = 64 * 1024
NONCE_BYTES = 32
GREETING_TIMEOUT_S = 10.0
NO_VALUES: Values = np.empty(0, np.float32)


class Kind(IntEnum):
    """What a frame is about."""

    HELLO = 1  # worker: here I am
    READY = 11  # worker: how many rows it has
    START = 2  # server: weights and optimizer state to begin with
    PROGRESS = 3  # worker: still at work; server: still waiting for others
    REDUCE = 4  # worker: its part of what all put together
    REDUCED = 5
    PUSH = 6  # worker: how its weights changed; the answer brings the server's
    WEIGHTS = 7
    EPOCH = 8  # worker: an epoch's counts
    NEXT = 9  # server: whether to go on, and how fast
    FAILED = 10  # server: why this worker must give up


class LostPeerError(ServiceError):
    """The other end has gone, is silent, or does not follow the protocol."""


@dataclass(frozen=True)
class Message:
    """A frame.

    Attributes:
        rows: images that the values count for.
        version: how many changes the server's weights had seen.
    """

    kind: Kind
    worker: int = 0
    epoch: int = 0
    step: int = 0
    rows: int = 0
    version: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    values: Values = field(default_factory=lambda: NO_VALUES)


class Channel:
    """A connection whose other end has proved that it knows the token.

    Attributes:
        sent: bytes so far, likewise `received`.
    """

    def __init__(self, connection: socket.socket, sizes: frozenset[int], timeout_s: float) -> None:
        """Args:
        sizes: the numbers of values that a frame may have, beside none.
        timeout_s: how long the other end may be silent.
        """
        self._socket = connection
        self._sizes = sizes
        self._socket.settimeout(timeout_s)
        self.sent = 0
        self.received = 0

    def send(self, message: Message) -> None:
        """Raises LostPeerError if the other end has gone or takes nothing."""
        meta = json.dumps(message.meta).encode() if message.meta else b""
        values = np.ascontiguousarray(message.values, "<f4")
        numbers = (message.worker, message.epoch, message.step, message.rows, message.version)
        header = HEADER.pack(MAGIC, message.kind, *numbers, len(meta), len(values))
        try:
            self._socket.sendall(header + meta)
            if len(values):
                self._socket.sendall(_bytes_of(values))
        except OSError as error:
            raise LostPeerError(f"the connection broke: {error}") from error
        self.sent += len(header) + len(meta) + values.nbytes

    def receive(self) -> Message:
        """The next frame; raises LostPeerError if there is none in time, or if it is not a frame."""
        header = _receive(self._socket, HEADER.size)
        magic, kind, worker, epoch, step, rows, version, n_meta, n_values = HEADER.unpack(header)
        if magic != MAGIC or kind not in set(Kind) or n_meta > MAX_META_BYTES:
            raise LostPeerError("got something that is no frame")
        if n_values and n_values not in self._sizes:
            raise LostPeerError(f"got a frame of {n_values} values, expected one of {sorted(self._sizes)}")
        try:
            meta = json.loads(_receive(self._socket, n_meta)) if n_meta else {}
        except (ValueError, RecursionError) as error:
            raise LostPeerError("got a frame whose text is no JSON") from error
        if not isinstance(meta, dict):
            raise LostPeerError("got a frame whose text is no JSON object")
        values = np.empty(n_values, "<f4")
        _receive_into(self._socket, _bytes_of(values))
        self.received += HEADER.size + n_meta + values.nbytes
        return Message(Kind(kind), worker, epoch, step, rows, version, meta, values)

    def close(self) -> None:
        self._socket.close()


def accept(connection: socket.socket, token: bytes) -> None:
    """Greet a worker; raises LostPeerError if it does not know the token."""
    connection.settimeout(GREETING_TIMEOUT_S)
    nonce = secrets.token_bytes(NONCE_BYTES)
    _send(connection, nonce)
    answer = _receive(connection, NONCE_BYTES + hashlib.sha256().digest_size)
    theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(token, b"worker", nonce)):
        raise LostPeerError("the other end does not know the token")
    _send(connection, _proof(token, b"server", theirs))


def connect(address: tuple[str, int], token: bytes, sizes: frozenset[int], timeout_s: float) -> Channel:
    """Connect to the server and greet it; raises LostPeerError if it cannot be reached or does not know the token."""
    try:
        connection = socket.create_connection(address, GREETING_TIMEOUT_S)
    except OSError as error:
        raise LostPeerError(f"the parameter server at {address[0]}:{address[1]} cannot be reached: {error}") from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    theirs, nonce = _receive(connection, NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    _send(connection, nonce + _proof(token, b"worker", theirs))
    proof = _receive(connection, hashlib.sha256().digest_size)
    if not hmac.compare_digest(proof, _proof(token, b"server", nonce)):
        raise LostPeerError("the other end does not know the token")
    return Channel(connection, sizes, timeout_s)


def _bytes_of(values: Values) -> memoryview:
    return values.view(np.uint8).data if len(values) else memoryview(bytearray())


def _proof(token: bytes, who: bytes, nonce: bytes) -> bytes:
    return hmac.digest(token, who + nonce, "sha256")


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError as error:
        raise LostPeerError(f"the connection broke: {error}") from error


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    _receive_into(connection, memoryview(data))
    return bytes(data)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        try:
            n = connection.recv_into(view)
        except TimeoutError as error:
            raise LostPeerError(f"nothing was heard for {connection.gettimeout():.0f} s") from error
        except OSError as error:
            raise LostPeerError(f"the connection broke: {error}") from error
        if n == 0:
            raise LostPeerError("the connection was closed")
        view = view[n:]
