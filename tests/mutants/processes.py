"""Tests of a mutant, in a process forked from one that has already imported whatever the tests need."""

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
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, process_time, sleep
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest

from tests.mutants.targets import PROGRAMS, SERVICES, Target

ROOT = Path(__file__).parents[2]
OWN = ("models", "producer", "streaming", "tests", "examples", "benchmarks")
OPTIONS = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
MEMORY_BYTES = 16 * 1024**3  # of address space
SPARE_CPU_S = 10  # beside five times what the tests take without a fault
WALL_PER_CPU = 10  # what is blocked uses no processor time; what only waits for its turn must not be ended
CPU_OVER = (-signal.SIGXCPU, -signal.SIGKILL)


@dataclass
class Baseline:
    """What the tests of a target do without a fault.

    Attributes:
        seconds: processor time of each test.
        calls: the first lines of the module's functions that each test calls.
        shared: of those that are called while fixtures are made, which other tests share.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)
    shared: list[int] = field(default_factory=list)

    def tests_of(self, scope: tuple[int, int] | None) -> list[str]:
        """The tests that may notice a fault in a function; all of them if it is in none.

        File by file in the order of the target, and quickest first in each.
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
    """How a process ended: its exit code, or the negative of the signal that ended it."""

    code: int
    late: bool


def warm_up(files: Sequence[str]) -> None:
    """Import what these tests import; modules of our own are forgotten, so that a mutant can take their place."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # to look for plugins takes longer than most of the tests
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            code = pytest.main(["--collect-only", *OPTIONS, *files])
        finally:
            sys.stdout = stdout
    if code:
        raise SystemExit(f"error: the tests cannot be collected: pytest --collect-only {' '.join(files)}")
    for name, module in list(sys.modules.items()):
        if _is_own(module) and not name.startswith("tests.mutants") and name not in {"tests", "__main__"}:
            del sys.modules[name]
    gc.freeze()  # children need not look at, and so copy, what was there before them


def _is_own(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if not file or not Path(file).is_relative_to(ROOT):
        return False
    return Path(file).relative_to(ROOT).parts[0] in OWN


def baseline(target: Target) -> Baseline:
    """Run all tests of a target once, as it is."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        answer = Path(directory) / "baseline.json"

        def work() -> int:
            recorder = _Recorder(str(ROOT / target.path))
            code = pytest.main([*OPTIONS, *target.tests], plugins=[recorder])
            answer.write_text(json.dumps(vars(recorder.baseline)))
            return code

        (ended,) = run_all([Job(None, work, cpu_s=600)], processes=1, keep=Path(directory) / "output")
        if ended[1].code:
            print((Path(directory) / "output").read_text(), file=sys.stderr)
            raise SystemExit(f"error: the tests of {target.path} do not pass as it is")
        return Baseline(**json.loads(answer.read_text()))


def job(key: Any, target: Target, text: str, tests: Sequence[str], seconds: float) -> "Job":
    """Tests of a target with another text in the place of the module's own."""

    def work() -> int:
        sys.meta_path.insert(0, _Finder(target.module, str(ROOT / target.path), text))
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return pytest.main([*OPTIONS, *files], plugins=[_Chosen(tests)])

    return Job(key, work, cpu_s=SPARE_CPU_S + 5 * seconds)


@dataclass(frozen=True)
class Job:
    """Work for a process of its own; `key` names it."""

    key: Any
    work: Callable[[], int]
    cpu_s: float


def run_all(jobs: Sequence[Job], processes: int, keep: Path | None = None) -> Iterator[tuple[Any, Ended]]:
    """Run jobs, some at a time, and yield each one's key and end, in the order in which they end.

    Args:
        keep: where to write what the jobs print.
    """
    waiting, running = list(reversed(jobs)), dict[int, tuple[Job, float, Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                one = waiting.pop()
                scratch = Path(tempfile.mkdtemp(prefix="mutant-"))
                running[_fork(one, scratch, keep or Path(os.devnull))] = (one, monotonic(), scratch)
            for pid, (one, started, scratch) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                late = not done and monotonic() - started > WALL_PER_CPU * one.cpu_s
                if late:
                    os.killpg(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                if done or late:
                    del running[pid]
                    shutil.rmtree(scratch, ignore_errors=True)
                    code = os.waitstatus_to_exitcode(status)
                    yield one.key, Ended(code, late or code in CPU_OVER)
            sleep(0.02)
    finally:
        for pid, (_, _, scratch) in running.items():
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            shutil.rmtree(scratch, ignore_errors=True)


def _fork(one: Job, scratch: Path, output: Path) -> int:
    """Start a job in a process group of its own, with limits of processor time and memory."""
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
    """Imports one module from another text than its file's."""

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


class _Chosen:
    """Runs these tests of those that were collected, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {test: number for number, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid]
        )


def _can_notice(item: pytest.Item) -> bool:
    function = getattr(item, "function", None)
    names = function.__code__.co_names if hasattr(function, "__code__") else ()
    return not SERVICES & set(getattr(item, "fixturenames", ())) and not PROGRAMS & set(names)


class _Recorder:
    """Notes what every test calls of one file, and how long it takes; leaves out what needs services."""

    def __init__(self, path: str) -> None:
        self.baseline = Baseline()
        self._path = path
        self._seen: set[int] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _can_notice(item)]

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
