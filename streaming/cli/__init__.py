"""The command line: one module per command, each a thin edge over the package that does the work."""


def main() -> None:
    """Entry point of the command line, in a process of its own."""
    from streaming.environment import isolate

    isolate()  # before anything else is imported
    from streaming.cli import commands  # noqa: F401  registers every command
    from streaming.cli.app import run

    run()
