"""Regular expressions given by users, matched against untrusted names by RE2 in linear time."""

import re

import pyarrow as pa

from streaming.errors import UsageError

MAX_PATTERN_CHARS = 1_000


def extract_group(texts: pa.Array, pattern: str, name: str) -> pa.Array:
    """Extract the group `name` of a pattern, else its first group; null if it is empty or the text does not match.

    RE2 (in DuckDB) takes time linear in the length of the text, for any pattern.

    Args:
        texts: strings; nulls stay null.
        name: name of the group, also used in errors.

    Raises:
        UsageError: the pattern is not a regular expression, has no group, or is not supported by RE2.
    """
    import duckdb

    if len(pattern) > MAX_PATTERN_CHARS:
        raise UsageError(f"the {name} pattern has {len(pattern):,} characters: expected at most {MAX_PATTERN_CHARS:,}")
    try:
        groups = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"the {name} pattern {pattern!r} is not a regular expression: {error}") from error
    if not groups.groups:
        raise UsageError(
            f"the {name} pattern {pattern!r} has no group: expected one for the {name}, as in ([^/]+)_[0-9]+$"
        )
    with duckdb.connect() as connection:
        connection.register("texts", pa.table({"text": texts}))
        try:
            found = connection.sql(
                "SELECT nullif(regexp_extract(text, $pattern, $group), '') AS found FROM texts",
                params={"pattern": pattern, "group": groups.groupindex.get(name, 1)},
            ).to_arrow_table()
        except duckdb.Error as error:
            why = " ".join(str(error).split())
            raise UsageError(
                f"the {name} pattern {pattern!r} cannot be used ({why}): look-around and back-references are not "
                f"supported"
            ) from error
    return pa.table(found).column("found").combine_chunks()
