"""The command line: one module per command, each a thin edge over the package that does the work."""


def main() -> None:
    """Entry point of the console script `imagestream`."""
    from streaming.cli import commands  # noqa: F401  registers every command
    from streaming.cli.app import run

    run()
