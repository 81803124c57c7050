"""The home of the demo, which is removed only if the demo's record shows that the demo created all of its files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from streaming.errors import ConflictError
from streaming.platform.broker import stop_broker
from streaming.settings import Settings
from streaming.storage.home import make_dir

FOLDER = "demo"
RECORD = "demo.json"
SET_UP = ("jars", "backbones", "java")  # linked from the parent home
# Files that commands write into every home, but users do not.
LOGS_AND_LOCKS = ("spark.log*", "log4j2.properties", "*.lock", "report.png", RECORD)

Confirm = Callable[[str], bool]


def new_demo_home(settings: Settings, confirm: Confirm) -> Settings:
    """Settings with an empty home in `HOME/demo` that shares the jars, backbones and Java of `HOME`.

    Args:
        settings: of the parent home.
        confirm: called with a question before the home of an earlier demo is removed.

    Raises:
        ServiceError: the folder has files that no demo made, or the removal was not confirmed.
    """
    work = settings.work_dir / FOLDER
    bucket = not settings.place.is_local
    demo = settings.model_copy(
        update={"home": f"{settings.home}/{FOLDER}" if bucket else str(work), "work": work if bucket else None}
    )
    if (work.exists() and any(work.iterdir())) or (bucket and any(True for _ in demo.place.store.list())):
        _check_record(demo)
        if not confirm(f"Remove the earlier demo in {demo.home}?"):
            raise ConflictError(f"the earlier demo in {demo.home} was kept: choose another home with --home PLACE")
        stop_broker(demo)  # left running by a demo that was killed
        _remove(demo)
    make_dir(work)
    _write_record(work, None)
    places = (settings.jars_dir, settings.backbones_dir, settings.work_dir / "java")
    for name, place in zip(SET_UP, places, strict=True):
        if name != "java":
            make_dir(place)
        if place.is_dir():
            (work / name).symlink_to(place.absolute(), target_is_directory=True)
    return demo


def record_contents(demo: Settings) -> None:
    """Record the files that the demo created, so that a later demo can distinguish them from a user's."""
    _write_record(demo.work_dir, dict(_data_files(demo)))


def _check_record(demo: Settings) -> None:
    """Reject a home with files that the demo did not record; the record of an interrupted demo is null."""
    try:
        made = json.loads((demo.work_dir / RECORD).read_text(encoding="utf-8"))["made"]
        if made is None:
            return
        recorded = dict(made)
    except (OSError, ValueError, KeyError, TypeError):
        recorded = {}
    for path, size in _data_files(demo):
        if recorded.get(path) != size:
            raise ConflictError(
                f"{demo.home} holds data that the demo did not create ({path}): move or remove the folder, "
                "or run the demo in another home with --home PLACE"
            )


def _write_record(work: Path, made: dict[str, int] | None) -> None:
    (work / RECORD).write_text(json.dumps({"made": made}) + "\n", encoding="utf-8")


def _data_files(demo: Settings) -> Iterator[tuple[str, int]]:
    """(path relative to the home, bytes) of every file that may contain a user's data."""
    home = demo.work_dir
    if not demo.place.is_local:
        yield from ((one.key, one.bytes) for one in demo.place.store.list())
    for directory, _, names in os.walk(home):
        for name in names:
            path = Path(directory, name)
            if _may_contain_data(path.relative_to(home)):
                yield path.relative_to(home).as_posix(), path.lstat().st_size


def _may_contain_data(path: Path) -> bool:
    match path.parts:
        case (name,):
            return not any(fnmatch(name, pattern) for pattern in LOGS_AND_LOCKS)
        case ("broker", "data", topic, segment):
            return segment.endswith(".log") and not topic.startswith("__")
        case ("streams", _, "state.json"):
            return False
        case (top, *_):
            return top not in {"broker", "locks"}
        case _:
            return True


def _remove(demo: Settings) -> None:
    if not demo.place.is_local:
        demo.place.store.delete([one.key for one in demo.place.store.list()])
    for path in demo.work_dir.iterdir() if demo.work_dir.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
