"""`imagestream setup`: bring what Python packages cannot."""

from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from streaming.cli.app import app, err, out, settings_of


@app.command()
def setup(
    context: typer.Context,
    lock: Annotated[bool, typer.Option("--lock", hidden=True, help="Write jars.lock anew from ivy.xml.")] = False,
) -> None:
    """Bring what Python packages cannot: the jars, Java if there is none, the default backbone as LiteRT.

    What is there already is checked, and replaced if it is damaged.

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
        err.print(f"{error}; trying to download one into {settings.work_dir / 'java'}", highlight=False, markup=False)
        java = install_java(settings.work_dir)
    if lock:
        out.print(f"{lock_jars(java)} jars locked", highlight=False)
        return
    with _progress() as progress:
        task = progress.add_task("jars", total=None, visible=False)

        def show(done: int, total: int, text: str) -> None:
            if done == 0:
                out.print(text, highlight=False, markup=False)
            else:
                progress.update(task, completed=done, total=total, description=text, visible=True)

        install_jars(settings.jars_dir, java, show, verify=True)
    with err.status("exporting the default backbone …"):
        export_backbone(DEFAULT_BACKBONE, "imagenet", settings.backbones_dir)
    out.print(f"ready: Java at {java.parent.parent}, jars in {settings.jars_dir}", highlight=False, markup=False)


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
