"""The reasons why an image cannot be scored, and the limits on decoding."""

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """The step at which a message failed."""

    READ = "read"
    DECODE = "decode"
    PREPROCESS = "preprocess"
    SCORE = "score"


class Reason(StrEnum):
    """The reason why a message is in the quarantine: a closed vocabulary."""

    MISSING = "missing"  # the message has no value (a Kafka tombstone)
    EMPTY = "empty"
    TOO_LARGE = "too_large"  # more bytes than allowed
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"  # an image in a format that is not accepted
    DECOMPRESSION_BOMB = "decompression_bomb"  # more pixels, tiles, scans, chunks or metadata than allowed
    DECODE_TIMEOUT = "decode_timeout"  # more CPU time than allowed
    DECODE_MEMORY = "decode_memory"  # more memory than allowed
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSUPPORTED_MODE = "unsupported_mode"  # pixels without a defined meaning as 8-bit RGB
    NON_FINITE_FEATURES = "non_finite_features"
    MESSAGE_BOMB = "message_bomb"  # larger than any message may be once decompressed; no bytes are kept
    WRONG_FRAME = "wrong_frame"  # not base64, or not JSON with the configured field
    TOO_MANY_HEADERS = "too_many_headers"  # too many headers, or too large ones


@dataclass(frozen=True, slots=True)
class BadImage:
    """A message that cannot be scored: the failing stage, the reason, and a detail for people."""

    stage: Stage
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on decoding one image.

    Attributes:
        max_bytes: the size of the encoded image.
        max_pixels: width times height.
        formats: accepted formats, by their names in Pillow. HEIF needs the package pillow-heif.
        timeout_s: CPU seconds.
        memory_bytes: memory beyond what the decoding process uses at its start.
        strict: reject an image that is damaged but can be decoded.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 64_000_000
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
    timeout_s: float = 10.0
    memory_bytes: int = 1024**3
    strict: bool = False


DEFAULT_LIMITS = Limits()
