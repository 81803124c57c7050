"""`imagestream audit`: whether every message has exactly one row."""

from dataclasses import asdict

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, err, out, settings_of, write_json

SHOWN = 20


@app.command()
def audit(context: typer.Context, json_file: JsonOption = None) -> None:
    """Check over all history that no message is missing and none is repeated; exit 1 if anything is wrong.

    Compares the tables `batches`, `predictions` and `quarantine`, also beside a running stream. A batch that is in
    flight, or was cut off and will be completed by the next start, is told as unfinished and is no error.

    Example: imagestream audit --json audit.json
    """
    from streaming.jobs.audit import audit as check

    report = check(settings_of(context))
    for span in report.spans:
        out.print(
            f"{span.topic} partition {span.partition}: offsets {span.first:,} to {span.last:,}, "
            f"{span.messages:,} messages in {span.batches:,} batches",
            highlight=False,
            markup=False,
        )
    for lost in report.left_out:
        err.print(
            f"left out: {lost['topic']} partition {lost['partition']}, offsets {lost['from']:,} to {lost['to']:,}, "
            "lost before they were read and accepted as lost",
            style="yellow",
            highlight=False,
            markup=False,
        )
    if report.erased:
        out.print(f"{report.erased:,} messages' rows were erased on request, as recorded", highlight=False)
    for batch in report.unfinished:
        err.print(
            f"unfinished: batch {batch['batch_id']} of query {batch['query_id']}, in flight or cut off; "
            "`imagestream stream` completes it",
            style="yellow",
            highlight=False,
        )
    for problem in report.problems[:SHOWN]:
        err.print(f"{problem.kind.value}: {problem.text}", style="red", highlight=False, markup=False)
    total = sum(report.counts.values())
    if total > SHOWN:
        err.print(f"and {total - SHOWN:,} more (--json FILE lists them)", highlight=False)
    verdict = "clean" if report.clean else f"{total:,} problems"
    out.print(
        f"{verdict}: {report.batches:,} batches, {report.predicted:,} predicted + {report.quarantined:,} quarantined",
        highlight=False,
    )
    summary = asdict(report) | {"clean": report.clean}
    del summary["searched"]
    write_json(json_file, summary)
    if not report.clean:
        raise typer.Exit(EXIT_FAILED)
