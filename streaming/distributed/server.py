"""The parameter server on the driver, with a thread per worker."""

import secrets
import socket
import threading
from contextlib import suppress

from streaming.distributed.asynchronous import Asynchronous
from streaming.distributed.barrier import BrokenError
from streaming.distributed.options import TrainerOptions
from streaming.distributed.protocol import Channel, LostPeerError, MessageKind, PeerMessage, accept
from streaming.distributed.synchronous import Synchronous
from streaming.distributed.training_run import Callbacks, EpochDecision, State, TrainingRun
from streaming.errors import ServiceError

TOKEN_BYTES = 32
HANDSHAKES_PER_WORKER = 4  # maximum number of unauthenticated connections per worker
MAX_WHY_CHARS = 2_000


class ParameterServer:
    """Serves the workers of one training until it is closed; a context manager.

    Attributes:
        address: (host, port) for the workers.
        token: secret that workers must know.
        mode: how the workers' updates are combined.
        sizes: permitted numbers of values of a frame, besides 0.
    """

    def __init__(
        self, options: TrainerOptions, state: State, decision: EpochDecision, callbacks: Callbacks, host: str
    ) -> None:
        """Listen on an address of `host`; `decision` has the parameters of the first epoch."""
        self.run = TrainingRun(options, state, decision, callbacks)
        self.mode = Synchronous(self.run) if options.waits else Asynchronous(self.run)
        self.token = secrets.token_bytes(TOKEN_BYTES)
        n, more = len(state.weights), len(state.optimizer)
        self.sizes = frozenset({n, more, n + more})
        self._channels: set[Channel] = set()
        self._bytes_closed = 0
        self._closed = False
        self._handshakes = threading.BoundedSemaphore(HANDSHAKES_PER_WORKER * options.workers)
        self._socket = socket.create_server((host, 0), backlog=options.workers * 2)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        threading.Thread(target=self._listen, name="parameter server", daemon=True).start()

    def __enter__(self) -> "ParameterServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Accept no more workers; connected ones fail at their next message."""
        self._closed = True
        self.mode.abort("the training is over")
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    @property
    def bytes_moved(self) -> int:
        """Number of bytes between workers and server so far, in both directions."""
        with self.run.lock:
            return self._bytes_closed + sum(one.sent + one.received for one in self._channels)

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if not self._handshakes.acquire(blocking=False):
                connection.close()  # unauthenticated connections get a limited number of threads
                continue
            threading.Thread(target=self._serve, args=(connection,), name="worker", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        options = self.run.options
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            try:
                keys = accept(connection, self.token)
            finally:
                self._handshakes.release()
            channel = Channel(connection, self.sizes, options.timeout_s, keys)
            worker, attempt = _read_hello(channel.receive(), options.workers)
        except (LostPeerError, OSError):
            connection.close()  # not a worker of this training
            return
        with self.run.lock:
            self._channels.add(channel)
        why = self._serve_worker(channel, worker, attempt)
        if why is not None:
            with suppress(LostPeerError):
                channel.send(PeerMessage(MessageKind.FAILED, meta={"why": why[:MAX_WHY_CHARS]}))
        with self.run.lock:
            self._channels.discard(channel)
            self._bytes_closed += channel.sent + channel.received
        channel.close()

    def _serve_worker(self, channel: Channel, worker: int, attempt: int) -> str | None:
        """Serve a worker; return why it must end, if it failed."""
        try:
            self.mode.serve(channel, worker, attempt)
        except LostPeerError as error:
            if self.mode.drop_worker(worker, attempt, str(error)) and not self._closed:
                self.run.callbacks.lost(worker, attempt, str(error))
            return str(error)
        except BrokenError as error:
            return str(error)
        except ServiceError as error:
            return self._fail(error)
        except Exception as error:  # noqa: BLE001  raised by a callback; the training cannot continue
            return self._fail(ServiceError(f"{type(error).__name__}: {error}"))
        return None

    def _fail(self, error: ServiceError) -> str:
        run = self.run
        with run.lock:
            first = run.error is None
            run.error = run.error or error
        self.mode.abort(str(error))
        if first:
            run.callbacks.failed()
        return str(error)


def _read_hello(message: PeerMessage, workers: int) -> tuple[int, int]:
    attempt = message.meta.get("attempt")
    if message.kind is not MessageKind.HELLO or message.worker >= workers or not isinstance(attempt, int):
        raise LostPeerError("expected a worker's greeting")
    return message.worker, attempt
