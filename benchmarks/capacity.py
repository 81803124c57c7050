"""Does the model of `imagestream size` predict the measured throughput?"""

from collections.abc import Iterator

from benchmarks.pairs import Pair
from benchmarks.service import PIXELS, a_service
from streaming.jobs.capacity import images_per_s, measure

BATCHES = {250: 3_000, 1_000: 6_000, 2_000: 10_000}  # images in a micro-batch → images published
PARTITIONS = 4
WITHIN = 0.87  # of the prediction; an error of 15 %


def questions() -> Iterator[Pair]:
    with a_service() as service:
        settings = service.home("plain")
        for cores in (1, 2):
            costs = measure(service.flatbuffer(settings), PIXELS, PIXELS, cores)
            for batch, images in BATCHES.items():
                topic = f"capacity-{cores}-{batch}"
                service.publish(topic, images)
                master = {"IMAGESTREAM_MASTER": f"local[{cores},4]"}
                found = service.drain(settings, topic, batch, environment=master).images_per_s
                expected = images_per_s(costs, batch, cores, PARTITIONS)
                question = f"throughput of {cores} worker(s) in micro-batches of {batch:,}, against the model's"
                yield Pair(question, "images/s", WITHIN, [found], [expected])
