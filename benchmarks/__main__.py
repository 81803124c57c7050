"""`python -m benchmarks`: run the benchmarks, and write the results as a table and as JSON."""

import json
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import Pair

# `engine` imports TensorFlow, so it is last.
QUESTIONS = (
    "decoding", "predict", "end_to_end", "rivals", "latency", "answers", "micro_batch", "commits", "publishing",
    "workers", "capacity", "cold_start", "memory", "projection", "rescore", "pca_spark", "cnn", "cnn_scale", "int8",
    "engine",
)  # fmt: skip
QUICK = ("decoding", "end_to_end", "engine")  # with the `quick_questions` of a module, if it has them
INTEGER_FROM = 100
WIDTH = 180  # of the table without a terminal
LIBRARIES = ("ai-edge-litert", "keras", "numpy", "pillow", "scikit-learn")


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help=f"Benchmarks to run: {', '.join(QUESTIONS)}; default: all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Run only {', '.join(QUICK)}, with less work, in about five minutes.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="File for the results as JSON.")
    ] = None,
) -> None:
    """Measure imagestream and its peers alternately, and print the ratios."""
    unknown = set(only or []) - set(QUESTIONS)
    if unknown:
        raise typer.BadParameter(
            f"unknown benchmark {', '.join(sorted(unknown))}; expected one of {', '.join(QUESTIONS)}"
        )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    pairs: list[Pair] = []
    for name in only or (QUICK if quick else QUESTIONS):
        module = import_module(f"benchmarks.{name}")
        ask = getattr(module, "quick_questions", module.questions) if quick else module.questions
        with Console(stderr=True).status(f"{name} …"):
            for one in ask():
                pairs.append(one)
                print(f"{one.question}: {one.ratio:.2f}", file=sys.stderr, flush=True)  # all benchmarks take an hour
    table = Table("question", "ours", "peer", "unit", "ratio", "aim", "spread", box=None)
    for one in pairs:
        low, high = one.spread
        ours, peer = sorted(one.ours)[len(one.ours) // 2], sorted(one.peer)[len(one.peer) // 2]
        spread = f"{low:.2f} … {high:.2f}"
        table.add_row(one.question, _shown(ours), _shown(peer), one.unit, f"{one.ratio:.2f}", f"{one.aim:g}", spread)
    console.print(table)
    versions = {name: version(name) for name in LIBRARIES}
    console.print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}", highlight=False)
    if json_file:
        figures = [vars(one) | {"ratio": one.ratio, "spread": one.spread} for one in pairs]
        json_file.write_text(json.dumps({"cores": os.cpu_count(), "versions": versions, "figures": figures}, indent=2))


def _shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= INTEGER_FROM else f"{figure:.3g}"


if __name__ == "__main__":
    typer.run(main)
