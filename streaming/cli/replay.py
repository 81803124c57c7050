"""`imagestream replay`: publish quarantined messages again."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, settings_of, write_json
from streaming.cli.command_line import OPERATION
from streaming.cli.console import err, out, progress_bar
from streaming.wording import counted

if TYPE_CHECKING:
    from streaming.jobs.replay import ReplayReport


@app.command(panel=OPERATION, settings=("bootstrap_servers",))
def replay(
    context: typer.Context,
    reason: Annotated[
        str | None, typer.Option(help="Reason for quarantine of the messages to replay; default: any.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of messages; default: no limit.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Include messages that were already replayed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count the messages without sending them.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Publish quarantined messages again, unchanged, and mark them as replayed.

    A message is marked when the broker has acknowledged it and is not sent again. If the replay is killed, no message
    is lost, but a few that were sent and not yet marked may be sent twice.

    Example: imagestream replay --reason truncated --dry-run
    """
    from streaming.jobs.replay import ReplayOptions, count_selected
    from streaming.jobs.replay import replay as run
    from streaming.platform.broker import bootstrap_servers as home_servers

    settings = settings_of(context)
    options = ReplayOptions(reason, limit, again)
    if dry_run:
        counts = count_selected(settings, options)
        total = sum(counts.values()) if limit is None else min(limit, sum(counts.values()))
        for name, count in counts.items():
            out.print(f"{name}: {count:,}")
        out.print(f"would send {counted(total, 'message')}")
        write_json(json_file, {"wanted": total, "by_reason": counts, "sent": 0})
        return
    servers = home_servers(settings)
    with progress_bar() as bar:
        task = bar.add_task("replaying", total=None)

        def show(report: "ReplayReport") -> None:
            bar.update(task, completed=report.sent, total=report.wanted)

        report = run(settings, servers, options, show)
    reasons = ", ".join(f"{name} {count:,}" for name, count in sorted(report.by_reason.items()))
    out.print(f"sent {report.sent:,} of {counted(report.wanted, 'message')}" + (f": {reasons}" if reasons else ""))
    if report.refused:
        err.print(
            f"still quarantined: {counted(report.refused, 'message')} larger than the broker accepts", style="yellow"
        )
    if report.failed:
        err.print(f"stopped: {report.failed}; run the command again to send the rest", style="red")
    write_json(json_file, asdict(report) | {"complete": report.complete})
    if not report.complete:
        raise typer.Exit(EXIT_FAILED)
