"""The command `imagestream`: its own packages, whoever else has packages of the same names.

`models`, `producer` and `streaming` are common names. The command is a module of a name of its own, so that it can say
in one line that another distribution has overwritten them, before a line of that one runs.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGES = ("models", "producer", "streaming")
MARK = "imagestream"  # in the docstring of each of them


def main() -> None:
    """Entry point of the console script, and of `python -m imagestream`."""
    root = Path(__file__).resolve().parent
    for name in PACKAGES:
        file = root / name / "__init__.py"
        if MARK not in (file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""):
            sys.exit(
                f"error: the package {name!r} in {root} is another distribution's, such as mosaicml-streaming's "
                "'streaming': install imagestream into an environment of its own"
            )
        found = PathFinder.find_spec(name)
        if (found is None or found.origin is None or Path(found.origin).resolve() != file) and sys.path[0] != str(root):
            sys.path.insert(0, str(root))
    from streaming.cli import main as run

    run()


if __name__ == "__main__":
    main()
