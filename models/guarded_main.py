"""The guarded process of `models.guarded`: handles one request at a time within its limits.

Run as `python -m models.guarded_main SOCKET MEMORY` with the descriptors of two open files.
"""

import json
import os
import resource
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from models.bad_image import BadImage, Limits
from models.guarded import EXIT_NO_MEMORY
from models.image_header import Header
from models.pixels import decode_pixels, opencv
from models.shrink import shrink_pixels

Answer = tuple[dict[str, Any], bytes]


def _decode(data: bytes, request: dict[str, Any]) -> Answer:
    limits = Limits(**request["limits"])
    header = Header(data, **request["header"])
    size = (request["size"][0], request["size"][1])
    found = decode_pixels(header, request["format"], size, limits, request["resize"], repair=True)
    if isinstance(found, BadImage):
        return {"bad": asdict(found)}, b""
    return {"damage": found.damage, "shape": found.pixels.shape}, found.pixels.tobytes()


def _shrink(data: bytes, request: dict[str, Any]) -> Answer:
    small = shrink_pixels(data, request["format"], request["max_side"], request["max_pixels"])
    return {"shrunk": small is not None}, small or b""


OPERATIONS: dict[str, Callable[[bytes, dict[str, Any]], Answer]] = {"decode": _decode, "shrink": _shrink}


def serve(channel: socket.socket, memory: int) -> None:
    """Answer requests until the channel is closed."""
    base_bytes = _address_space()
    lines = channel.makefile("rb")
    channel.sendall(b"{}\n")
    for line in lines:
        request = json.loads(line)
        _limit_memory(base_bytes + request["memory_bytes"])
        data = os.pread(memory, request["length"], 0)
        os.ftruncate(memory, 0)
        # CPU time of this process, so that the load of the machine does not matter.
        signal.setitimer(signal.ITIMER_PROF, request["timeout_s"])
        try:
            answer, result = OPERATIONS[request["operation"]](data, request)
        except MemoryError:
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.sendall(b'{"ending": true}\n')  # exiting releases the memory
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.pwrite(memory, result, 0)
        channel.sendall(json.dumps(answer | {"length": len(result)}).encode() + b"\n")


def _limit_memory(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = size if hard == resource.RLIM_INFINITY else min(size, hard)
    with suppress(ValueError, OSError):  # not supported on macOS
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """The size of this process' address space in bytes, as RLIMIT_AS counts it."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # limits are part of each request
    Image.preinit()
    with suppress(ImportError):  # before memory is limited
        opencv()
    with suppress(ImportError):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found,unused-ignore]

        pillow_heif.options.DECODE_THREADS = 1
        pillow_heif.register_heif_opener()


if __name__ == "__main__":
    try:
        _prepare()
        serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    except MemoryError:
        os._exit(EXIT_NO_MEMORY)
