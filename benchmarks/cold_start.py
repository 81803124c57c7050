"""How long does the stream take from process start to the first committed row, initially and after a restart?"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

from benchmarks.pairs import Pair
from benchmarks.service import a_service
from streaming.query import query

IMAGES, RUNS, AIM_S = 100, 3, 30.0
SQL = "SELECT min(committed_at) AS at FROM batches WHERE committed_at >= $since::TIMESTAMPTZ"


def questions() -> Iterator[Pair]:
    with a_service() as service:
        settings = service.home("plain")
        seconds = []
        for _ in range(1 + RUNS):
            service.publish("cold", IMAGES)
            since = time.time()
            service.stream(settings, "cold", "--until-drained")
            parameters = {"since": datetime.fromtimestamp(since, UTC).isoformat()}
            (row,) = query(settings, SQL, parameters=parameters).to_pylist()
            seconds.append(row["at"].timestamp() - since)
        for what, found in (("first start", seconds[:1]), ("start again", seconds[1:])):
            question = f"{what}: process start → first committed row, against the aim"
            yield Pair(question, "s", 1.0, found, [AIM_S] * len(found), less_is_better=True)
