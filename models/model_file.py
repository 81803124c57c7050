"""The content of model files, common to all formats."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        shape: its shape, with 0 for a size that is not fixed; None if it is unknown.
        quantization: (scale, zero point) of integers that represent (q − zero point) · scale, if quantised.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    quantization: tuple[float, int] | None = None


@dataclass
class Contents:
    """The content of a model file.

    Attributes:
        opsets: versions of the operators by domain.
        producer: the software that wrote the file.
        operators: the number of occurrences of each operator, with its domain unless it is the format's own.
        parameters: the number of elements of all weights.
        metadata: texts by key.
        tensors: the names of all tensors that nodes compute.
        external: the names of files with external weights.
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
        """The class names that exporters store in a file, as text; None if there are none."""
        names = ("names", "classes", "class_names", "labels")
        return next((self.metadata[key] for key in names if key in self.metadata), None)


def one_line(error: Exception, limit: int = 300) -> str:
    """A library's error message on one line, for use in another message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]
