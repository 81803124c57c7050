"""Coverage-guided fuzzing of decoding; only in `make soak`, which installs the fuzzer."""

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import CHECKOUT
from tests.faults.poison import BAD, GOOD, generator
from tests.forms import Record

SECONDS = 1_800
SLOWEST_S = 1


def test_coverage_guided_fuzzing_finds_no_error_or_hang(seed: int, tmp_path: Path, record: Record) -> None:
    corpus, found = tmp_path / "corpus", tmp_path / "found"
    corpus.mkdir()
    found.mkdir()
    for number, kind in enumerate(kind for kind in (*GOOD, *BAD) if not kind.heavy):
        (corpus / str(number)).write_bytes(kind.make(generator(seed)) or b"")
    options = [
        f"-seed={seed + 1}",  # 0 means a random seed to libFuzzer
        f"-max_total_time={SECONDS}",
        f"-timeout={SLOWEST_S}",
        f"-report_slow_units={SLOWEST_S}",
        "-rss_limit_mb=4096",
        "-max_len=65536",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
    ]
    command = [sys.executable, "-m", "tests.faults.fuzz_decode", str(corpus), *options]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    findings = [(path.name, path.read_bytes()[:2_000]) for path in found.iterdir()]
    assert (done.returncode, findings) == (0, []), done.stderr[-3_000:]
    runs = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    record("fuzz: decode, coverage-guided", "no error, ≤ 1 s", f"{int(runs[0]):,} inputs in {SECONDS / 60:.0f} min")
