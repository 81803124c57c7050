"""`imagestream audit`: check that every message has exactly one row."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, checking, settings_of, write_json
from streaming.cli.command_line import OPERATION
from streaming.cli.console import err, out
from streaming.cli.output import FormatOption, OutputOption, list_rows
from streaming.cli.output_formats import Format
from streaming.wording import counted

if TYPE_CHECKING:
    from streaming.jobs.audit import AuditReport

SHOWN = 20
COLUMNS = {
    "topic": str,
    "partition": int,
    "first": int,
    "last": int,
    "messages": int,
    "batches": int,
    "holes": int,
    "proven": int,
}


@app.command(panel=OPERATION, settings=("bootstrap_servers",))
def audit(
    context: typer.Context,
    broker: Annotated[
        bool, typer.Option("--broker", help="Also compare the rows with the messages that Kafka still has.")
    ] = False,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """Check that no message is missing or repeated in the whole history; exit 1 if one is, 3 if unknown.

    Compares the tables `batches`, `predictions` and `quarantine`; a stream may run at the same time. A batch that is in
    flight, or was interrupted and will be completed by the next start, is reported as unfinished and is not an error.
    Offsets without a message (holes, from transactions or compaction) are reported as proven by the start of the log,
    or as reported by Spark only.

    Example: imagestream audit --broker --json audit.json
    """
    from streaming.jobs.audit import audit as check
    from streaming.jobs.audit_broker import compare_with_broker
    from streaming.platform.broker import bootstrap_servers as home_servers

    settings = settings_of(context)
    with checking():
        report = check(settings)
        if broker:
            compare_with_broker(settings, home_servers(settings), report)
    if format_ is not Format.TABLE or output is not None:
        list_rows([asdict(span) for span in report.spans], COLUMNS, format_, output)
    _show(report)
    summary = asdict(report) | {"clean": report.clean}
    del summary["searched"]
    write_json(json_file, summary)
    if not report.clean:
        raise typer.Exit(EXIT_FAILED)


def _show(report: "AuditReport") -> None:
    for span in report.spans:
        text = (
            f"{span.topic} partition {span.partition}: offsets {span.first:,} to {span.last:,}, "
            f"{counted(span.messages, 'message')} in {counted(span.batches, 'batch')}"
        )
        if span.holes:
            unproven = span.holes - span.proven
            text += f", {counted(span.holes, 'hole')} ({span.proven:,} proven, {unproven:,} reported by Spark)"
        out.print(text)
    for one in report.compared:
        found = "not compared with Kafka"
        if one.first is not None:
            offsets = f"offsets {one.first:,} to {one.last:,}"
            found = f"Kafka has {counted(one.held, 'message')} of {offsets}, with {counted(one.rows, 'row')}"
        note = f" ({one.note})" if one.note else ""
        out.print(f"{one.topic} partition {one.partition}: {found}{note}")
    for lost in report.left_out:
        err.print(
            f"skipped: {lost['topic']} partition {lost['partition']}, offsets {lost['from']:,} to {lost['to']:,}, "
            "deleted by Kafka before they were read and accepted as lost",
            style="yellow",
        )
    for batch in report.unfinished:
        err.print(
            f"unfinished: batch {batch['batch_id']} of query {batch['query_id']}, in flight or interrupted; "
            "the next `imagestream stream` completes it",
            style="yellow",
        )
    for problem in report.problems[:SHOWN]:
        err.print(f"{problem.kind.value}: {problem.text}", style="red")
    total = sum(report.counts.values())
    if total > SHOWN:
        err.print(f"and {total - SHOWN:,} more (--json FILE lists them)")
    verdict = "clean" if report.clean else counted(total, "problem")
    out.print(
        f"{verdict}: {counted(report.batches, 'batch')}, "
        f"{report.predicted:,} predicted + {report.quarantined:,} quarantined"
        + (f", {report.erased:,} of them erased on request" if report.erased else "")
    )
