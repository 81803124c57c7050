"""Frames between workers and server, and their authentication."""

import json
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.distributed import protocol
from streaming.distributed.protocol import (
    HEADER,
    MAGIC,
    TAG_BYTES,
    Channel,
    LostPeerError,
    MessageKind,
    PeerMessage,
    _tag,
    accept,
    connect,
)

SIZES = frozenset({4, 7})


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, SIZES, 5), Channel(theirs, SIZES, 5)


def test_message_round_trips(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    sent = PeerMessage(MessageKind.PUSH, 3, 4, 5, 600, 7, {"why": "ä"}, np.array([1, -2, np.inf, 1e-30], np.float32))
    one.send(sent)
    one.send(PeerMessage(MessageKind.NEXT))
    got, empty = other.receive(), other.receive()
    assert (got.kind, got.worker, got.epoch, got.step, got.rows, got.version) == (MessageKind.PUSH, 3, 4, 5, 600, 7)
    assert got.meta == {"why": "ä"}
    assert got.values.tolist() == sent.values.tolist()
    assert (empty.kind, empty.meta, len(empty.values)) == (MessageKind.NEXT, {}, 0)
    assert one.sent == other.received > 0


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(b"GET ", MessageKind.PUSH, 0, 0, 0, 0, 0, 0, 0),
        HEADER.pack(MAGIC, 99, 0, 0, 0, 0, 0, 0, 0),
        HEADER.pack(MAGIC, MessageKind.PUSH, 0, 0, 0, 0, 0, 2**31, 0),
        HEADER.pack(MAGIC, MessageKind.PUSH, 0, 0, 0, 0, 0, 0, 2**40),
        HEADER.pack(MAGIC, MessageKind.PUSH, 0, 0, 0, 0, 0, 0, 5),
        HEADER.pack(MAGIC, MessageKind.PUSH, 0, 0, 0, 0, 0, 4, 0) + b"{]{]",
        HEADER.pack(MAGIC, MessageKind.PUSH, 0, 0, 0, 0, 0, 2, 0) + b"[]",
        HEADER.pack(MAGIC, MessageKind.PUSH, 0, 0, 0, 0, 0, 0, 4) + struct.pack("<3f", 1, 2, 3),
        b"",
    ],
)
def test_invalid_frame_is_rejected(frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        header, body = frame[: HEADER.size], frame[HEADER.size :]
        text = body[: HEADER.unpack(header)[-2]] if header else b""
        theirs.sendall(header + _tag(b"", 0, header) + body + _tag(b"", 0, text, body[len(text) :]))
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(
            LostPeerError, match="invalid frame|values, expected|invalid JSON|not an object|fails authentication|closed"
        ):
            Channel(ours, SIZES, 5).receive()


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_lost_peer_error(frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(LostPeerError):
            _receive_all(Channel(ours, SIZES, 5))


def _receive_all(channel: Channel) -> None:
    while True:
        assert isinstance(channel.receive(), PeerMessage)


def test_receive_timeout_is_reported() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(LostPeerError, match="no message for"):
        Channel(ours, SIZES, 0.05).receive()


@pytest.mark.parametrize(("theirs", "accepted"), [(b"a" * 32, True), (b"b" * 32, False), (b"", False)])
def test_only_peers_with_the_token_are_accepted(theirs: bytes, accepted: bool) -> None:
    outcome: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                try:
                    accept(connection, b"a" * 32)
                    outcome.append("in")
                except LostPeerError as error:
                    outcome.append(str(error))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            connect(server.getsockname(), theirs, SIZES, 5).close()
            assert accepted
        except LostPeerError:
            assert not accepted
        thread.join(300)
    assert outcome == (["in"] if accepted else ["the other end does not know the token"])


def test_metadata_is_plain_json(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    one.send(PeerMessage(MessageKind.FAILED, meta={"why": "__import__('os')"}))
    assert json.loads(json.dumps(other.receive().meta)) == {"why": "__import__('os')"}


def _authenticated(token: bytes = b"t" * 32) -> tuple[Channel, Channel, socket.socket]:
    """The worker's and the server's end of an authenticated connection, and the server's socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found: list[Channel] = []
        thread = threading.Thread(target=lambda: found.append(connect(server.getsockname(), token, SIZES, 5)))
        thread.start()
        connection, _ = server.accept()
        keys = accept(connection, token)
        thread.join()
    return found[0], Channel(connection, SIZES, 5, keys), connection


@pytest.mark.parametrize("place", ["header", "values", "repeated", "reflected"])
def test_altered_replayed_or_reflected_frame_is_rejected(place: str) -> None:
    worker, server, theirs = _authenticated()
    message = PeerMessage(MessageKind.PUSH, 1, values=np.ones(4, np.float32))
    worker.send(message)
    size = worker.sent
    frame = bytearray(theirs.recv(size, socket.MSG_WAITALL))
    if place == "reflected":
        theirs.sendall(frame)
        with pytest.raises(LostPeerError, match="fails authentication"):
            worker.receive()
        return
    if place == "header":
        frame[7] ^= 1
    elif place == "values":
        frame[-TAG_BYTES - 3] ^= 1
    ours, other = socket.socketpair()
    receiver = Channel(ours, SIZES, 5, server._keys)
    with ours, other:
        other.sendall(frame * 2)
        if place == "repeated":
            assert receiver.receive().values.tolist() == [1, 1, 1, 1]
        with pytest.raises(LostPeerError, match="fails authentication"):
            receiver.receive()
    theirs.close()
    worker.close()


def test_slow_greeting_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HANDSHAKE_TIMEOUT_S", 0.3)
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.05):
            theirs.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    with ours, theirs:
        try:
            with pytest.raises(LostPeerError, match="too slow"):
                accept(ours, b"t" * 32)
        finally:
            stop.set()
            thread.join()
