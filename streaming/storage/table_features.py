"""Detects and rejects Delta features with which the Parquet files of a table are not exactly its rows.

The tables are created without such features, and every reader here reads the files in the log directly. Another program
may enable one: with deletion vectors, deleted rows stay in the files and a separate file lists them; with column
mapping, columns have other names in the files. Appending rows is still possible with deletion vectors.

Source: Delta's protocol, "Deletion Vectors" and "Column Mapping" (github.com/delta-io/delta/blob/master/PROTOCOL.md).
"""

from typing import TYPE_CHECKING

from streaming.errors import ConfigurationError

if TYPE_CHECKING:
    from deltalake import DeltaTable

# Features that do not affect the files.
PLAIN_FEATURES = frozenset({"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "variantType"})
VECTORS = "deletionVectors"
MAPPING = "columnMapping"
MAPPING_READER = 2  # the protocol version that meant column mapping before features had names
UNSUPPORTED = "Unsupported table features"  # in deltalake's error for a commit that it rejects


class TableFeatureError(ConfigurationError):
    """A table uses a Delta feature that is not supported; the message names it and says how to remove it."""


def check_features(table: "DeltaTable", place: str) -> None:
    """Reject a table with an unsupported feature other than deletion vectors.

    Raises:
        TableFeatureError: the table uses such a feature.
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


def check_no_deleted_rows(table: "DeltaTable", place: str) -> None:
    """Reject a version of a table whose files do not hold exactly its rows.

    Raises:
        TableFeatureError: see `check_features`; or a deletion vector has deleted rows of a file.
    """
    check_features(table, place)
    files = files_with_vectors(table)
    if files:
        raise TableFeatureError(
            f"{place} uses Delta's {VECTORS} in {files} of its files, which still hold deleted rows: run in Spark "
            f"{_purge(place)}"
        )


def check_rewritable(table: "DeltaTable", place: str) -> None:
    """Reject a table in which a concurrent DELETE by another program could mark rows of replaced files as deleted.

    Raises:
        TableFeatureError: see `check_no_deleted_rows`; or deletion vectors are enabled.
    """
    check_no_deleted_rows(table, place)
    enabled = table.metadata().configuration.get("delta.enableDeletionVectors") == "true"
    if enabled and VECTORS in reader_features(table):
        raise TableFeatureError(
            f"{place} uses Delta's {VECTORS}, with which files cannot be rewritten here: run in Spark {_purge(place)}"
        )


def check_commit_error(error: Exception, place: str) -> None:
    """Distinguish a commit that deltalake can never make from one that lost a race.

    Raises:
        TableFeatureError: the table requires a writer feature that deltalake does not support.
    """
    text = " ".join(str(error).split())
    if UNSUPPORTED in text:
        raise TableFeatureError(
            f"{place} cannot be written: {text}; run in Spark ALTER TABLE delta.`{place}` DROP FEATURE with its name"
        ) from error


def reader_features(table: "DeltaTable") -> set[str]:
    """The features of a table that its readers must support."""
    protocol = table.protocol()
    old = {MAPPING} if protocol.min_reader_version == MAPPING_READER else set()
    return old | set(protocol.reader_features or ())


def files_with_vectors(table: "DeltaTable") -> int:
    """The number of files with rows that a deletion vector deletes; this reads the vectors if there are any."""
    if VECTORS not in reader_features(table):
        return 0
    return sum(batch.num_rows for batch in table.deletion_vectors())


def _purge(place: str) -> str:
    """The statements that purge deletion vectors, and disable them first so that no DELETE adds new ones."""
    return (
        f"ALTER TABLE delta.`{place}` SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'false') and "
        f"REORG TABLE delta.`{place}` APPLY (PURGE)"
    )
