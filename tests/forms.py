"""The form of scenarios and simulations (short in `make test`, full in `make soak`), their seed, and their results."""

from collections.abc import Callable
from pathlib import Path
from random import Random, SystemRandom
from typing import TypeVar

import pytest

from tests.faults.poison import generator

T = TypeVar("T")
Form = Callable[[T, T], T]
Figure = tuple[str, str, str]  # name, target, result
Record = Callable[[str, str, str], None]

FIGURES = pytest.StashKey[list[Figure]]()
SEED = pytest.StashKey[int]()
FULL_TIMEOUT_S = 4 * 3600
SHORT_SEED = 614
FULL_ONLY = {
    "test_azure.py",
    "test_corpus.py",
    "test_coverage_guided.py",
    "test_random_operation.py",
    "test_tutorial.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run scenarios and simulations in full, for hours")
    parser.addoption("--seed", type=int, help="the seed of a run to repeat")


def _is_full(config: pytest.Config) -> bool:
    return bool(config.getoption("full"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without a short form are collected only with --full."""
    return True if collection_path.name in FULL_ONLY and not _is_full(config) else None


def leave_out_full_only(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `full_only` unless --full is given; a shorter test covers the same guarantee."""
    if not _is_full(config) and (left_out := [item for item in items if item.get_closest_marker("full_only")]):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def form(pytestconfig: pytest.Config) -> Form[T]:
    """A function that returns the value for the form of this run: `form(full, short)`."""
    return lambda full, short: full if _is_full(pytestconfig) else short


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The run's seed, printed in the summary at the end.

    The short form has a fixed seed, so that results are reproducible; the full form draws one.
    """
    given = pytestconfig.getoption("seed")
    drawn = SystemRandom().randrange(1_000_000) if _is_full(pytestconfig) else SHORT_SEED
    return pytestconfig.stash.setdefault(SEED, drawn if given is None else given)


@pytest.fixture
def rng(seed: int) -> Random:
    return generator(seed)


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    """A function that adds a result to the table in the summary: its name, its target, and the result."""
    figures = pytestconfig.stash.setdefault(FIGURES, [])
    return lambda *figure: figures.append(figure)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures, seed = config.stash.get(FIGURES, []), config.stash.get(SEED, None)
    if seed is not None:
        form = "full" if _is_full(config) else "short"
        terminalreporter.section(f"scenarios, {form} form, seed {seed}")
        terminalreporter.line(f'to repeat this run: make soak ARGS="--seed {seed} -k NAME"')
    for name, target, result in figures:
        terminalreporter.line(f"{name:<44} {target:<32} {result}")
