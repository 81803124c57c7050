"""DuckDB connections for reading the tables, and SQL that several readers share."""

import duckdb

MEMORY_LIMIT = "1GB"

# The latest label that `imagestream label` gave to each image (image_id, label); of two labels given at the same time,
# the last in alphabetical order. `given_labels` in `streaming.images.labels` is the same for Spark.
LATEST_LABELS = """
SELECT image_id, arg_max(label, (labelled_at, label)) AS label FROM labels WHERE label IS NOT NULL GROUP BY image_id
"""
# The same for a home without the table `labels`.
NO_LABELS = "SELECT NULL::VARCHAR AS image_id, NULL::VARCHAR AS label WHERE false"


def connect(
    *, memory_limit: str = MEMORY_LIMIT, spill_to: str = "", cache_footers: bool = False
) -> duckdb.DuckDBPyConnection:
    """A database in memory that downloads and loads no extensions, reads no Python variables, and uses UTC.

    The settings are GLOBAL, since a cursor does not inherit the session settings of its connection.

    Args:
        memory_limit: of the database, e.g. `1GB`.
        spill_to: a folder for data that exceeds the memory limit; by default, such a query fails.
        cache_footers: keep the footers of Parquet files; the files of a Delta table never change.
    """
    connection = duckdb.connect(":memory:")
    settings: dict[str, str | bool] = {
        "memory_limit": memory_limit,
        "temp_directory": spill_to,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "python_enable_replacements": False,
        "TimeZone": "UTC",
        "parquet_metadata_cache": cache_footers,
    }
    for name, value in settings.items():
        connection.execute(f"SET GLOBAL {name} = {str(value).lower() if isinstance(value, bool) else _quoted(value)}")
    return connection


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
