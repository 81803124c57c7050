"""What the examples share: a home of their own, commands of `imagestream` as a user types them, and the outcome.

Every command is shown before it runs, so that what a script prints is what can be typed.
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
    Path | None, typer.Option(metavar="DIR", help="Where all of it goes; default: examples/NAME in your home.")
]
BackboneOption = Annotated[str, typer.Option(help="The CNN that turns an image into features.")]
WeightsOption = Annotated[str, typer.Option(help="imagenet, random, or a weights file that Keras saved.")]
PerClassOption = Annotated[
    int, typer.Option(min=2, help="How many images of each class to make, where none are given.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the outcome here, too.")]

INSTALLED = ("jars", "java", "backbones")  # of the user's own home, which the examples' homes take as they are


@dataclass(frozen=True)
class Outcome:
    """What became of an example.

    Attributes:
        rows_in: images that were there.
        rows_out: rows of the example's own result, one for each image that could be used.
        metric: what `value` is, and of which model.
        original: the figure that was published for the original, and on what.
        streamed: predictions that the stream made of `published` messages.
        plots: PNG files.
        details: further figures by name.
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

    def tell(self, json_file: Path | None) -> None:
        """Print it, and write it as JSON if a file was named."""
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
    """What the stream made of the images that were published."""

    published: int
    predicted: int
    quarantined: int


@dataclass(frozen=True)
class Service:
    """The service that an example makes: a home of its own, which was empty before."""

    settings: Settings

    @classmethod
    def new(cls, example: str, home: Path | None) -> "Service":
        """A service in `home`, by default `examples/EXAMPLE` in the user's own home.

        Raises:
            ServiceError: tables are there already: an example counts what it made itself.
        """
        own = read_settings()
        settings = read_settings(home or own.work_dir / "examples" / example)
        if "tables" in settings.place.store.folders():
            raise ServiceError(
                f"{settings.home} holds tables already; remove it, or give another place with --home DIR"
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
        """Run a command of `imagestream`; what it writes for `--json`.

        Raises:
            ServiceError: it failed; what it said stands on the terminal.
        """
        words = [str(argument) for argument in arguments]
        typer.echo(f"\n$ imagestream --home {shlex.join([str(self.home), *words])}")
        sys.stdout.flush()
        with tempfile.NamedTemporaryFile(suffix=".json") as summary:
            command = [sys.executable, "-m", "streaming", "--home", str(self.home), *words, "--json", summary.name]
            if subprocess.run(command, check=False).returncode != 0:
                raise ServiceError(f"'imagestream {words[0]}' failed; what it said stands above")
            found: dict[str, Any] = json.loads(Path(summary.name).read_bytes() or b"{}")
        return found

    def query(self, sql: str) -> list[dict[str, Any]]:
        """The rows that `imagestream query` gives, each value as its text."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.csv")
            self.run("query", sql, "--format", "csv", "--output", file)
            with file.open(encoding="utf-8", newline="") as rows:
                return list(csv.DictReader(rows))

    def score(self, *publish: str | Path) -> Scored:
        """Publish images and let the stream answer them all, by the home's own broker unless the settings name one.

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
    """Run `main` with the options that it declares; a user's mistake is one line on standard error, and exit code 1."""
    try:
        typer.run(main)
    except (ServiceError, ModelError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
