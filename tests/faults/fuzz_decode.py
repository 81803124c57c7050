"""The coverage-guided target for decoding: `python -m tests.faults.fuzz_decode CORPUS [libFuzzer's options]`.

Guided by the branches taken in `models.decode` and in Pillow's Python code; its C decoders are not instrumented.
"""

import sys

import atheris

with atheris.instrument_imports(include=["PIL", "models.decode"]):
    from models.decode import BadImage, Limits, Reason, decode

SIZE = (64, 64)
LIMITS = Limits(max_bytes=1 << 20)


def check(data: bytes) -> None:
    """What libFuzzer calls: anything raised here, or more than its -timeout, is a finding."""
    got = decode(data, SIZE, LIMITS)
    if isinstance(got, BadImage):
        if got.reason not in Reason or not got.detail:
            raise AssertionError(got)
    elif got.shape != (*SIZE, 3):
        raise AssertionError(got.shape)


if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
