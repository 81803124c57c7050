"""Where the time of a running stream goes: core-seconds per stage, held against the wall clock times the cores."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from streaming.pipeline.commit import DRIVER_STEPS, BatchResult

WARM_UP = 1  # micro-batches at the start of a process, in which workers start and load the model
TOLD_FROM = 0.001  # of a batch's time: what took less is not worth a word on its line
# In the order of the way of the data; `identity` is reading keys and headers.
STAGES = (
    "load", "fetch", "decode", "backbone", "identity", "projection", "classifier", "drift", "shadow", "write",
    "serialise",
)  # fmt: skip


@dataclass(frozen=True)
class Share:
    """One stage: the core-seconds it took, and its part of all that there were (0 to 1)."""

    stage: str
    seconds: float
    share: float


@dataclass
class Profile:
    """The sum over micro-batches. All cores of the machine stand still while the driver plans or commits."""

    cores: int = 1
    batches: int = 0
    images: int = 0
    wall_s: float = 0.0  # with the time between batches
    core_s: dict[str, float] = field(default_factory=dict)

    def add(self, batch: BatchResult) -> None:
        """Take in one micro-batch."""
        self.cores = batch.cores
        self.batches += 1
        self.images += batch.input_rows
        self.wall_s += batch.seconds["batch"] + batch.seconds["between"]
        for stage, seconds in core_seconds(batch.seconds, batch.cores).items():
            self.core_s[stage] = self.core_s.get(stage, 0.0) + seconds

    @property
    def measured(self) -> float:
        """The part of the wall clock that the stages explain; the rest is Spark's, and cores that have no task left."""
        return sum(self.core_s.values()) / max(self.wall_s * self.cores, 1e-9)

    def shares(self) -> list[Share]:
        """Every stage that took time, in the order of the way of the data, and at last what no stage explains."""
        total = max(self.wall_s * self.cores, 1e-9)
        order = [*STAGES, "plan", "commit", "between"]
        shares = [
            Share(stage, self.core_s[stage], self.core_s[stage] / total) for stage in order if stage in self.core_s
        ]
        rest = total - sum(self.core_s.values())
        return [*shares, Share("Spark and idle cores", rest, rest / total)]

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "batches": self.batches,
            "images": self.images,
            "cores": self.cores,
            "wall_s": self.wall_s,
            "images_per_second": self.images / max(self.wall_s, 1e-9),
            "measured": self.measured,
            "core_seconds": {share.stage: share.seconds for share in self.shares()},
        }


def core_seconds(seconds: Mapping[str, float], cores: int) -> dict[str, float]:
    """The seconds of a batch as core-seconds: those of workers as they are, those of the driver on every core."""
    worked = {stage: spent for stage, spent in seconds.items() if stage not in DRIVER_STEPS}
    return worked | {step: seconds[step] * cores for step in ("plan", "commit", "between") if seconds.get(step)}


class Profiler:
    """Profiles of the process' batches: each alone, and all that came after the warm-up together."""

    def __init__(self) -> None:
        self.total = Profile()
        self._seen = 0

    def add(self, batch: BatchResult) -> str:
        """Take in a batch; one line about it."""
        self._seen += 1
        alone = Profile()
        alone.add(batch)
        if self._seen > WARM_UP:
            self.total.add(batch)
        told = ", ".join(f"{share.stage} {share.share:.1%}" for share in alone.shares() if share.share >= TOLD_FROM)
        return (
            f"profile of batch {batch.batch_id}: {batch.input_rows:,} images in {alone.wall_s:.2f} s "
            f"on {alone.cores} cores: {told}"
        )
