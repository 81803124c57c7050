"""Reading the features with other tools: one Parquet file with pandas, deltalake and DuckDB."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder, convert_to_deltalake

Shape = tuple[int, int, int]  # rows, labels, values of features in each row
SHAPE = "SELECT count(*) AS rows, count(DISTINCT label) AS labels, {width} AS width FROM {table}"


def by_pandas(parquet: Path) -> Shape:
    """Read the file with pandas."""
    rows = pd.read_parquet(parquet)
    (width,) = rows["features"].map(len).unique()
    return len(rows), rows["label"].nunique(), int(width)


def by_deltalake(parquet: Path) -> Shape:
    """Read the file with deltalake after converting its folder to a table, which adds a log."""
    if not DeltaTable.is_deltatable(str(parquet.parent)):
        convert_to_deltalake(parquet.parent)
    sql = SHAPE.format(width="max(array_length(features))", table="fruits")
    rows = pa.table(QueryBuilder().register("fruits", DeltaTable(parquet.parent)).execute(sql)).to_pylist()[0]
    return rows["rows"], rows["labels"], rows["width"]


def by_duckdb(parquet: Path) -> Shape:
    """Read the file with DuckDB."""
    found = duckdb.execute(
        SHAPE.format(width="max(len(features))", table="read_parquet($1)"), [str(parquet)]
    ).fetchall()
    ((rows, labels, width),) = found
    return rows, labels, width


def write_labels(parquet: Path, csv: Path) -> Path:
    """Write `image_id,label` for `imagestream label`, with one row for duplicate images."""
    rows = "SELECT image_id, any_value(label) AS label FROM read_parquet($parquet) GROUP BY image_id"
    duckdb.execute(f"COPY ({rows} ORDER BY image_id) TO $csv (HEADER)", {"parquet": str(parquet), "csv": str(csv)})
    return csv


READERS: dict[str, Callable[[Path], Shape]] = {"pandas": by_pandas, "deltalake": by_deltalake, "duckdb": by_duckdb}
