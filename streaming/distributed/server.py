"""The parameter server: a thread per worker, on the driver, bound to the driver's address."""

import secrets
import socket
import threading
from contextlib import suppress

from streaming.distributed.asynchronous import Asynchronous
from streaming.distributed.barrier import BrokenError
from streaming.distributed.options import TrainerOptions
from streaming.distributed.protocol import Channel, Kind, LostPeerError, Message, accept
from streaming.distributed.synchronous import Synchronous
from streaming.distributed.training_run import Answer, Callbacks, Course, State
from streaming.errors import ServiceError

TOKEN_BYTES = 32
GREETINGS_PER_WORKER = 4  # connections at a time that have not yet shown that they know the token
MAX_WHY_CHARS = 2_000


class ParameterServer:
    """Serves the workers of one training until it is closed; a context manager.

    Attributes:
        address: (host, port) for the workers.
        token: what they must know.
        course: where the training stands.
        mode: what becomes of the workers' words.
        sizes: the numbers of values that a frame may have.
    """

    def __init__(self, options: TrainerOptions, state: State, answer: Answer, callbacks: Callbacks, host: str) -> None:
        """Args:
        answer: what the first epoch begins with.
        host: the address to listen on.
        """
        self.course = Course(options, state, answer, callbacks)
        self.mode = Synchronous(self.course) if options.waits else Asynchronous(self.course)
        self.token = secrets.token_bytes(TOKEN_BYTES)
        n, more = len(state.weights), len(state.optimizer)
        self.sizes = frozenset({n, more, n + more})
        self._channels: set[Channel] = set()
        self._bytes_closed = 0
        self._closed = False
        self._greeting = threading.BoundedSemaphore(GREETINGS_PER_WORKER * options.workers)
        self._socket = socket.create_server((host, 0), backlog=options.workers * 2)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        threading.Thread(target=self._listen, name="parameter server", daemon=True).start()

    def __enter__(self) -> "ParameterServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more workers; those that are connected fail at their next word."""
        self._closed = True
        self.mode.break_off("the training is over")
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    @property
    def bytes_moved(self) -> int:
        """Between workers and server so far, both ways."""
        with self.course.lock:
            return self._bytes_closed + sum(one.sent + one.received for one in self._channels)

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if not self._greeting.acquire(blocking=False):
                connection.close()  # strangers who say nothing get no more threads
                continue
            threading.Thread(target=self._serve, args=(connection,), name="worker", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        options = self.course.options
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            try:
                keys = accept(connection, self.token)
            finally:
                self._greeting.release()
            channel = Channel(connection, self.sizes, options.timeout_s, keys)
            worker, attempt = _read_hello(channel.receive(), options.workers)
        except (LostPeerError, OSError):
            connection.close()  # a stranger
            return
        with self.course.lock:
            self._channels.add(channel)
        why = self._talk(channel, worker, attempt)
        if why is not None:
            with suppress(LostPeerError):
                channel.send(Message(Kind.FAILED, meta={"why": why[:MAX_WHY_CHARS]}))
        with self.course.lock:
            self._channels.discard(channel)
            self._bytes_closed += channel.sent + channel.received
        channel.close()

    def _talk(self, channel: Channel, worker: int, attempt: int) -> str | None:
        """Serve a worker; returns why it must give up, if it must."""
        try:
            self.mode.talk(channel, worker, attempt)
        except LostPeerError as error:
            if self.mode.give_up(worker, attempt, str(error)) and not self._closed:
                self.course.callbacks.lost(worker, attempt, str(error))
            return str(error)
        except BrokenError as error:
            return str(error)
        except ServiceError as error:
            return self._fail(error)
        except Exception as error:  # noqa: BLE001  a callback's; the training cannot go on
            return self._fail(ServiceError(f"{type(error).__name__}: {error}"))
        return None

    def _fail(self, error: ServiceError) -> str:
        course = self.course
        with course.lock:
            first = course.error is None
            course.error = course.error or error
        self.mode.break_off(str(error))
        if first:
            course.callbacks.failed()
        return str(error)


def _read_hello(message: Message, workers: int) -> tuple[int, int]:
    attempt = message.meta.get("attempt")
    if message.kind is not Kind.HELLO or message.worker >= workers or not isinstance(attempt, int):
        raise LostPeerError("expected a worker's greeting")
    return message.worker, attempt
