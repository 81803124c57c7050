"""Distribution of the test files over the test processes, so that not every process starts a Spark session."""

import re
from collections.abc import Iterable
from functools import cache

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

from tests.prepare import CHECKOUT

# Only an estimate: a file that starts Spark without these words costs time.
STARTS_SPARK = re.compile(
    r"spark: SparkSession|rows: DataFrame|SPARK\.start|stream_during\(|drain\(|run_example"
    r"|imagestream\([^)]*\"(demo|features|report|retrain|stream|train|train-cnn|tune)\""
)


class SchedulingBySpark(LoadFileScheduling):
    """Files in their order, as with `--dist loadfile`; one process gets those without Spark first, the others last.

    Starting Spark and running its first queries takes half a minute of CPU time.
    """

    def _assign_work_unit(self, node: WorkerController) -> None:
        self.workqueue.move_to_end(first(self.workqueue, spark=node is not self.nodes[-1]), last=False)
        super()._assign_work_unit(node)


def first(files: Iterable[str], *, spark: bool) -> str:
    """The first file that starts Spark, or the first that does not; if there is none, the first file."""
    return next((file for file in files if starts_spark(file) == spark), next(iter(files)))


@cache
def starts_spark(file: str) -> bool:
    return bool(STARTS_SPARK.search((CHECKOUT / file).read_text(encoding="utf-8")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SchedulingBySpark | None:
    return SchedulingBySpark(config, log) if config.option.dist == "loadfile" else None
