"""The profile of a running stream: core-seconds per stage, as shares of wall time multiplied by the number of cores."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from streaming.pipeline.commit import DRIVER_STEPS, BatchResult
from streaming.wording import counted

WARM_UP = 1  # micro-batches at the start of a process, while workers start and load the model
MIN_SHARE = 0.001  # of a batch's time; stages with less are left out of its line
# In the order of the data flow; `identity` is reading keys and headers.
STAGES = (
    "load", "fetch", "decode", "backbone", "identity", "projection", "classifier", "drift", "shadow", "write",
    "serialise",
)  # fmt: skip


@dataclass(frozen=True)
class Share:
    """A stage: its core-seconds, and their share of all core-seconds (0 to 1)."""

    stage: str
    seconds: float
    share: float


@dataclass
class Profile:
    """The sum over micro-batches. While the driver plans or commits, all cores count as used by it."""

    cores: int = 1
    batches: int = 0
    images: int = 0
    wall_s: float = 0.0  # including the time between batches
    core_s: dict[str, float] = field(default_factory=dict)

    def add(self, batch: BatchResult) -> None:
        """Add a micro-batch."""
        self.cores = batch.cores
        self.batches += 1
        self.images += batch.input_rows
        self.wall_s += batch.seconds["batch"] + batch.seconds["between"]
        for stage, seconds in core_seconds(batch.seconds, batch.cores).items():
            self.core_s[stage] = self.core_s.get(stage, 0.0) + seconds

    @property
    def measured(self) -> float:
        """The share of all core-seconds that the stages explain; the rest is Spark's overhead and idle cores."""
        return sum(self.core_s.values()) / max(self.wall_s * self.cores, 1e-9)

    def shares(self) -> list[Share]:
        """All stages in the order of the data flow, followed by the unexplained rest."""
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
    """The timings of a batch in core-seconds: a second of a worker counts once, one of the driver on every core."""
    worked = {stage: spent for stage, spent in seconds.items() if stage not in DRIVER_STEPS}
    return worked | {step: seconds[step] * cores for step in ("plan", "commit", "between") if seconds.get(step)}


class Profiler:
    """Profiles each batch of the process, and all batches after the warm-up together."""

    def __init__(self) -> None:
        self.total = Profile()
        self._seen = 0

    def add(self, batch: BatchResult) -> str:
        """Add a batch, and return one line about it."""
        self._seen += 1
        alone = Profile()
        alone.add(batch)
        if self._seen > WARM_UP:
            self.total.add(batch)
        shares = ", ".join(f"{share.stage} {share.share:.1%}" for share in alone.shares() if share.share >= MIN_SHARE)
        return (
            f"profile of batch {batch.batch_id}: {counted(batch.input_rows, 'image')} in {alone.wall_s:.2f} s "
            f"on {alone.cores} cores: {shares}"
        )
