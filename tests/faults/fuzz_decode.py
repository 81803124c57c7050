"""Coverage-guided fuzz target for decoding: `python -m tests.faults.fuzz_decode CORPUS [libFuzzer's options]`.

Coverage is measured in this project's code and in Pillow's Python code; Pillow's C decoders are not instrumented.
Decoding runs in this process instead of a guarded one, so that its coverage is visible.
"""

import sys

import atheris

with atheris.instrument_imports(include=["PIL", "models"]):
    from models import decode
    from models.bad_image import BadImage, Limits, Reason
    from models.pixels import decode_pixels

SIZE = (64, 64)
LIMITS = Limits(max_bytes=1 << 20)


def check(data: bytes) -> None:
    """Called by libFuzzer: an exception, or a run beyond -timeout, is a finding."""
    got = decode.decode(data, SIZE, LIMITS)
    if isinstance(got, BadImage):
        if got.reason not in Reason or not got.detail:
            raise AssertionError(got)
    elif got.shape != (*SIZE, 3):
        raise AssertionError(got.shape)


def in_process(header, image_format, size, limits, resize):
    """Replaces the guarded process."""
    return decode_pixels(header, image_format, size, limits, resize, repair=True)


if __name__ == "__main__":
    decode._decode_guarded = in_process
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
