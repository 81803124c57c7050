"""`imagestream erase`: images for good, with a record that they were there."""

from dataclasses import asdict
from typing import Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import OPERATION
from streaming.cli.console import err, out
from streaming.errors import UsageError

SHOWN = 10


@app.command(panel=OPERATION)
def erase(
    context: typer.Context,
    ids: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="An image id; may be repeated.")] = None,
    deleted_elsewhere: Annotated[
        bool,
        typer.Option("--deleted-elsewhere", help="Record rows that another program has deleted, and erase nothing."),
    ] = False,
    by: Annotated[str | None, typer.Option(metavar="NAME", help="Who asks for it; default: the user's name.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Erase images from all tables, under all their ids: answers, quarantine, features and labels, old versions too.

    The table `erased` keeps topic, partition and offset, so that `audit` still adds up. Kafka keeps a message until the
    topic's retention has passed, and models stay as they were fitted: `imagestream retrain` fits one without the
    images. Stop a training or rescoring that is under way first.

    Example: imagestream erase --id 9f86d081884c7d65 --by "request 17"
    """
    from streaming.jobs.erase import erase as run
    from streaming.jobs.erase import record_deleted
    from streaming.platform.machine import user_name

    settings, who = settings_of(context), by or user_name()
    if bool(ids) == deleted_elsewhere:
        raise UsageError("give either --id ID, once or more often, or --deleted-elsewhere")
    if deleted_elsewhere:
        n = record_deleted(settings, who)
        out.print(f"{n:,} messages whose rows another program has deleted are recorded as erased")
        write_json(json_file, {"recorded": n})
        return
    result = run(settings, ids or [], who)
    rows = ", ".join(f"{n:,} from {table}" for table, n in result.rows.items())
    out.print(
        f"erased {len(result.ids):,} ids: {rows or 'no rows'}; {result.files_removed:,} files removed",
    )
    for topic, partition, offset in result.messages[:SHOWN]:
        err.print(f"still in Kafka until its retention: {topic} partition {partition}, offset {offset:,}")
    if len(result.messages) > SHOWN:
        err.print(f"and {len(result.messages) - SHOWN:,} more (--json FILE lists them)")
    write_json(json_file, asdict(result))
