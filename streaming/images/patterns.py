"""Regular expressions that a user gives, over names that anyone may have written: run by RE2, in linear time."""

import re

import pyarrow as pa

from streaming.errors import UsageError

MAX_PATTERN_CHARS = 1_000


def extract_group(texts: pa.Array, pattern: str, name: str) -> pa.Array:
    """The group `name` of a pattern, else its first group, in each text; null where it does not match, or is empty.

    RE2 (in DuckDB) takes time linear in the text, whatever the pattern is.

    Args:
        texts: strings; nulls stay null.
        name: what the group is, also in errors.

    Raises:
        ServiceError: not a regular expression, without a group, or not one for RE2.
    """
    import duckdb

    if len(pattern) > MAX_PATTERN_CHARS:
        raise UsageError(f"the {name} pattern has {len(pattern):,} characters, at most {MAX_PATTERN_CHARS:,} are taken")
    try:
        groups = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"the {name} pattern {pattern!r} is not a regular expression: {error}") from error
    if not groups.groups:
        raise UsageError(f"the {name} pattern {pattern!r} has no group to take the {name} from, as in ([^/]+)_[0-9]+$")
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
                f"the {name} pattern {pattern!r} cannot be used ({why}); look-around and back-references are not taken"
            ) from error
    return pa.table(found).column("found").combine_chunks()
