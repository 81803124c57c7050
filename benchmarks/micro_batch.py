"""What does a micro-batch cost beyond its images, and does it cost more after a thousand commits?

Measured on a local disk, and in a SeaweedFS bucket on loopback if its wheel is installed.
"""

from collections.abc import Iterator

from benchmarks.commits import a_bucket
from benchmarks.pairs import Pair
from benchmarks.service import Service, a_service
from streaming.query import query
from streaming.settings import Settings
from tests.object_store import BUCKET, WEED

BATCHES, IMAGES_PER_BATCH = 1_050, 4  # one image per partition
IN_BUCKET = 300  # batches
EARLY, LATE = (10, 60), (1_000, 1_050)
AIM_S, AIM_BUCKET_S, AIM_GROWTH = 0.15, 0.30, 1.2
OPTIONS = ("--backbone", "cnn_color", "--weights", "random")

# From one commit to the next, less what the slowest core spent on the images: those are spread evenly.
SQL = """
WITH timed AS (
  SELECT row_number() OVER (ORDER BY committed_at) AS n,
         epoch(committed_at) - epoch(lag(committed_at) OVER (ORDER BY committed_at)) AS wall,
         (coalesce(seconds['decode'], 0) + coalesce(seconds['backbone'], 0)) / $cores AS images
  FROM batches)
SELECT median(wall - images) AS seconds FROM timed WHERE n BETWEEN $first AND $last
"""


def questions() -> Iterator[Pair]:
    with a_service() as service:
        settings = service.home("plain", *OPTIONS)
        _drain(service, settings, "micro", BATCHES)
        early, late = _median_s(settings, *EARLY), _median_s(settings, *LATE)
        question = f"a micro-batch beyond its images, median of {BATCHES:,}, against the aim"
        yield Pair(question, "s", 1.0, [_median_s(settings, 2, BATCHES)], [AIM_S], less_is_better=True)
        question = f"… at {LATE[0]:,} commits, against {EARLY[0]}: no more than {AIM_GROWTH} times"
        yield Pair(question, "s", round(1 / AIM_GROWTH, 2), [late], [early], less_is_better=True)
        if WEED.exists():
            with a_bucket(service.scratch):
                settings = service.home("work", *OPTIONS, uri=f"s3://{BUCKET}/home")
                _drain(service, settings, "bucket", IN_BUCKET)
                question = f"… with the home in a bucket, median of {IN_BUCKET}, against the aim"
                yield Pair(question, "s", 1.0, [_median_s(settings, 2, IN_BUCKET)], [AIM_BUCKET_S], less_is_better=True)


def _drain(service: Service, settings: Settings, topic: str, batches: int) -> None:
    service.publish(topic, batches * IMAGES_PER_BATCH)
    service.drain(settings, topic, IMAGES_PER_BATCH)


def _median_s(settings: Settings, first: int, last: int) -> float:
    parameters = {"cores": 2, "first": first, "last": last}
    return float(query(settings, SQL, parameters=parameters).to_pylist()[0]["seconds"])
