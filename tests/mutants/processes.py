"""Tests of a mutant, in a process forked from one that has imported the dependencies of the tests."""

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, process_time, sleep
from types import CodeType, FrameType, ModuleType
from typing import Any

import psutil
import pytest

from tests.mutants.targets import PROCESSES, SERVICES, Target

ROOT = Path(__file__).parents[2]
PACKAGES = ("models", "producer", "streaming", "tests", "examples", "benchmarks")
OPTIONS = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
MEMORY_BYTES = 16 * 1024**3  # of address space
SPARE_CPU_S = 10  # in addition to five times the CPU time of the tests without a fault
WALL_PER_CPU = 10  # ends blocked processes, which use no CPU time, but not those that wait for a core
CPU_LIMIT_SIGNALS = (-signal.SIGXCPU, -signal.SIGKILL)


@dataclass
class Baseline:
    """The tests of a target without a fault.

    Attributes:
        seconds: CPU time of each test.
        calls: first lines of the module's functions that each test calls.
        shared: first lines of those that fixtures call, which other tests share.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)
    shared: list[int] = field(default_factory=list)

    def tests_of(self, scope: tuple[int, int] | None) -> list[str]:
        """The tests that may detect a fault in a function, or all tests if it is outside functions.

        The files are in the order of the target, and the tests of a file fastest first.
        """
        files = list(dict.fromkeys(test.partition("::")[0] for test in self.seconds))
        return sorted(
            (
                test
                for test in self.seconds
                if scope is None or any(scope[0] <= one <= scope[1] for one in (*self.calls[test], *self.shared))
            ),
            key=lambda test: (files.index(test.partition("::")[0]), self.seconds[test]),
        )


@dataclass(frozen=True)
class Ended:
    """Exit code of a process, or the negative signal that ended it, and whether it exceeded a time limit."""

    code: int
    timed_out: bool


def warm_up(files: Sequence[str]) -> None:
    """Import the dependencies of these tests; the project's modules are unloaded so that mutants can replace them."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # finding plugins takes longer than most tests
    with open(os.devnull, "w") as null:  # noqa: PTH123
        stdout, sys.stdout = sys.stdout, null
        try:
            code = pytest.main(["--collect-only", *OPTIONS, *files])
        finally:
            sys.stdout = stdout
    if code:
        raise SystemExit(f"error: the tests cannot be collected: pytest --collect-only {' '.join(files)}")
    for name, module in list(sys.modules.items()):
        if _is_project(module) and not name.startswith("tests.mutants") and name not in {"tests", "__main__"}:
            del sys.modules[name]
    gc.freeze()  # otherwise, garbage collection in children would copy shared pages


def _is_project(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if not file or not Path(file).is_relative_to(ROOT):
        return False
    return Path(file).relative_to(ROOT).parts[0] in PACKAGES


def baseline(target: Target) -> Baseline:
    """Run all tests of an unchanged target once."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        answer = Path(directory) / "baseline.json"

        def work() -> int:
            recorder = _Recorder(str(ROOT / target.path))
            code = pytest.main([*OPTIONS, *target.tests], plugins=[recorder])
            answer.write_text(json.dumps(vars(recorder.baseline)))
            return code

        (ended,) = run_all([Job(None, work, cpu_s=600)], processes=1, output=Path(directory) / "output")
        if ended[1].code:
            print((Path(directory) / "output").read_text(), file=sys.stderr)
            raise SystemExit(f"error: the tests of the unchanged {target.path} do not pass")
        return Baseline(**json.loads(answer.read_text()))


def job(key: Any, target: Target, text: str, tests: Sequence[str], seconds: float) -> "Job":
    """A job that runs tests of a target with another text of the module."""

    def work() -> int:
        sys.meta_path.insert(0, _Finder(target.module, str(ROOT / target.path), text))
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return pytest.main([*OPTIONS, *files], plugins=[_Selection(tests)])

    return Job(key, work, cpu_s=SPARE_CPU_S + 5 * seconds)


@dataclass(frozen=True)
class Job:
    """Work for a separate process, identified by `key`."""

    key: Any
    work: Callable[[], int]
    cpu_s: float


def run_all(jobs: Sequence[Job], processes: int, output: Path | None = None) -> Iterator[tuple[Any, Ended]]:
    """Run jobs in parallel and yield the key and the end of each, in the order of completion.

    Args:
        output: file for the output of the jobs (default: discarded).
    """
    waiting, running = list(reversed(jobs)), dict[int, tuple[Job, float, Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                one = waiting.pop()
                scratch = Path(tempfile.mkdtemp(prefix="mutant-"))
                running[_fork(one, scratch, output or Path(os.devnull))] = (one, monotonic(), scratch)
            for pid, (one, started, scratch) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                timed_out = not done and monotonic() - started > WALL_PER_CPU * one.cpu_s
                if timed_out:
                    os.killpg(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                if done or timed_out:
                    del running[pid]
                    code = os.waitstatus_to_exitcode(status)
                    ended = Ended(code, timed_out or code in CPU_LIMIT_SIGNALS)
                    if ended.timed_out:
                        _kill_servers(scratch)
                    shutil.rmtree(scratch, ignore_errors=True)
                    yield one.key, ended
            sleep(0.02)
    finally:
        for pid, (_, _, scratch) in running.items():
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            _kill_servers(scratch)
            shutil.rmtree(scratch, ignore_errors=True)


def _kill_servers(scratch: Path) -> None:
    """Kill servers in other sessions that a killed job has left running with files in its folder."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(scratch) in word for word in process.info["cmdline"] or ()):
            with suppress(psutil.Error):
                process.kill()


def _fork(one: Job, scratch: Path, output: Path) -> int:
    """Start a job in a separate process group, with limits of CPU time and memory."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = int(process_time() + one.cpu_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        code = int(one.work())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class _Finder(importlib.abc.MetaPathFinder):
    """Imports one module from a text instead of its file."""

    def __init__(self, module: str, path: str, text: str) -> None:
        self._module, self._path, self._text = module, path, text

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._module:
            return None
        return importlib.util.spec_from_loader(name, _Loader(name, self._path, self._text), origin=self._path)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._text, self.path, "exec", dont_inherit=True)


class _Selection:
    """Runs only these of the collected tests, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {test: number for number, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid]
        )


def _can_detect(item: pytest.Item) -> bool:
    function = getattr(item, "function", None)
    names = function.__code__.co_names if hasattr(function, "__code__") else ()
    return not SERVICES & set(getattr(item, "fixturenames", ())) and not PROCESSES & set(names)


class _Recorder:
    """Records each test's duration and calls of one file's functions; deselects tests that need services."""

    def __init__(self, path: str) -> None:
        self.baseline = Baseline()
        self._path = path
        self._seen: set[int] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _can_detect(item)]

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename == self._path:
            self._seen.add(frame.f_code.co_firstlineno)

    def _recorded(self) -> Iterator[set[int]]:
        self._seen = set()
        sys.setprofile(self._profile)
        threading.setprofile(self._profile)
        try:
            yield self._seen
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Any:
        for seen in self._recorded():
            result = yield
            self.baseline.shared = sorted({*self.baseline.shared, *seen})
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        started = process_time()
        for seen in self._recorded():
            result = yield
            self.baseline.calls[item.nodeid] = sorted(seen)
            self.baseline.seconds[item.nodeid] = process_time() - started
        return result
