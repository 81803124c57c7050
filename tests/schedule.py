"""Distribution of the test files over the test processes, so that not every process starts a Spark session."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

CHECKOUT = Path(__file__).parent.parent
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
        starts_spark = node is not self.nodes[-1]
        self.workqueue.move_to_end(first(self.workqueue, starts_spark), last=False)
        super()._assign_work_unit(node)


def first(files: Iterable[str], starts_spark: bool) -> str:
    """The first file that starts Spark, or the first that does not; if there is none, the first file."""
    fitting = (file for file in files if bool(STARTS_SPARK.search((CHECKOUT / file).read_text())) == starts_spark)
    return next(fitting, next(iter(files)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SchedulingBySpark | None:
    return SchedulingBySpark(config, log) if config.option.dist == "loadfile" else None
