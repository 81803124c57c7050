"""Code shared by the examples: a separate home, commands of `imagestream`, and the outcome.

Every command is printed before it runs, as a user would type it.
"""

import csv
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from models.errors import ModelError
from streaming.errors import ServiceError
from streaming.settings import Settings, read_settings

HomeOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for everything the example writes; default: examples/NAME in your home."),
]
BackboneOption = Annotated[str, typer.Option(help="Backbone that computes the features.")]
WeightsOption = Annotated[
    str, typer.Option(help="Weights of the backbone: imagenet, random, or a file saved by Keras.")
]
PerClassOption = Annotated[
    int, typer.Option(min=2, help="Number of images to generate per class if no folder is given.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="File for the outcome as JSON.")]

INSTALLED = ("jars", "java", "backbones")  # folders of the user's home that examples link to


@dataclass(frozen=True)
class Outcome:
    """The outcome of an example.

    Attributes:
        rows_in: input images.
        rows_out: rows of the example's result, one per usable image.
        metric: the metric that `value` is, and its model.
        original: the published result of the original, and its model.
        streamed: predictions of the stream for them.
        plots: PNG files.
        details: further results by name.
    """

    example: str
    rows_in: int
    rows_out: int
    metric: str
    value: float
    original: str
    published: int
    streamed: int
    plots: list[Path] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def print_summary(self, json_file: Path | None) -> None:
        """Print the outcome, and write it as JSON if a file is given."""
        typer.echo(
            f"\n{self.example}: {self.rows_in:,} images, {self.rows_out:,} rows; {self.metric} {self.value:.4f} "
            f"(original: {self.original}); the stream answered {self.streamed:,} of {self.published:,} messages"
        )
        for name, value in self.details.items():
            typer.echo(f"  {name}: {value}")
        for plot in self.plots:
            typer.echo(f"  plot: {plot}")
        if json_file is not None:
            json_file.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Scored:
    """The numbers of published, predicted and quarantined images."""

    published: int
    predicted: int
    quarantined: int


@dataclass(frozen=True)
class Service:
    """The service of an example, in a new home."""

    settings: Settings

    @classmethod
    def new(cls, example: str, home: Path | None) -> "Service":
        """Create a service in `home`, by default `examples/EXAMPLE` in the user's home.

        Raises:
            ServiceError: the home contains tables, which would distort the example's counts.
        """
        own = read_settings()
        settings = read_settings(home or own.work_dir / "examples" / example)
        if "tables" in settings.place.store.folders():
            raise ServiceError(
                f"{settings.home} already contains tables: remove it, or set another home with --home DIR"
            )
        settings.work_dir.mkdir(parents=True, exist_ok=True)
        for name in INSTALLED:
            there, link = own.work_dir / name, settings.work_dir / name
            if there.is_dir() and not link.exists() and settings.home != own.home:
                link.symlink_to(there)
        return cls(settings)

    @property
    def home(self) -> Path:
        return self.settings.work_dir

    def run(self, *arguments: str | Path | float) -> dict[str, Any]:
        """Run a command of `imagestream`, and return its `--json` output.

        Raises:
            ServiceError: the command failed; its error is on the terminal.
        """
        words = [str(argument) for argument in arguments]
        typer.echo(f"\n$ imagestream --home {shlex.join([str(self.home), *words])}")
        sys.stdout.flush()
        with tempfile.NamedTemporaryFile(suffix=".json") as summary:
            command = [sys.executable, "-m", "streaming", "--home", str(self.home), *words, "--json", summary.name]
            if subprocess.run(command, check=False).returncode != 0:
                raise ServiceError(f"'imagestream {words[0]}' failed; see its error above")
            found: dict[str, Any] = json.loads(Path(summary.name).read_bytes() or b"{}")
        return found

    def query(self, sql: str) -> list[dict[str, Any]]:
        """The rows of `imagestream query`, with values as text."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.csv")
            self.run("query", sql, "--format", "csv", "--output", file)
            with file.open(encoding="utf-8", newline="") as rows:
                return list(csv.DictReader(rows))

    def score(self, *publish: str | Path) -> Scored:
        """Publish images and score them with the stream, using the local broker unless the settings name another.

        Args:
            publish: the arguments of `imagestream publish`.
        """
        own_broker = self.settings.bootstrap_servers is None
        if own_broker:
            self.run("broker", "start")
        try:
            sent = self.run("publish", *publish)["sent"]
            self.run("stream", "--until-drained")
        finally:
            if own_broker:
                self.run("broker", "stop")
        (counts,) = self.query("SELECT sum(predicted_rows) AS predicted, sum(quarantined_rows) AS bad FROM batches")
        return Scored(sent, int(counts["predicted"]), int(counts["bad"]))


def script(main: Callable[..., None]) -> None:
    """Run `main` with the options that it declares; report errors in one line on standard error, with exit code 1."""
    try:
        typer.run(main)
    except (ServiceError, ModelError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
