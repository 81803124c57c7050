"""`imagestream setup`: install the dependencies that are not Python packages."""

from time import monotonic
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn

from streaming.cli.app import app, settings_of
from streaming.cli.command_line import START
from streaming.cli.console import Spinner, err, out, progress_bar, text_column

LINE_EVERY = 10  # number of jars per progress line if there is no terminal


@app.command(panel=START)
def setup(
    context: typer.Context,
    lock: Annotated[bool, typer.Option("--lock", hidden=True, help="Regenerate jars.lock from ivy.xml.")] = False,
) -> None:
    """Install the dependencies that are not Python packages: jars, Java if missing, the default backbone as LiteRT.

    Existing files are verified and replaced if damaged. Jars and backbones are stored once per user, in
    ~/.cache/imagestream, and shared by all homes without a separate copy.

    Example: imagestream setup
    """
    from models.backbone import DEFAULT_BACKBONE, export_backbone
    from streaming.errors import ServiceError
    from streaming.platform.jars import install_jars, lock_jars
    from streaming.platform.java import find_java, install_java

    settings = settings_of(context)
    try:
        java = find_java(settings.work_dir)
    except ServiceError as error:
        err.print(f"{error}; trying to download one into {settings.work_dir / 'java'}")
        java = install_java(settings.work_dir)
    if lock:
        out.print(f"{lock_jars(java)} jars locked")
        return
    begun = monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), text_column("{task.description}"))
    with progress_bar(*columns) as progress:
        task = progress.add_task("jars", total=None, visible=False)

        def show(done: int, total: int, text: str) -> None:
            if done == 0:
                err.print(text)
            elif err.is_terminal:
                progress.update(task, completed=done, total=total, description=text, visible=True)
            elif done % LINE_EVERY == 0:
                err.print(f"{done} of {total} jars")

        install_jars(settings.jars_dir, java, show, verify=True)
    err.print(f"exporting the default backbone to {settings.backbones_dir}: takes about a minute the first time")
    with Spinner("exporting the default backbone"):
        export_backbone(DEFAULT_BACKBONE, "imagenet", settings.backbones_dir)
    out.print(f"ready after {monotonic() - begun:.0f} s: Java at {java.parent.parent}, jars in {settings.jars_dir}")
