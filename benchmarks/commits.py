"""What does the commit of a micro-batch cost, on a local disk and in a bucket, and does it grow with the log?

Measured without Spark, Kafka and a model: the files of each batch are written in advance, and only the decision and the
commits of all tables are timed. The bucket is SeaweedFS on loopback; a real one adds its latency to each sequential
request.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from unittest.mock import patch

import pyarrow as pa

from benchmarks.pairs import Pair
from streaming.pipeline.decisions import CountedRange, Decision, Decisions, Figures, ModelVersion
from streaming.pipeline.finish import Tables, apply, finish_decided
from streaming.pipeline.positions import StreamIdentity, identity_key
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.tables import FEATURES, PREDICTIONS, QUARANTINE, SHADOW
from tests.object_store import BUCKET, WEED, ObjectStoreServer, start_object_store, stop_object_store
from tests.store_proxy import StoreProxy

COMMITS, MEASURED, COUNTED, ROWS = 1_000, 50, 10, 20
AIM_REQUESTS = 12
AIM_LOCAL_S, AIM_BUCKET_S, AIM_GROWTH, AIM_FINISH_S = 0.010, 0.050, 1.2, 0.2
AIM_QUERY_S = {"local": (2.0, 2.0), "bucket": (3.0, 2.0)}
SHA256 = "0" * 64
NOW = datetime(2024, 5, 6, tzinfo=UTC)
QUESTION = "SELECT label, count(*) FROM predictions GROUP BY label"


class Stream:
    """A stream of synthetic batches with files in every table."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tables = Tables(settings.place.tables)
        self.decisions = Decisions(settings.place.store, settings.topic)
        self.number = 0
        self._id = str(uuid.uuid4())
        identity = StreamIdentity(self._id, settings.topic, {settings.topic: "id"}, ())
        settings.place.store.create(identity_key(settings.topic), identity.to_json())

    def decision(self) -> Decision:
        """Write the files of the next batch, and return it."""
        self.number += 1
        start, topic = self.number * 2 * ROWS, self.settings.topic
        rows = [
            {"topic": topic, "partition": 0, "offset": start + n, "image_id": f"{start + n:064x}"} for n in range(40)
        ]
        good, bad = rows[:ROWS], [row | {"value": b"bad", "reason": "truncated"} for row in rows[ROWS:]]
        files = {
            "predictions": (
                [row | {"label": "cat", "confidence": 0.5, "date": NOW.date()} for row in good],
                PREDICTIONS,
            ),
            "quarantine": (bad, QUARANTINE),
            "shadow": (good, SHADOW),
            "features": ([row | {"features": [0.0] * 64} for row in good], FEATURES),
        }
        return Decision(
            number=self.number,
            stream=self._id,
            ranges=(CountedRange(topic, 0, start, start + 2 * ROWS, 2 * ROWS),),
            model=ModelVersion(1, SHA256),
            challenger=None,
            topics={topic: "id"},
            left_out=(),
            figures=Figures(0, ROWS, {"truncated": ROWS}, {"batch": 1.0}, None, {}, NOW),
            files={
                name: tuple(self.tables[name].write(pa.Table.from_pylist(of_table, schema=schema)))
                for name, (of_table, schema) in files.items()
            },
            decided_at=NOW,
            nonce=uuid.uuid4().hex,
        )

    def commit(self) -> float:
        """Decide and commit the next batch; returns the seconds."""
        decision = self.decision()
        clock = perf_counter()
        if not (self.decisions.decide(decision) and apply(decision, self.tables, fresh=True)):
            raise RuntimeError("another stream works on this home")
        return perf_counter() - clock


def questions() -> Iterator[Pair]:
    with TemporaryDirectory() as scratch:
        yield from _of_home("local", Settings(home=f"{scratch}/home", topic="commits"), AIM_LOCAL_S)
    if not WEED.exists():
        return
    with TemporaryDirectory() as scratch, a_bucket(Path(scratch)) as server:
        settings = Settings(home=f"s3://{BUCKET}/home", work=Path(scratch), topic="commits")
        yield from _of_home("bucket", settings, AIM_BUCKET_S)
        yield _requests(server, settings.model_copy(update={"home": f"s3://{BUCKET}/counted"}))


def _requests(server: ObjectStoreServer, settings: Settings) -> Pair:
    with StoreProxy(server.port) as proxy, patch.dict("os.environ", server.environment(proxy.port)):
        stream = Stream(settings)
        stream.commit()
        before = len(proxy.requests)
        for _ in range(COUNTED):
            stream.commit()
        per_batch = (len(proxy.requests) - before) / COUNTED
    question = "bucket: requests of a micro-batch with 4 files, without the one that follows the aliases"
    return Pair(question, "", 1.0, [per_batch], [AIM_REQUESTS], less_is_better=True)


def _of_home(where: str, settings: Settings, aim_s: float) -> Iterator[Pair]:
    stream = Stream(settings)
    stream.commit()  # creates the tables
    early = [stream.commit() for _ in range(MEASURED)]
    yield Pair(f"{where}: commit of all tables, median of {MEASURED}", "s", 1.0, [median(early)], [aim_s], True)
    for _ in range(COMMITS - 2 * MEASURED):
        stream.commit()
    late = [stream.commit() for _ in range(MEASURED)]
    question = f"{where}: … at {COMMITS:,} commits, against the first: no more than {AIM_GROWTH} times"
    yield Pair(question, "s", round(1 / AIM_GROWTH, 2), [median(late)], [median(early)], True)
    yield Pair(f"{where}: the slowest of them, which write a checkpoint", "s", 1.0, [max(late)], [1.0], True)

    decision = stream.decision()
    stream.decisions.decide(decision)
    clock = perf_counter()
    finish_decided(settings, settings.topic, Tables(settings.place.tables))
    took = perf_counter() - clock
    yield Pair(
        f"{where}: a decided batch finished by another process, at {COMMITS:,} commits",
        "s",
        1.0,
        [took],
        [AIM_FINISH_S],
        True,
    )
    for state, aim in zip(("cold", "warm"), AIM_QUERY_S[where], strict=True):
        clock = perf_counter()
        query(settings, QUESTION)
        yield Pair(f"{where}: query of {COMMITS:,} files, {state}", "s", 1.0, [perf_counter() - clock], [aim], True)


@contextmanager
def a_bucket(scratch: Path) -> Iterator[ObjectStoreServer]:
    """A bucket in SeaweedFS; the environment has its endpoint and credentials."""
    server = start_object_store(scratch / "store")
    try:
        with patch.dict("os.environ", server.environment()):
            yield server
    finally:
        stop_object_store(scratch / "store")
