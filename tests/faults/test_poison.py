"""Poison messages: the query continues, and each invalid message is quarantined with the correct reason."""

from random import Random

import pytest

from examples.memory import MemoryWatch
from models.decode import BadImage, decode
from streaming.settings import Settings
from tests.conftest import NewService
from tests.faults.bombs import BOMBS
from tests.faults.harness import Sent, Stream, check_exactly_once, drain, rows, send
from tests.faults.poison import BAD, GOOD, Kind, samples
from tests.forms import Form, Record

SIZE = (224, 224)
HEAVY_GOOD = tuple(kind for kind in GOOD if kind.heavy)
HEAVY_BAD = tuple(kind for kind in BAD if kind.heavy)
DECODED = [kind for kind in (*GOOD, *BAD) if kind.name not in {bomb.name for bomb in BOMBS}]  # bombs: test_bombs.py


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_each_kind_is_decoded_or_rejected_for_its_reason(kind: Kind, rng: Random) -> None:
    for _ in range(1 if kind.heavy else 3):
        got = decode(kind.make(rng), SIZE)
        assert (got.reason if isinstance(got, BadImage) else None) == kind.reason


def _watched(settings: Settings, sent: Sent) -> MemoryWatch:
    with Stream(settings, until_drained=True) as stream, MemoryWatch(stream.process.pid) as watch:
        stream.wait_ended()
    (end,) = stream.events("end")
    assert end["restarts"] == 0
    assert not stream.events("trouble")
    check_exactly_once(settings, sent)
    return watch


def test_bad_messages_are_quarantined_and_the_query_continues(
    new_service: NewService, rng: Random, form: Form[int], record: Record
) -> None:
    count = form(10_000, 120)
    poisoned = new_service()
    sent = send(poisoned, samples(rng, good=count, bad=count, heavy=HEAVY_BAD))

    if form(True, False):
        watch = _watched(poisoned, sent)
    else:
        drained = drain(poisoned)
        assert (drained.restarts, drained.troubles) == (0, [])
        check_exactly_once(poisoned, sent)

    kinds = {one.kind for one in sent.values() if one.reason}
    record("poison: bad messages, kinds", form("10,000, ≥ 30", "120, ≥ 30"), f"{count:,}, {len(kinds)}")
    (found,) = rows(poisoned, "SELECT count(*) AS n, count(DISTINCT reason) AS reasons FROM quarantine")
    record("poison: quarantined, correct reason", "all", f"{found['n']:,}, {found['reasons']} reasons")
    if form(True, False):
        peak = watch.peaks
        record("poison: peak memory", "", f"Java {peak.java / 1e6:,.0f} MB, Python {peak.others / 1e6:,.0f} MB")
        for what, heavy in (("equally large images", HEAVY_GOOD), ("small images only", ())):
            clean = new_service()
            sent = send(clean, samples(rng, good=2 * count, bad=0, heavy=heavy))
            other = _watched(clean, sent)
            java, python = ((one - another) / 1e6 for one, another in zip(peak, other.peaks, strict=True))
            record(f"poison: over a clean run of {what}", "≤ 64 MB", f"Java {java:+.0f} MB, Python {python:+.0f} MB")
