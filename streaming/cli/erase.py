"""`imagestream erase`: erase images permanently and record their offsets."""

from dataclasses import asdict
from typing import Annotated

import typer

from streaming.cli.app import JsonOption, app, settings_of, write_json
from streaming.cli.command_line import OPERATION
from streaming.cli.console import err, out
from streaming.errors import UsageError
from streaming.wording import counted

SHOWN = 10


@app.command(panel=OPERATION)
def erase(
    context: typer.Context,
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="ID", help="Id of an image to erase; may be repeated.")
    ] = None,
    deleted_elsewhere: Annotated[
        bool, typer.Option("--deleted-elsewhere", help="Only record rows that another program has deleted.")
    ] = False,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the requester, recorded with the erasure; default: the user's name."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Erase images from all tables and their old versions, under all their ids.

    Predictions, quarantine, features and labels are deleted; the table `erased` keeps topic, partition and offset so
    that `audit` stays clean. Kafka keeps the messages until the topic's retention has passed. Existing models are not
    changed: `imagestream retrain` fits one without the images. Stop running trainings and rescorings first.

    Example: imagestream erase --id 9f86d081884c7d65 --by "request 17"
    """
    from streaming.jobs.erase import erase as run
    from streaming.jobs.erase import record_deleted
    from streaming.platform.machine import user_name

    settings, who = settings_of(context), by or user_name()
    if bool(ids) == deleted_elsewhere:
        raise UsageError("give either --id ID, one or more times, or --deleted-elsewhere")
    if deleted_elsewhere:
        n = record_deleted(settings, who)
        out.print(f"recorded {counted(n, 'message')} as erased whose rows another program has deleted")
        write_json(json_file, {"recorded": n})
        return
    result = run(settings, ids or [], who)
    rows = ", ".join(f"{n:,} from {table}" for table, n in result.rows.items())
    out.print(
        f"erased {counted(len(result.ids), 'id')}: {rows or 'no rows'}; {counted(result.files_removed, 'file')} removed"
    )
    for topic, partition, offset in result.messages[:SHOWN]:
        err.print(f"in Kafka until its retention has passed: {topic} partition {partition}, offset {offset:,}")
    if len(result.messages) > SHOWN:
        err.print(f"and {len(result.messages) - SHOWN:,} more (--json FILE lists them)")
    write_json(json_file, asdict(result))
