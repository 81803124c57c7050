"""Why an encoded image cannot be scored, and the limits that it has to keep."""

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """The step on which a message was given up."""

    READ = "read"
    DECODE = "decode"
    PREPROCESS = "preprocess"
    SCORE = "score"


class Reason(StrEnum):
    """Why a message is in the quarantine: a closed vocabulary."""

    MISSING = "missing"  # the message has no value (a Kafka tombstone)
    EMPTY = "empty"
    TOO_LARGE = "too_large"  # more bytes than allowed
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"  # an image, in a format that is not taken
    DECOMPRESSION_BOMB = "decompression_bomb"  # more pixels, tiles, scans, chunks or metadata than allowed
    DECODE_TIMEOUT = "decode_timeout"  # more CPU time than allowed
    DECODE_MEMORY = "decode_memory"  # more memory than allowed
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSUPPORTED_MODE = "unsupported_mode"  # pixels without a defined meaning as 8-bit RGB
    NON_FINITE_FEATURES = "non_finite_features"
    MESSAGE_BOMB = "message_bomb"  # small in Kafka, and larger than any message may be once unpacked; no bytes are kept
    WRONG_FRAME = "wrong_frame"  # not base64, or not JSON with that field, where the stream was told to expect it
    TOO_MANY_HEADERS = "too_many_headers"  # of the message, or too large ones


@dataclass(frozen=True, slots=True)
class BadImage:
    """A message that cannot be scored: where, why (for machines) and why (for people)."""

    stage: Stage
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What is decoded, and what decoding may cost.

    Attributes:
        max_bytes: size of the encoded image.
        max_pixels: its width times its height.
        formats: as Pillow names them. HEIF needs the package pillow-heif.
        timeout_s: CPU seconds for one image.
        memory_bytes: for one image, besides what the decoding process has at its start.
        strict: refuse an image that is damaged and can still be shown.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 64_000_000
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
    timeout_s: float = 10.0
    memory_bytes: int = 1024**3
    strict: bool = False


DEFAULT_LIMITS = Limits()
