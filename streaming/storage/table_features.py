"""Features of Delta under which the Parquet files of a table are not its rows: found, and refused by name.

The tables are made without any of them, and every reader here takes the files that the log names as they are. Another
program may enable such a feature. With deletion vectors, deleted rows stay in the files and a separate file lists them;
with column mapping, columns have other names in the files. Rows may still be appended beside deletion vectors.

Source: Delta's protocol, "Deletion Vectors" and "Column Mapping"
(github.com/delta-io/delta/blob/master/PROTOCOL.md).
"""

from typing import TYPE_CHECKING

from streaming.errors import ConfigurationError

if TYPE_CHECKING:
    from deltalake import DeltaTable

# That leave the files as they are.
PLAIN_FEATURES = frozenset({"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "variantType"})
VECTORS = "deletionVectors"
MAPPING = "columnMapping"
MAPPING_READER = 2  # the version of the protocol that was column mapping, before features had names
UNSUPPORTED = "Unsupported table features"  # in deltalake's error of a commit that it refuses


class TableFeatureError(ConfigurationError):
    """A table uses a feature of Delta that is not supported here; the message names it and how to remove it."""


def check_features(table: "DeltaTable", place: str) -> None:
    """Refuse a table whose files do not have its columns.

    Raises:
        TableFeatureError: it uses a feature other than deletion vectors under which its files are not its rows.
    """
    used = reader_features(table) - PLAIN_FEATURES - {VECTORS}
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") == "none":
        used.discard(MAPPING)
    if used:
        name = min(used)
        raise TableFeatureError(
            f"{place} uses Delta's {name}, which is not supported here: run in Spark "
            f"ALTER TABLE delta.`{place}` DROP FEATURE {name}"
        )


def check_whole_files(table: "DeltaTable", place: str) -> None:
    """Refuse a version of a table of which the files do not hold exactly its rows.

    Raises:
        TableFeatureError: as `check_features`, or rows of a file were deleted by a deletion vector.
    """
    check_features(table, place)
    files = files_with_vectors(table)
    if files:
        raise TableFeatureError(
            f"{place} uses Delta's {VECTORS} in {files} of its files, which still hold deleted rows: run in Spark "
            f"{_purge(place)}"
        )


def check_rewritable(table: "DeltaTable", place: str) -> None:
    """Refuse to replace files where a concurrent DELETE by another program could mark rows of them as deleted.

    Raises:
        TableFeatureError: as `check_whole_files`, or deletion vectors are enabled.
    """
    check_whole_files(table, place)
    enabled = table.metadata().configuration.get("delta.enableDeletionVectors") == "true"
    if enabled and VECTORS in reader_features(table):
        raise TableFeatureError(
            f"{place} uses Delta's {VECTORS}, beside which no file is rewritten here: run in Spark {_purge(place)}"
        )


def check_commit_error(error: Exception, place: str) -> None:
    """Tell a commit that deltalake can never make from one that lost a race.

    Raises:
        TableFeatureError: the table needs a feature of the writer that deltalake lacks.
    """
    text = " ".join(str(error).split())
    if UNSUPPORTED in text:
        raise TableFeatureError(
            f"{place} cannot be written: {text}; run in Spark ALTER TABLE delta.`{place}` DROP FEATURE with its name"
        ) from error


def reader_features(table: "DeltaTable") -> set[str]:
    """The features of a table that its readers must know."""
    protocol = table.protocol()
    old = {MAPPING} if protocol.min_reader_version == MAPPING_READER else set()
    return old | set(protocol.reader_features or ())


def files_with_vectors(table: "DeltaTable") -> int:
    """How many files of a version hold rows that a deletion vector deletes; reads the vectors where there are any."""
    if VECTORS not in reader_features(table):
        return 0
    return sum(batch.num_rows for batch in table.deletion_vectors())


def _purge(place: str) -> str:
    """Disable the feature first: with it enabled, the next DELETE would write vectors again."""
    return (
        f"ALTER TABLE delta.`{place}` SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'false') and "
        f"REORG TABLE delta.`{place}` APPLY (PURGE)"
    )
