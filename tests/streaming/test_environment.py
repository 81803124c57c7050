"""Commands behave the same in any working directory, environment and terminal, and next to any packages."""

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from streaming.environment import ROOT, cleaned, ignored
from streaming.images.dataset import digit_images, write_images
from streaming.settings import Settings
from tests.conftest import environment_of
from tests.streaming.history import commit_batch

SHADOWING = {"producer.py", "models/__init__.py", "streaming.py", "pyspark.py"}
DEVELOPER = {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "PYTHONPATH": f":{ROOT}:.", "PYTHONIOENCODING": "ascii"}
CRON = {"LC_ALL": "POSIX", "LANG": "tr_TR", "TZ": "Asia/Kathmandu", "COLUMNS": "40"}
PROXY = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:1")


def another_spark(folder: Path) -> dict[str, str]:
    """Variables of other installations, each of which prevents PySpark from starting or from using local files."""
    for name, text in {
        "hadoop/core-site.xml": "<configuration><property><name>fs.defaultFS</name><value>hdfs://127.0.0.1:1</value>"
        "</property></configuration>",
        "conf/spark-defaults.conf": f"spark.eventLog.enabled true\nspark.eventLog.dir {folder}/none\n",
        "conf/spark-env.sh": "exit 3\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {
        "SPARK_HOME": str(folder),
        "PYSPARK_SUBMIT_ARGS": "--master local[2]",
        "PYSPARK_DRIVER_PYTHON": "jupyter",
        "PYSPARK_GATEWAY_PORT": "1",
        "PYSPARK_GATEWAY_SECRET": "none",  # pragma: allowlist secret
        "SPARK_REMOTE": "sc://127.0.0.1:1",
        "SPARK_CONNECT_MODE_ENABLED": "1",
        "SPARK_API_MODE": "connect",
        "SPARK_CONF_DIR": str(folder / "conf"),
        "HADOOP_CONF_DIR": str(folder / "hadoop"),
    }


def command(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command like its console script, in `folder`, without HOME and with only these variables."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "imagestream", *map(str, arguments)],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with modules that terminate every process that imports them."""
    for name in SHADOWING:
        file = tmp_path / "project" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"raise SystemExit('imported {name}')\n")
    return tmp_path / "project"


def test_stream_runs_in_a_hostile_environment(service: Settings, folder: Path, tmp_path: Path) -> None:
    spark_variables = another_spark(tmp_path / "other")
    variables = spark_variables | DEVELOPER | CRON | PROXY | environment_of(service)
    write_images(tmp_path / "images", digit_images(8, 300))
    home = ("--home", service.home)
    before = set(folder.rglob("*"))

    for arguments in (("publish", tmp_path / "images"), ("stream", "--until-drained"), ("predictions",)):
        done = command(folder, *home, *arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert done.stdout.endswith("8 rows\n"), done.stdout
    done = command(folder, *home, "doctor", "--json", tmp_path / "doctor.json", **variables)
    found = {check["name"]: check["found"] for check in json.loads((tmp_path / "doctor.json").read_text())["checks"]}
    assert all(
        name in found["variables"] for name in spark_variables if name not in {"SPARK_CONF_DIR", "HADOOP_CONF_DIR"}
    )
    assert set(folder.rglob("*")) == before


def test_cluster_configuration_is_used_with_a_cluster_only(tmp_path: Path) -> None:
    variables = another_spark(tmp_path) | {"SPARK_LOCAL_DIRS": "/scratch", "HOME": "/root", "PYTHONPATH": f"{ROOT}::x"}
    everywhere = {"PATH", "SPARK_LOCAL_DIRS", "HOME", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUTF8", "LC_ALL", "LANG"}
    assert cleaned(variables, local=True).keys() == (everywhere | {"SPARK_LOCAL_IP"}) - {"PATH"}
    assert cleaned(variables, local=True)["PYTHONPATH"] == str(ROOT)
    cluster_only = {"SPARK_CONF_DIR", "HADOOP_CONF_DIR"}
    assert cleaned(variables, local=False).keys() == (everywhere | cluster_only) - {"PATH"}
    assert set(ignored(variables, local=True)) - set(ignored(variables, local=False)) == cluster_only


def test_packages_of_the_same_names_are_ignored_and_overwritten_ones_reported(tmp_path: Path) -> None:
    for name in ("models", "streaming"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("raise SystemExit('not imagestream')\n")
    run = [sys.executable, "-m", "imagestream", "--version"]
    shadowed = subprocess.run(
        run,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shadowed.returncode, shadowed.stdout[:12]) == (0, "imagestream "), shadowed.stderr
    shutil.copytree(ROOT / "imagestream", tmp_path / "site" / "imagestream")
    overwritten = subprocess.run(run, cwd=tmp_path / "site", capture_output=True, text=True, check=False)
    assert overwritten.returncode == 1
    assert overwritten.stderr.count("\n") == 1
    assert f"the package 'models' in {tmp_path / 'site'} is another distribution's" in overwritten.stderr


# In one process, which takes as long to start as all commands do.
EACH_COMMAND = """
import sys
from imagestream import main

home, *commands = sys.argv[1:]
for command in commands:
    sys.argv[1:] = ["--home", home, command]
    try:
        main()
    except SystemExit:
        print("end of", command)
"""


def test_output_fits_a_narrow_terminal_with_an_old_encoding(tmp_path: Path) -> None:
    commands = ("--help", "predictions", "status", "doctor")
    home = tmp_path / ".imagestream"
    commit_batch(Settings(home=home), 0, {0: (0, 4)})
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 40))
    output = b""
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", EACH_COMMAND, str(home), *commands],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "POSIX", "PYTHONIOENCODING": "latin-1"},
            stdin=end,
            stdout=end,
            stderr=stderr,
        )
    os.close(end)
    with suppress(OSError):  # EIO after the process has closed its side
        while part := os.read(terminal, 65536):  # read while it runs: the buffer of a terminal has only a few KiB
            output += part
    os.close(terminal)
    assert process.wait() == 0, (tmp_path / "stderr").read_text()
    assert b"Traceback" not in (tmp_path / "stderr").read_bytes()
    texts = output.decode("latin-1")
    for command in commands:
        text, ended, texts = texts.partition(f"end of {command}")
        assert ended, command
        assert text.strip(), command
