"""`python -m examples`: run the examples on small generated data, and print a table of their outcomes."""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from examples.memory import MemoryWatch
from examples.service import JsonOption, script
from streaming.errors import ServiceError
from streaming.settings import read_settings

# The backbone with installed ImageNet weights; those of the originals would be downloaded.
INSTALLED = ("--backbone", "efficientnet_lite0")
EXAMPLES: dict[str, tuple[str, ...]] = {
    "cifar10_mlp": ("--per-batch", "300", "--max-iter", "50"),
    "fruits_pca": INSTALLED,
    "digits_transfer": INSTALLED,
    "glasses_distributed": ("--faces", "600", "--size", "128", "--epochs", "12"),
    "fruits_projection": (*INSTALLED, "--per-class", "10"),
}
DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "examples.md"
BEGIN, END = "<!-- table: make examples ARGS=--docs -->\n", "<!-- end of table -->\n"
COLUMNS = ("example", "rows in", "rows out", "metric", "original", "seconds", "peak memory")
COLOURS = 128  # of plots in the documentation


@dataclass(frozen=True)
class Run:
    """A finished example; `outcome` is None if it failed."""

    example: str
    outcome: dict[str, Any] | None
    seconds: float
    peak: int
    java_peak: int

    @property
    def complete(self) -> bool:
        """Whether every image has a row and every message a prediction."""
        found = self.outcome
        return found is not None and (found["rows_in"], found["published"]) == (found["rows_out"], found["streamed"])

    def cells(self) -> list[str]:
        """The row of the table."""
        memory = f"{self.peak / 1e9:.1f} GB, of which Spark's JVM {self.java_peak / 1e9:.1f}"
        if self.outcome is None:
            return [self.example, "-", "-", "failed", "-", f"{self.seconds:.0f}", memory]
        found = self.outcome
        metric = f"{found['value']:.4f} {found['metric']}"
        rows = [f"{found[name]:,}" for name in ("rows_in", "rows_out")]
        return [self.example, *rows, metric, found["original"], f"{self.seconds:.0f}", memory]


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help=f"Examples to run: {', '.join(EXAMPLES)}; default: all.")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for one home per example, which are replaced; default: examples/small in your home.",
        ),
    ] = None,
    docs: Annotated[bool, typer.Option("--docs", help="Also write the table and plots into docs/.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Run the examples one after another on generated data."""
    names = only or [*EXAMPLES]
    unknown = set(names) - set(EXAMPLES)
    if unknown:
        raise ServiceError(f"unknown example {', '.join(sorted(unknown))}; expected one of {', '.join(EXAMPLES)}")
    folder = home or read_settings().work_dir / "examples" / "small"
    runs = [run(name, folder / name) for name in names]
    table = Table(*COLUMNS, box=None)
    for one in runs:
        table.add_row(*one.cells())
    Console(width=None if sys.stdout.isatty() else 200).print("", table)
    if json_file is not None:
        figures = [vars(one) | {"complete": one.complete} for one in runs]
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if docs:
        write_docs(runs)
    wrong = [one.example for one in runs if not one.complete]
    if wrong:
        raise ServiceError(f"some images have no row or no prediction in: {', '.join(wrong)}")


def run(name: str, home: Path) -> Run:
    """Run an example in an empty home, measuring its memory."""
    shutil.rmtree(home, ignore_errors=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", f"examples.{name}", *EXAMPLES[name], "--home", str(home), "--json", file.name]
        clock = perf_counter()
        with subprocess.Popen(command) as process, MemoryWatch(process.pid) as memory:
            code = process.wait()
        outcome = json.loads(Path(file.name).read_bytes()) if code == 0 else None
    return Run(name, outcome, perf_counter() - clock, memory.peak, memory.peaks.java)


def write_docs(runs: list[Run]) -> None:
    """Write the table and links to the plots into docs/examples.md, and the plots into docs/examples/."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    lines = [" | ".join(["", *cells, ""]).strip() for cells in (COLUMNS, ["---"] * len(COLUMNS))]
    lines += [" | ".join(["", *one.cells(), ""]).strip() for one in runs]
    pictures = []
    for one in runs:
        for plot in (one.outcome or {}).get("plots", []):
            to = DOCS / "examples" / f"{one.example}-{Path(plot).name}"
            to.parent.mkdir(exist_ok=True)
            with Image.open(plot) as image:
                image.convert("RGB").quantize(COLOURS).save(to, optimize=True)
            pictures.append(f"![{one.example}: {Path(plot).stem}](examples/{to.name})")
    new = "\n".join([*lines, "", *pictures]) + "\n"
    PAGE.write_text(head + BEGIN + "\n" + new + "\n" + END + tail, encoding="utf-8")


if __name__ == "__main__":
    script(main)
