"""The command line, one module per command. A command reads its options, calls the package that does the work and
prints the result."""


def main() -> None:
    """Entry point of the `imagestream` script."""
    from streaming.environment import isolate

    isolate()  # before any other import
    from streaming.cli import commands  # noqa: F401  registers every command
    from streaming.cli.app import run

    run()
