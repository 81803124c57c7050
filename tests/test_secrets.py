"""The secret scan of `make check` finds planted secrets."""

import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
SCAN = Path(sys.executable).with_name("detect-secrets-hook")
# As in the Makefile. Hashes are not secrets; false positives are marked by `pragma: allowlist secret`.
OPTIONS = ["--no-verify", "--exclude-files", r"\.lock$", "--exclude-lines", "SHA256 ="]

# Concatenated, so that this file does not contain them.
PLANTED = {
    "a cloud key": "AWS_KEY = '" + "AKIA" + "Z7VRSQ5TJN2XMLDP" + "'",
    "a private key": "-----BEGIN " + "RSA PRIVATE" + " KEY-----\nMIIEow\n",
    "a password in a URL": "url = 'https://admin:" + "hunter22" + "@kafka.example.com/'",
    "a password in a setting": "kafka_pass" + "word = 'Zx81-correct-horse'",
}


def scan(*files: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCAN, *OPTIONS, *files], cwd=CHECKOUT, capture_output=True, text=True, check=False)


def test_planted_secrets_are_found(tmp_path: Path) -> None:
    files = [tmp_path / f"{kind}.py" for kind in PLANTED]
    for file, secret in zip(files, PLANTED.values(), strict=True):
        file.write_text(secret)
    done = scan(*files)
    assert done.returncode != 0
    assert all(re.search(rf"Location: .*{file.name}:1", done.stdout) for file in files)


def test_make_check_scans_with_these_options() -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    call = re.search(r"detect-secrets-hook (.*)$", makefile, re.MULTILINE)
    assert call is not None
    assert call[1].replace("$$", "$").replace("'", "").split() == " ".join(OPTIONS).split()
