"""How much faster do two workers score a topic than one, each a separate executor with one core?"""

from collections.abc import Iterator

from benchmarks.end_to_end import in_turn
from benchmarks.pairs import Pair
from benchmarks.service import Service, a_service
from streaming.settings import Settings

IMAGES, BATCH, RUNS, AIM = 6_000, 1_000, 2, 1.8
MEGABYTES = 1_024


def questions() -> Iterator[Pair]:
    with a_service() as service:
        settings = service.home("plain")
        speeds = in_turn(
            lambda run: _images_per_s(service, settings, 2, f"two-{run}"),
            lambda run: _images_per_s(service, settings, 1, f"one-{run}"),
            RUNS,
        )
        yield Pair(f"two workers against one (local-cluster), {IMAGES:,} images", "images/s", AIM, *speeds)


def _images_per_s(service: Service, settings: Settings, workers: int, topic: str) -> float:
    service.publish(topic, IMAGES)
    master = f"local-cluster[{workers},1,{MEGABYTES}]"
    return service.drain(settings, topic, BATCH, environment={"IMAGESTREAM_MASTER": master}).images_per_s
