"""What the file of a model says of itself, whatever its format."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, type, and shape, in which a size that is not fixed is 0; None for no shape.

    Attributes:
        quantization: (scale, zero point) of integers that stand for (q − zero point) · scale; None without.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    quantization: tuple[float, int] | None = None


@dataclass
class Contents:
    """What is in a file.

    Attributes:
        opsets: versions of the operators, by domain.
        operators: how often each occurs, with its domain where that is not the format's own.
        parameters: number of elements of all weights.
        metadata: what the file says in words, by key.
        tensors: every name that a node computes.
        external: the names of files beside it that hold weights.
    """

    opsets: dict[str, int] = field(default_factory=dict)
    producer: str = ""
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    parameters: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    tensors: set[str] = field(default_factory=set)
    external: set[str] = field(default_factory=set)

    @property
    def classes(self) -> str | None:
        """The class names that exporters keep in a file, as text; None if there are none."""
        return _names_in(self.metadata)


def _names_in(metadata: Mapping[str, str]) -> str | None:
    return next((metadata[key] for key in ("names", "classes", "class_names", "labels") if key in metadata), None)


def one_line(error: Exception, limit: int = 300) -> str:
    """What a library says of a file, as part of a message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]
