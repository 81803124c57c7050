"""A folder of image files, and their labels: from the folders' names, a pattern over the paths, a CSV, or metadata.

Folders may contain links, nested folders, `train/` and `test/` above the classes, and files of operating systems and
other programs among the images. Skipped files are counted by reason.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from producer.class_names import class_name, composed
from producer.labelled_csv import LABEL_COLUMNS, PATH_COLUMNS, Row
from producer.message import SNIFF_BYTES, UNKNOWN_CONTENT, content_type
from producer.walk import walk
from streaming.errors import DataError, NotFoundError, ServiceError
from streaming.images.labels_csv import LabelRows, collect, read_labels
from streaming.images.patterns import extract_group
from streaming.images.sources import list_source
from streaming.storage.store import open_store

IMAGES = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", "__macosx", "@eadir", "$recycle.bin"}
METADATA = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's ImageFolder
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
MAX_METADATA_BYTES = 256 * 1024**2

NO_FOLDER = "it is not in a class folder"
NO_MATCH = "its path does not match the label pattern"
NO_ROW = "the CSV has no usable row for it"
AMBIGUOUS = "its name in the CSV matches several files: give paths"
NO_IMAGE = "a row of the CSV names an image that does not exist"
NOT_UTF8 = "its name is not UTF-8"
UNREADABLE = "it cannot be read"
HIDDEN = "it is hidden or belongs to an operating system"
NOT_AN_IMAGE = "neither its name nor its first bytes are those of an image"
TABLE = "it is a table next to folders of images: give the file itself to train on it"
ARCHIVE = "it is an archive: unpack it"


@dataclass(frozen=True)
class LabelledFile:
    """An image file, its class if known, and its size in bytes (0 if unknown)."""

    path: str
    label: str | None
    bytes: int = 0


@dataclass
class LeftOut:
    """Skipped files.

    Attributes:
        counts: reason → number of files.
        examples: reason → one of them.
        notes: how an ambiguous layout was interpreted, one sentence each.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, why: str, what: str, n: int = 1) -> None:
        self.counts[why] += n
        self.examples.setdefault(why, what.encode("utf-8", "replace").decode())


@dataclass(frozen=True)
class _Found:
    """A file: its path, and its path below the folder with forward slashes, in composed Unicode."""

    path: str
    below: PurePosixPath
    bytes: int


def read_folder(
    folder: Path | str, pattern: str | None, labels_csv: Path | None, keep_unlabelled: bool
) -> tuple[list[LabelledFile], LeftOut]:
    """Return all image files below `folder` with their labels, sorted by path.

    Args:
        folder: a path, or the URI of a folder in a bucket, where images are recognised by name only.
        pattern: pattern of the label in a path; None for the parent folder's name.
        labels_csv: CSV of labels; None for the parent folder's name.

    Raises:
        ServiceError: the folder does not exist or has no images, or the pattern, CSV or metadata cannot be used.
    """
    left_out = LeftOut()
    if isinstance(folder, str):
        found = list(_objects(folder, left_out))
    elif folder.is_dir():
        found = sorted(_images(folder, left_out), key=lambda file: file.path)
    else:
        raise NotFoundError(_no_folder(folder))
    if not found:
        why = "".join(f"; skipped {n:,}: {why} ({left_out.examples[why]})" for why, n in left_out.counts.items())
        raise DataError(f"{folder} contains no images: expected one folder of images per class{why}")
    name = str(folder).rpartition("/")[2]
    if labels_csv is not None:
        labels, why = _by_rows(name, found, read_labels(labels_csv, PATH_COLUMNS), left_out), NO_ROW
    elif pattern is not None:
        labels, why = _by_pattern(found, pattern), NO_MATCH
    elif (metadata := _metadata_of(folder, left_out)) is not None:
        labels, why = _by_rows(name, found, metadata, left_out), NO_ROW
    else:
        labels, why = [class_name(file.below.parent.name) for file in found], NO_FOLDER
        _note_layout(found, left_out)
    files: list[LabelledFile] = []
    for file, label in zip(found, labels, strict=True):
        if label is not None or keep_unlabelled:
            files.append(LabelledFile(file.path, label, file.bytes))
        else:
            left_out.add(why, str(file.below))
    return files, left_out


def holds_images(folder: Path) -> bool:
    """Return whether any file below a folder has the name of an image."""
    return any(path.suffix.lower() in IMAGES for path in _walk(folder, LeftOut()))


def _no_folder(folder: Path) -> str:
    expected = "expected one folder of images per class, or a Parquet or Delta table"
    if folder.is_file() and folder.name.lower().endswith(ARCHIVES):
        return f"{folder} is an archive: unpack it and give the folder; {expected}"
    return f"{folder} is not a folder: {expected}"


def _images(folder: Path, left_out: LeftOut) -> Iterator[_Found]:
    for path in _walk(folder, left_out):
        if path.name in METADATA:
            continue
        try:
            below = composed(path.relative_to(folder).as_posix())
            below.encode()
            if why := _skip_reason(path):
                left_out.add(why, below)
            else:
                yield _Found(str(path), PurePosixPath(below), path.stat().st_size)
        except UnicodeEncodeError:
            left_out.add(NOT_UTF8, str(path))
        except OSError:
            left_out.add(UNREADABLE, str(path))


def _objects(uri: str, left_out: LeftOut) -> Iterator[_Found]:
    """Yield the images below the URI of a folder in a bucket, recognised by name."""
    for one in list_source(uri):
        below = PurePosixPath(composed(one.key))
        suffix = below.suffix.lower()
        if any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in below.parts):
            left_out.add(HIDDEN, one.key)
        elif suffix in IMAGES:
            yield _Found(f"{uri}/{one.key}", below, one.bytes)
        elif below.name not in METADATA:
            archive = below.name.lower().endswith(ARCHIVES)
            left_out.add(TABLE if suffix == ".parquet" else ARCHIVE if archive else NOT_AN_IMAGE, one.key)


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Return the paths of all files below a folder that are not hidden, following links."""

    def skip(name: str) -> bool:
        hidden = name.startswith(".") or name.lower() in SYSTEM_FILES
        if hidden:
            left_out.add(HIDDEN, name)
        return hidden

    def unreadable(path: str, _reason: str) -> None:
        if Path(path).is_dir():  # broken links are ignored
            left_out.add(UNREADABLE, path)

    return map(Path, walk(str(folder), entered=set(), skip=skip, on_error=unreadable))


def _skip_reason(path: Path) -> str | None:
    """Return why a file is skipped, by its name and, if that is not an image's, by its first bytes; None if it is
    not."""
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        return None
    with path.open("rb") as file:
        if content_type(file.read(SNIFF_BYTES)) != UNKNOWN_CONTENT:
            return None
    if suffix == ".parquet":
        return TABLE
    return ARCHIVE if path.name.lower().endswith(ARCHIVES) else NOT_AN_IMAGE


def _note_layout(found: Sequence[_Found], left_out: LeftOut) -> None:
    """Note how nested folders were interpreted."""
    folders = {file.below.parent for file in found}
    splits = sorted({folder.parts[0] for folder in folders if len(folder.parts) > 1 and folder.parts[0] in SPLITS})
    if splits:
        left_out.notes.append(
            f"{', '.join(splits)}: treated as one data set; held-out images are selected by their content (--holdout)"
        )
    heads = {(name,) for name in splits}
    deep = sorted(folder for folder in folders if len(folder.parts) > 1 + (folder.parts[:1] in heads))
    if deep:
        left_out.notes.append(
            f"{len(deep):,} class folders are nested: {deep[0]} is class {deep[0].name}; to use the outer folders, "
            "give --label-pattern '^([^/]+)/'"
        )


def _by_pattern(found: Sequence[_Found], pattern: str) -> list[str | None]:
    """Return the group `label`, or the first group, of the pattern in each path; None if it does not match."""
    import pyarrow as pa

    paths = pa.array([str(file.below) for file in found], pa.string())
    return [class_name(label) for label in extract_group(paths, pattern, "label").to_pylist()]


def _by_rows(folder: str, found: Sequence[_Found], rows: LabelRows, left_out: LeftOut) -> list[str | None]:
    """Join labels by path, path below the folder, file name, or name without suffix, whichever matches first.

    A path of another machine, such as `C:/photos/cats/1.jpg`, is matched by its last parts. A name that several files
    have matches none of them.
    """
    for why, n in rows.dropped.items():
        left_out.add(why, rows.examples[why], n)
    names = Counter(file.below.name for file in found)
    stems = Counter(file.below.stem for file in found)
    endings = _endings(rows.labels)
    labels: list[str | None] = []
    used: set[str] = set()
    for file in found:
        name, stem = file.below.name, file.below.stem
        paths = (composed(file.path), f"{folder}/{file.below}", str(file.below))
        key = next((one for one in paths if one in rows.labels), None) or endings.get(str(file.below))
        if key is None:
            key = next((one for one in (name, stem) if one in rows.labels), None)
            if key is None and names[name] == 1:
                key = endings.get(name)
        if key is not None:
            used.add(key)
        ambiguous = key in {name, stem} and key not in paths and (names[name] if key == name else stems[stem]) > 1
        if ambiguous:
            left_out.add(AMBIGUOUS, str(file.below))
        labels.append(None if key is None or ambiguous else rows.labels[key])
    unused = [key for key in rows.labels if key not in used]
    if unused:
        left_out.add(NO_IMAGE, unused[0], len(unused))
    return labels


def _endings(keys: Iterable[str]) -> dict[str, str]:
    """Return last parts of the absolute paths among the keys → the key, if no other key has the same ending."""
    endings: dict[str, str | None] = {}
    for key in keys:
        if key.startswith("/") or key[1:3] == ":/":
            parts = key.split("/")
            for start in range(1, len(parts)):
                ending = "/".join(parts[start:])
                endings[ending] = None if ending in endings else key
    return {ending: key for ending, key in endings.items() if key is not None}


def _metadata_of(folder: Path | str, left_out: LeftOut) -> LabelRows | None:
    if isinstance(folder, Path):
        return _metadata(folder, left_out)
    store = open_store(folder)
    with TemporaryDirectory(prefix="imagestream-") as copies:
        for above in ("", *(f"{name}/" for name in store.folders() if name in SPLITS)):
            for name in METADATA:
                if (size := store.size(f"{above}{name}")) is not None and size <= MAX_METADATA_BYTES:
                    Path(copies, above).mkdir(exist_ok=True)
                    store.fetch(f"{above}{name}", Path(copies, above, name))
        return _metadata(Path(copies), left_out)


def _metadata(folder: Path, left_out: LeftOut) -> LabelRows | None:
    """Return the labels in `metadata.csv` or `.jsonl` of a folder or its splits; None if there are none."""
    rows: list[Row] = []
    used: list[str] = []
    for directory in (folder, *sorted(one for one in folder.iterdir() if one.name in SPLITS and one.is_dir())):
        file = next((directory / name for name in METADATA if (directory / name).is_file()), None)
        if file is None:
            continue
        try:
            read = _read_json_lines(file) if file.suffix == ".jsonl" else _read_metadata_csv(file)
        except ServiceError as error:
            left_out.notes.append(f"{error}; using the folders' names as labels")
            continue
        above = directory.relative_to(folder).as_posix()
        rows += [Row(row.line, row.name if above == "." else f"{above}/{row.name}", row.label) for row in read]
        used.append(str(file.relative_to(folder)))
    if not used:
        return None
    left_out.notes.append(f"using the labels in {', '.join(used)}")
    return collect("file_name", rows)


def _read_metadata_csv(file: Path) -> list[Row]:
    labels = read_labels(file, PATH_COLUMNS)
    return [Row(0, name, label) for name, label in labels.labels.items()]


def _read_json_lines(file: Path) -> list[Row]:
    if file.stat().st_size > MAX_METADATA_BYTES:
        raise DataError(f"{file} is larger than {MAX_METADATA_BYTES:,} bytes")
    rows = []
    try:
        for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), start=1):
            record = json.loads(line) if line.strip() else {}
            name, label = record.get("file_name"), next((record[key] for key in LABEL_COLUMNS if key in record), None)
            if isinstance(name, str) and isinstance(label, str | int):
                rows.append(Row(number, name, class_name(str(label))))
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: expected one JSON object per line: {' '.join(str(error).split())}") from error
    if not rows:
        raise DataError(f"{file} has no file_name with a label ({', '.join(LABEL_COLUMNS)})")
    return rows
