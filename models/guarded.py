"""Decoding of untrusted images in guarded processes with limits on CPU time and memory.

Decoders are C code, which cannot be interrupted from within their process. They run in a subprocess that the kernel
kills when the CPU time for an image is used up, and that cannot allocate memory beyond its limit; a crash is treated
as a result. The process is started on first use, decodes one image after another, and is restarted after a crash.
Images are passed in shared memory, requests and replies as lines of JSON.

https://man7.org/linux/man-pages/man2/setitimer.2.html, …/man2/setrlimit.2.html, …/man2/memfd_create.2.html
"""

import atexit
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from time import monotonic
from typing import Any

from models.bad_image import BadImage, Limits, Reason, Stage

MODULE = "models.guarded_main"
WALL_FACTOR = 4  # times the CPU time: on a busy machine, a process waits for a core
START_TIMEOUT_S = 60.0
MAX_REPLY_BYTES = 64 * 1024
CLOSE_TIMEOUT_S = 1.0
EXIT_NO_MEMORY = 77  # exit code of a process without memory for a reply
_RECEIVE_BYTES = 4096


class EndedError(Exception):
    """The process exited or was killed before it replied."""

    def __init__(self, status: int, *, in_time: bool) -> None:
        """`status` is the return code; `in_time` is False if the process was killed at a timeout."""
        super().__init__(f"ended with {status}")
        self.status = status
        self.in_time = in_time

    @property
    def crashed(self) -> bool:
        """Whether it ended for another reason than its limits."""
        return self.in_time and self.status not in (-signal.SIGPROF, EXIT_NO_MEMORY)


class _Process:
    """A guarded process; not thread-safe."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        # An anonymous file, whose pages are released when it is truncated.
        self._memory = os.memfd_create("imagestream-image") if hasattr(os, "memfd_create") else _temporary_file()
        self._socket = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), str(self._memory)],
                pass_fds=(theirs.fileno(), self._memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # C libraries log to it
                cwd="/",
                # The environment is not inherited: it may contain secrets and settings of allocators.
                env={
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),  # noqa: PTH100
                    "OPENBLAS_NUM_THREADS": "1",
                    "OMP_NUM_THREADS": "1",
                },
            )
        try:
            self._receive(START_TIMEOUT_S)
        except EndedError:
            self.close()
            raise

    def call(self, request: dict[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], bytes]:
        """Send a request and return the reply and its bytes.

        Args:
            request: "operation" and its arguments.

        Raises:
            EndedError: the process ended without a reply.
        """
        _write(self._memory, data)
        asked = request | {"length": len(data), "timeout_s": limits.timeout_s, "memory_bytes": limits.memory_bytes}
        with suppress(BrokenPipeError, ConnectionResetError):  # detected below
            self._socket.sendall(json.dumps(asked).encode() + b"\n")
        reply = self._receive(WALL_FACTOR * limits.timeout_s)
        if "ending" in reply:
            raise EndedError(EXIT_NO_MEMORY, in_time=True)
        result = os.pread(self._memory, reply.pop("length", 0), 0)
        os.ftruncate(self._memory, 0)
        return reply, result

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Wait for the process to exit, then kill it."""
        self._socket.close()
        os.close(self._memory)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Release a process of this process' parent after a fork."""
        self._socket.close()
        os.close(self._memory)
        self._process.returncode = 0  # not a child of this process: do not wait for it

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        give_up, line = monotonic() + timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, give_up - monotonic())):
                    self._process.kill()
                    raise EndedError(self._process.wait(), in_time=False)
                try:
                    part = self._socket.recv(_RECEIVE_BYTES)
                except ConnectionResetError:
                    part = b""
                if not part or len(line) > MAX_REPLY_BYTES:
                    if part:
                        self._process.kill()
                    raise EndedError(self._process.wait(), in_time=True)
                line += part
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Pool:
    """The idle processes, as many as the maximum number of concurrent requests so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    @contextmanager
    def one(self) -> Iterator[_Process]:
        """A process for one request, which returns to the pool unless it died."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is not None and not process.alive():
            process.close()
            process = None
        process = process or _Process()
        try:
            yield process
        except BaseException:
            process.close()
            raise
        with self._lock:
            self._idle.append(process)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        while self._idle:
            self._idle.pop().forget()


_pool = _Pool()
atexit.register(_pool.close)
os.register_at_fork(after_in_child=_pool.after_fork)


def run_guarded(request: dict[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], bytes] | BadImage:
    """Run an operation of `models.guarded_main` on `data`.

    Args:
        request: "operation" and its arguments, as JSON values.

    Returns:
        The reply and its bytes; a `BadImage` if a limit was exceeded or the decoder crashed.
    """
    try:
        with _pool.one() as process:
            return process.call(request, data, limits)
    except EndedError as ended:
        if not ended.crashed:
            return _bad_image(ended, limits)
    try:  # retry once: the cause may be external, such as an administrator or a lack of memory
        with _pool.one() as process:
            return process.call(request, data, limits)
    except EndedError as ended:
        return _bad_image(ended, limits)


def _bad_image(ended: EndedError, limits: Limits) -> BadImage:
    if not ended.in_time or ended.status == -signal.SIGPROF:
        return BadImage(
            Stage.DECODE, Reason.DECODE_TIMEOUT, f"decoding was stopped after {limits.timeout_s:g} s of CPU time"
        )
    if ended.status in (EXIT_NO_MEMORY, -signal.SIGKILL):  # sent by the kernel when memory is exhausted
        mebibytes = limits.memory_bytes // 1024**2
        return BadImage(Stage.DECODE, Reason.DECODE_MEMORY, f"decoding needs more than {mebibytes:,} MiB of memory")
    how = f"signal {-ended.status}" if ended.status < 0 else f"exit code {ended.status}"
    return BadImage(Stage.DECODE, Reason.CORRUPT, f"the decoder crashed ({how})")


def _write(descriptor: int, data: bytes) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], done)


def _temporary_file() -> int:
    with TemporaryFile() as file:
        return os.dup(file.fileno())
