"""How fast are files published, compared with confluent-kafka's C client sending the same bytes from memory?"""

from collections.abc import Iterator

import producer
from benchmarks.pairs import Pair
from benchmarks.processes import PEERS, make_environment, run_json
from benchmarks.service import a_service
from streaming.settings import read_settings

FILES, RUNS = 10_000, 3
AIM, AIM_MB_S = 0.5, 100
CONFLUENT = ("confluent-kafka==2.16.1",)


def questions() -> Iterator[Pair]:
    python = make_environment(read_settings().work_dir / "benchmarks" / "confluent", CONFLUENT)
    with a_service() as service:
        folder = service.scratch / "files"
        folder.mkdir()
        for number in range(FILES):
            (folder / f"{number:05}.jpg").write_bytes(service.images[number % len(service.images)])
        servers = str(service.settings.bootstrap_servers)
        ours: list[float] = []
        peer: list[float] = []
        for run in range(RUNS + 1):
            sent = producer.publish([folder], bootstrap_servers=servers, topic=f"ours-{run}")
            command = (python, PEERS / "confluent_producer.py", "--bootstrap", servers, "--topic", f"peer-{run}")
            figures = run_json(*command, "--folder", folder)
            if run:  # the first run fills the page cache
                ours.append(sent.megabytes_per_second)
                peer.append(figures["megabytes_per_s"])
        yield Pair(f"publish {FILES:,} files, against confluent-kafka from memory", "MB/s", AIM, ours, peer)
        yield Pair(f"publish {FILES:,} files, against the aim", "MB/s", 1.0, ours, [AIM_MB_S] * len(ours))
