"""`imagestream doctor`: check the requirements of the service."""

import typer
from rich.text import Text

from streaming.cli.app import EXIT_FAILED, JsonOption, app, settings_of, write_json
from streaming.cli.command_line import START
from streaming.cli.console import out, printable
from streaming.cli.output import FormatOption, OutputOption, list_rows
from streaming.cli.output_formats import Format

COLUMNS = {"check": str, "ok": bool, "found": str, "fix": str}


@app.command(panel=START)
def doctor(
    context: typer.Context,
    format_: FormatOption = Format.TABLE,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """Check Python, Java, jars, memory, disk, ports and write access; each failed check shows how to fix it.

    Example: imagestream doctor
    """
    from streaming.platform.doctor import diagnose

    checks = diagnose(settings_of(context))
    rows = [{"check": one.name, "ok": one.ok, "found": one.found, "fix": one.fix or None} for one in checks]
    if format_ is Format.TABLE and output is None:
        for check in checks:
            mark = ("ok  ", "green") if check.ok else ("FAIL", "red")
            out.print(Text.assemble(mark, f"  {check.name:<10}{printable(check.found)}"))
            if check.fix:
                out.print(Text.assemble(" " * 16, ("fix:", "bold"), f" {printable(check.fix)}"))
    else:
        list_rows(rows, COLUMNS, format_, output)
    failed = [check for check in checks if not check.ok]
    out.print(f"{len(failed)} of {len(checks)} checks failed" if failed else "all checks passed")
    write_json(
        json_file,
        {"ok": not failed, "checks": [{"name": c.name, "ok": c.ok, "found": c.found, "fix": c.fix} for c in checks]},
    )
    if failed:
        raise typer.Exit(EXIT_FAILED)
