"""What does a micro-batch cost beyond its images, and does it cost more after a thousand commits?"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.pairs import Pair
from benchmarks.service import a_service
from streaming.query import query

BATCHES, IMAGES_PER_BATCH = 1_050, 4  # one image per partition
EARLY, LATE = (10, 60), (1_000, 1_050)
AIM_S, AIM_GROWTH = 0.25, 1.2

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
    with TemporaryDirectory() as scratch, a_service(Path(scratch)) as service:
        settings = service.home("plain", "--backbone", "cnn_color", "--weights", "random")
        service.publish("micro", BATCHES * IMAGES_PER_BATCH)
        service.drain(settings, "micro", IMAGES_PER_BATCH)

        def median_s(first: int, last: int) -> float:
            parameters = {"cores": 2, "first": first, "last": last}
            return float(query(settings, SQL, parameters=parameters).to_pylist()[0]["seconds"])

        early, late = median_s(*EARLY), median_s(*LATE)
        question = "a micro-batch beyond its images, median, against the aim"
        yield Pair(question, "s", 1.0, [median_s(2, BATCHES)], [AIM_S], less_is_better=True)
        question = f"… at {LATE[0]:,} commits, against {EARLY[0]}: no more than {AIM_GROWTH} times"
        yield Pair(question, "s", round(1 / AIM_GROWTH, 2), [late], [early], less_is_better=True)
