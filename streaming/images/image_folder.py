"""A folder of image files, and their labels: from the folders' names, a pattern over the paths, a CSV, or metadata.

A folder is taken as people have it: links to other disks, folders in folders, `train/` and `test/` above the classes,
and between the images what operating systems and other programs leave there. What was left out is counted, with why.
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
OF_SYSTEMS = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", "__macosx", "@eadir", "$recycle.bin"}
METADATA = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's ImageFolder
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
MAX_METADATA_BYTES = 256 * 1024**2

NO_FOLDER = "it lies in no class folder"
NO_MATCH = "its path does not match the label pattern"
NO_ROW = "the CSV has no usable row for it"
AMBIGUOUS = "the CSV's name for it fits other files, too: give paths"
NO_IMAGE = "a row of the CSV names an image that is not there"
NOT_UTF8 = "its name is not UTF-8"
UNREADABLE = "it cannot be read"
HIDDEN = "it is hidden, or an operating system's own"
NOT_AN_IMAGE = "it is not an image by its name or its first bytes"
TABLE = "it is a table beside folders of images: name the file itself to train on it"
ARCHIVE = "it is an archive: unpack it"


@dataclass(frozen=True)
class LabelledFile:
    """A file, the class it shows where that is known, and its size where it was looked up."""

    path: str
    label: str | None
    bytes: int = 0


@dataclass
class LeftOut:
    """What was left out: reason → how many, and one of them; and how the others were understood.

    Attributes:
        notes: a sentence each.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, why: str, what: str, n: int = 1) -> None:
        self.counts[why] += n
        self.examples.setdefault(why, what.encode("utf-8", "replace").decode())


@dataclass(frozen=True)
class _Found:
    """A file of the folder: where it is, and its path below the folder with forward slashes, in composed Unicode."""

    path: str
    below: PurePosixPath
    bytes: int


def read_folder(
    folder: Path | str, pattern: str | None, labels_csv: Path | None, keep_unlabelled: bool
) -> tuple[list[LabelledFile], LeftOut]:
    """Every image file below `folder` in order of path, each with its label.

    Args:
        folder: a path, or the URI of a folder in a bucket, where an image is known by its name alone.

    Raises:
        ServiceError: there is no such folder or no file in it, or the pattern, CSV or metadata cannot be used.
    """
    left_out = LeftOut()
    if isinstance(folder, str):
        found = list(_objects(folder, left_out))
    elif folder.is_dir():
        found = sorted(_images(folder, left_out), key=lambda file: file.path)
    else:
        raise NotFoundError(_no_folder(folder))
    if not found:
        why = "".join(f"; {n:,} left out: {why} ({left_out.examples[why]})" for why, n in left_out.counts.items())
        raise DataError(f"{folder} holds no images; expected one folder per class with images in it{why}")
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
    """Whether there is a file below a folder that is an image by its name, whatever else is there."""
    return any(path.suffix.lower() in IMAGES for path in _walk(folder, LeftOut()))


def _no_folder(folder: Path) -> str:
    expected = "expected one folder per class with images in it, or a Parquet or Delta table"
    if folder.is_file() and folder.name.lower().endswith(ARCHIVES):
        return f"{folder} is an archive: unpack it, and give the folder; {expected}"
    return f"{folder} is not a folder; {expected}"


def _images(folder: Path, left_out: LeftOut) -> Iterator[_Found]:
    for path in _walk(folder, left_out):
        if path.name in METADATA:
            continue
        try:
            below = composed(path.relative_to(folder).as_posix())
            below.encode()
            if why := _why_not(path):
                left_out.add(why, below)
            else:
                yield _Found(str(path), PurePosixPath(below), path.stat().st_size)
        except UnicodeEncodeError:
            left_out.add(NOT_UTF8, str(path))
        except OSError:
            left_out.add(UNREADABLE, str(path))


def _objects(uri: str, left_out: LeftOut) -> Iterator[_Found]:
    """The images below the URI of a folder in a bucket, by their names."""
    for one in list_source(uri):
        below = PurePosixPath(composed(one.key))
        suffix = below.suffix.lower()
        if any(part.startswith(".") or part.lower() in OF_SYSTEMS for part in below.parts):
            left_out.add(HIDDEN, one.key)
        elif suffix in IMAGES:
            yield _Found(f"{uri}/{one.key}", below, one.bytes)
        elif below.name not in METADATA:
            archive = below.name.lower().endswith(ARCHIVES)
            left_out.add(TABLE if suffix == ".parquet" else ARCHIVE if archive else NOT_AN_IMAGE, one.key)


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """The path of every file below a folder, links followed, without hidden ones."""

    def skip(name: str) -> bool:
        hidden = name.startswith(".") or name.lower() in OF_SYSTEMS
        if hidden:
            left_out.add(HIDDEN, name)
        return hidden

    def unreadable(path: str, _reason: str) -> None:
        if Path(path).is_dir():  # broken links are ignored
            left_out.add(UNREADABLE, path)

    return map(Path, walk(str(folder), entered=set(), skip=skip, on_error=unreadable))


def _why_not(path: Path) -> str | None:
    """Why a file is not taken; the bytes decide where the name does not say that it is an image."""
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
    """How folders above and in the class folders were understood."""
    folders = {file.below.parent for file in found}
    splits = sorted({folder.parts[0] for folder in folders if len(folder.parts) > 1 and folder.parts[0] in SPLITS})
    if splits:
        left_out.notes.append(
            f"{', '.join(splits)}: taken together as one set; which images are held out is decided by their content "
            "(--holdout)"
        )
    heads = {(name,) for name in splits}
    deep = sorted(folder for folder in folders if len(folder.parts) > 1 + (folder.parts[:1] in heads))
    if deep:
        left_out.notes.append(
            f"{len(deep):,} class folders lie in other folders: {deep[0]} is class {deep[0].name}; to go by the outer "
            "ones, --label-pattern '^([^/]+)/'"
        )


def _by_pattern(found: Sequence[_Found], pattern: str) -> list[str | None]:
    """The group `label`, or the first group, of the pattern in each path; None where it does not match."""
    import pyarrow as pa

    paths = pa.array([str(file.below) for file in found], pa.string())
    return [class_name(label) for label in extract_group(paths, pattern, "label").to_pylist()]


def _by_rows(folder: str, found: Sequence[_Found], rows: LabelRows, left_out: LeftOut) -> list[str | None]:
    """Labels joined by path, by path below the folder, by file name, or by name without suffix, whichever is there.

    A path of another machine, as `C:/photos/cats/1.jpg`, is joined by as many of its last parts as it takes. A name
    that several files have says nothing of any of them.
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
    """Last parts of the absolute paths among the keys → the key, where it is the only one that ends so."""
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
    """The labels in `metadata.csv` or `.jsonl` of a folder or its splits; None where there is none, or no labels."""
    rows: list[Row] = []
    used: list[str] = []
    for directory in (folder, *sorted(one for one in folder.iterdir() if one.name in SPLITS and one.is_dir())):
        file = next((directory / name for name in METADATA if (directory / name).is_file()), None)
        if file is None:
            continue
        try:
            read = _read_json_lines(file) if file.suffix == ".jsonl" else _read_metadata_csv(file)
        except ServiceError as error:
            left_out.notes.append(f"{error}; the folders' names are the labels")
            continue
        above = directory.relative_to(folder).as_posix()
        rows += [Row(row.line, row.name if above == "." else f"{above}/{row.name}", row.label) for row in read]
        used.append(str(file.relative_to(folder)))
    if not used:
        return None
    left_out.notes.append(f"labels are those of {', '.join(used)}")
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
