"""Rows and plots of the drift page: with and without tested windows, and from a model of an earlier version."""

from pathlib import Path

import pytest

from streaming.dashboard import data
from streaming.dashboard.reader import SCHEMAS, Reader
from streaming.settings import Settings
from tests.streaming.history import commit_batch

FIGURES = {
    "psi_max": 0.3,
    "component": 7.0,
    "psi_mean": 0.1,
    "psi_expected": 0.09,
    "mean_shift": 0.5,
    "spread": 1.1,
    "low_confidence": 0.2,
    "low_confidence_in_training": 0.1,
}
WINDOW = {"window_rows": 510.0, "window_psi": 0.4, "p_value": 1e-30, "p_limit": 3e-5, "alarm": 1.0}


@pytest.fixture
def rows(tmp_path: Path) -> data.Rows:
    """A batch of an earlier version, one that is too small to be shown, and one that ends a window."""
    settings = Settings(home=tmp_path / "home")
    old = {name: value for name, value in FIGURES.items() if name != "psi_expected"}
    for number, figures in enumerate(
        (old | {"rows": 400.0}, FIGURES | {"rows": 20.0}, FIGURES | WINDOW | {"rows": 20.0})
    ):
        commit_batch(settings, number, {0: (3 * number, 3 * number + 3)}, drift=figures)
    reader = Reader(settings.place)
    reader.version(*SCHEMAS)
    return data.drift(reader)


def test_large_batches_and_ends_of_windows_are_shown(rows: data.Rows) -> None:
    assert [(row["images"], row["window_images"], row["alarm"]) for row in rows] == [(400, None, None), (20, 510, 1)]


def test_plots_accept_rows_of_earlier_versions(rows: data.Rows) -> None:
    from streaming.dashboard import charts
    from streaming.dashboard.pages import drift

    values = charts.drift(rows, drift.PSI, "PSI").to_dict()["datasets"]
    assert sum(len(one) for one in values.values()) == 2 * len(drift.PSI)
    (windows,) = charts.drift_windows(rows[1:]).to_dict()["datasets"].values()
    assert [(row["p_value"], row["shown"]) for row in windows] == [(1e-30, charts.MIN_P)]


@pytest.mark.parametrize(
    ("window", "verdict"),
    [
        (None, "not tested"),
        ({"window_images": 500, "alarm": 1.0, "p_value": 1e-9, "p_limit": 3e-5}, "drift"),
        ({"window_images": 500, "alarm": 0.0, "p_value": 1e-9, "p_limit": 3e-5}, "minor drift"),
        ({"window_images": 500, "alarm": 0.0, "p_value": 0.2, "p_limit": 3e-5}, "no drift"),
    ],
)
def test_verdict_is_that_of_the_last_window(window: dict[str, float] | None, verdict: str) -> None:
    from streaming.dashboard.pages import drift

    assert drift._verdict(window)[0] == verdict
