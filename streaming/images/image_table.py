"""Parquet and Delta tables of encoded images. Only column names and label counts are read here, not the images."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa

from producer.class_names import MAX_LABEL_CHARS, class_name
from streaming.errors import ConfigurationError, DataError
from streaming.storage.table_features import check_no_deleted_rows

IMAGE_COLUMNS = ("image", "content", "value", "img", "bytes")
NAME_COLUMNS = ("path", "name", "id", "image_id", "source")
MAX_CLASSES = 100_000
TEXTS = (pa.string(), pa.large_string(), pa.string_view())
SAMPLE_ROWS = 16
SAMPLE_BATCHES = 8


@dataclass(frozen=True)
class ImageTable:
    """The files of a table and the roles of its columns.

    Attributes:
        root: root of the partition folders (`label=cat/`), if there are any.
        files: its Parquet files.
        image: column of encoded images; `NAME.bytes` for a struct, as in Hugging Face data sets.
        label: column of labels, of any type that can be cast to text.
        name: text column with a unique value per image.
        class_of: label as text → class name, if they differ, e.g. for Hugging Face's numbers or decomposed Unicode;
            empty if the value is not a label.
    """

    root: Path
    kind: Literal["parquet", "delta"]
    files: tuple[str, ...]
    partitions: tuple[str, ...]
    columns: tuple[str, ...]
    image: str
    label: str | None
    name: str | None
    n_images: int
    n_bytes: int
    class_of: Mapping[str, str]

    def first_images(self) -> Iterator[bytes]:
        """Yield a few of the encoded images."""
        dataset = _open(self.root, self.files, self.partitions)
        column = self.image.split(".")[0]
        scanner = dataset.scanner(columns=[column], batch_size=SAMPLE_ROWS, batch_readahead=0, fragment_readahead=1)
        for number, batch in enumerate(scanner.to_batches()):
            for cell in batch.column(0):
                value = cell.as_py()
                value = value["bytes"] if isinstance(value, dict) else value
                if value is not None:
                    yield bytes(value)
            if number == SAMPLE_BATCHES:
                return


def open_image_table(source: Path) -> tuple[ImageTable, dict[str, int], int]:
    """Return a table, the number of images per class, and the number without a usable label.

    Raises:
        ServiceError: the table cannot be read, has no column of images, or has too many labels.
    """
    kind: Literal["parquet", "delta"] = "delta" if (source / "_delta_log").is_dir() else "parquet"
    files = _delta_files(source) if kind == "delta" else _parquet_files(source)
    root = source if source.is_dir() else source.parent
    partitions = _partition_names(root, files)
    try:
        dataset = _open(root, files, partitions)
        image = _image_column(source, dataset.schema)
        names = tuple(dataset.schema.names)
        label = "label" if "label" in names else None
        counts = _count_labels(source, dataset, label)
        n_images = dataset.count_rows()
        name = _name_column(dataset, n_images)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be read as {kind}: {' '.join(str(error).split())}") from error
    classes: Counter[str] = Counter()
    class_of: dict[str, str] = {}
    class_names = _hugging_face_names(dataset.schema, label)
    for one, n in counts.items():
        if one is None:
            continue
        class_of[one] = _class_of(one, class_names)
        if class_of[one]:
            classes[class_of[one]] += n
    class_of = {text: known_as for text, known_as in class_of.items() if text != known_as}
    size = sum(Path(file).stat().st_size for file in files)
    table = ImageTable(root, kind, files, partitions, names, image, label, name, n_images, size, class_of)
    return table, dict(sorted(classes.items())), counts.total() - classes.total()


def _class_of(text: str, class_names: Sequence[str]) -> str:
    """Return the class of a label; empty if it is not a label."""
    if class_names:
        known = text.isdecimal() and int(text) < len(class_names)
        return (class_name(class_names[int(text)]) or "") if known else ""  # -1 is Hugging Face's missing label
    name = class_name(text) or ""
    return name if len(name) <= MAX_LABEL_CHARS else ""


def _hugging_face_names(schema: pa.Schema, label: str | None) -> list[str]:
    """Return the class names of a numeric label column, which `datasets` writes to a file's metadata."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = described["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _delta_files(source: Path) -> tuple[str, ...]:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    if set("[]") & set(str(source.absolute())):  # deltalake panics on them
        raise ConfigurationError(
            f"{source}: a Delta table cannot be read from a path that contains [ or ]: rename the folder"
        )
    try:
        table = DeltaTable(source)
        check_no_deleted_rows(table, str(source.absolute()))
        # The log percent-encodes file names in addition to the encoding of partition values.
        names = pa.table(table.get_add_actions(flatten=True)).column("path").to_pylist()
        return tuple(str(source / unquote(name)) for name in names)
    except DeltaError as error:
        raise DataError(f"{source} cannot be read as delta: {' '.join(str(error).split())}") from error


def _parquet_files(source: Path) -> tuple[str, ...]:
    if source.is_file():
        return (str(source),)
    paths = (path for path in source.rglob("*.parquet") if path.is_file())
    return tuple(sorted(str(path) for path in paths if not path.name.startswith((".", "_"))))


def _partition_names(root: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    folders = Path(files[0]).relative_to(root).parts[:-1] if files else ()
    return tuple(part.split("=", 1)[0] for part in folders if "=" in part)


def _open(root: Path, files: tuple[str, ...], partitions: tuple[str, ...]) -> Any:
    from pyarrow import dataset as ds
    from pyarrow import fs

    hive = ds.partitioning(pa.schema([(name, pa.string()) for name in partitions]), flavor="hive")
    return ds.dataset(
        list(files), format="parquet", filesystem=fs.LocalFileSystem(), partitioning=hive, partition_base_dir=str(root)
    )


def _image_column(source: Path, schema: pa.Schema) -> str:
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_struct(kind):
                inner = {one.name: one.type for one in kind}
                if _is_bytes(inner.get("bytes")):
                    return f"{name}.bytes"
            elif _is_bytes(kind):
                return name
    columns = ", ".join(f"{one.name} {one.type}"[:80] for one in schema)
    raise DataError(
        f"{source} has no column of encoded images: expected one of {', '.join(IMAGE_COLUMNS)} of type binary, or a "
        f"struct with a field bytes; got {columns}"
    )


def _name_column(dataset: Any, n_images: int) -> str | None:
    """Return a text column with a unique value per image, if there is one."""
    for name in NAME_COLUMNS:
        if name in dataset.schema.names and dataset.schema.field(name).type in TEXTS:
            names = dataset.to_table(columns=[name]).column(0)
            if not names.null_count and len(names.unique()) == n_images:
                return name
    return None


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _count_labels(source: Path, dataset: Any, label: str | None) -> Counter[str | None]:
    counts: Counter[str | None] = Counter()
    if label is None:
        return counts
    kind = dataset.schema.field(label).type
    if pa.types.is_nested(kind) or _is_bytes(kind):
        raise DataError(f"{source}: expected text or numbers in the column label, got {kind}")
    for batch in dataset.scanner(columns=[label]).to_batches():
        column = batch.column(0)
        for one in (column.cast(pa.string()) if kind in TEXTS else column).value_counts():
            value = one["values"].as_py()
            text = str(value).lower() if isinstance(value, bool) else str(value)  # as Spark writes it
            counts[None if value is None else text] += one["counts"].as_py()
        if len(counts) > MAX_CLASSES:
            raise DataError(f"{source}: expected at most {MAX_CLASSES:,} distinct labels, got more")
    return counts
