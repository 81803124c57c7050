"""`imagestream doctor`: is everything here that the service needs?"""

import typer

from streaming.cli.app import EXIT_FAILED, JsonOption, app, out, settings_of, write_json


@app.command()
def doctor(context: typer.Context, json_file: JsonOption = None) -> None:
    """Check Python, Java, jars, memory, disk, ports and write access; each failed line says the fix.

    Example: imagestream doctor
    """
    from rich.markup import escape

    from streaming.platform.doctor import diagnose

    checks = diagnose(settings_of(context))
    for check in checks:
        mark = "[green]ok  [/green]" if check.ok else "[red]FAIL[/red]"
        out.print(f"{mark}  {check.name:<10}{escape(check.found)}", highlight=False)
        if check.fix:
            out.print(f"{'':16}[bold]fix:[/bold] {escape(check.fix)}", highlight=False)
    failed = [check for check in checks if not check.ok]
    out.print(f"{len(failed)} of {len(checks)} checks failed" if failed else "everything is here")
    write_json(
        json_file,
        {
            "ok": not failed,
            "checks": [{"name": c.name, "ok": c.ok, "found": c.found, "fix": c.fix} for c in checks],
        },
    )
    if failed:
        raise typer.Exit(EXIT_FAILED)
