"""Walking a folder: every regular file below it, symbolic links followed, each real folder entered once."""

import os
from collections.abc import Callable, Iterable, Iterator


def walk(
    folder: str,
    *,
    entered: set[str],
    skip: Callable[[str], bool] = lambda _name: False,
    on_error: Callable[[str, str], None] = lambda _path, _reason: None,
    in_order: bool = True,
) -> Iterator[str]:
    """Yield the path of each regular file below `folder`, joined to `folder` as it was given.

    Args:
        entered: the real paths of folders already walked, which is updated; it ends loops of symbolic links.
        skip: whether to leave out the file or folder of this name.
        on_error: called with a path and the reason for each folder that cannot be listed and each broken link.
        in_order: sort the entries of each folder by name. False keeps only one entry in memory at a time.
    """
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    try:
        with os.scandir(folder) as scan:
            entries: Iterable[os.DirEntry[str]] = scan
            if in_order:
                entries = sorted(scan, key=lambda entry: entry.name)
            for entry in entries:
                if skip(entry.name):
                    continue
                try:
                    if entry.is_dir():
                        yield from walk(entry.path, entered=entered, skip=skip, on_error=on_error, in_order=in_order)
                    elif entry.is_file():
                        yield entry.path
                    elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110  the path as given
                        on_error(entry.path, "broken symbolic link")
                except OSError as error:  # such as a link to itself
                    on_error(entry.path, error.strerror or str(error))
    except OSError as error:
        on_error(folder, error.strerror or str(error))
