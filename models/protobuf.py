"""The wire format of Protocol Buffers: reading messages field by field without copying, and writing fields.

Used instead of generated classes for untrusted files: no allocation depends on a length in the file. Source:
https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterable, Iterator

from models.errors import ModelError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10
Field = tuple[int, int | memoryview]  # its number; the integer of a varint, the bytes of anything else


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message in order; raises ModelError if the bytes are not a message, or end within a field."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ModelError(f"not a protocol buffer: field {number} has the unknown wire type {kind}")
        if size > end - at:
            raise ModelError(f"field {number} claims {size:,} bytes, {end - at:,} are left in its message")
        yield number, message[at : at + size]
        at += size


def messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The fields of one number that contain bytes: messages, strings, or packed numbers."""
    for number, value in fields(message):
        if number == wanted and isinstance(value, memoryview):
            yield value


def integers(message: memoryview, wanted: int) -> list[int]:
    """The repeated signed integer of one field, packed or not."""
    found: list[int] = []
    for number, value in fields(message):
        if number != wanted:
            continue
        if isinstance(value, int):
            found.append(_signed(value))
            continue
        at = 0
        while at < len(value):
            integer, at = _varint(value, at)
            found.append(_signed(integer))
    return found


def text(message: memoryview, wanted: int) -> str:
    """The string in one field, the last of several; empty if there is none."""
    found = ""
    for value in messages(message, wanted):
        found = str(value, "utf-8", "replace")
    return found


def integer(message: memoryview, wanted: int, default: int = 0) -> int:
    """The signed integer in one field, the last of several."""
    return ([default, *integers(message, wanted)])[-1]


def field(number: int, value: int | bytes | memoryview) -> list[bytes | memoryview]:
    """A field as the pieces of its encoding; the value is not copied."""
    if isinstance(value, int):
        return [_encoded(number << 3 | VARINT), _encoded(value)]
    return [_encoded(number << 3 | BYTES), _encoded(len(value)), value]


def joined(number: int, pieces: Iterable[bytes | memoryview]) -> list[bytes | memoryview]:
    """A field whose message consists of pieces."""
    kept = list(pieces)
    return [_encoded(number << 3 | BYTES), _encoded(sum(map(len, kept))), *kept]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(value, offset of the next field)."""
    value = 0
    for shift in range(_MAX_VARINT_BYTES):
        if at + shift >= len(message):
            raise ModelError("not a protocol buffer: it ends within a number")
        byte = message[at + shift]
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:  # noqa: PLR2004
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + shift + 1
    raise ModelError(f"not a protocol buffer: a number has more than {_MAX_VARINT_BYTES} bytes")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _encoded(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
