"""Groups of images that stay on one side of the split, such as frames of one camera or pictures of one person.

Images of a group resemble each other: metrics are too optimistic if some are fitted on and others held out.
"""

import pyarrow as pa
import pyarrow.compute as pc

from models.bundle import Bundle
from streaming.errors import ServiceError, UsageError
from streaming.images.patterns import extract_group

MAX_KEY_BYTES = 256  # length of keys in the image names of earlier releases
SOURCE, KEY, NO_GROUPS = "source", "key", "none"


def chosen_groups(given: str | None, champion: Bundle | None) -> str | None:
    """Return the grouping: the option, else the champion's; None for no grouping.

    Raises:
        UsageError: the option is neither `source`, `key`, `none` nor a regular expression with a group.
    """
    if given is None and champion is not None:
        given = champion.manifest.training_data.group_by
    if given not in (None, SOURCE, KEY, NO_GROUPS):
        try:
            extract_group(pa.array([""]), given, "group")
        except ServiceError as error:
            raise UsageError(
                f"--group-by: expected source, key, none, or a regular expression with a group such as ^(cam[0-9]+)/: "
                f"{error}"
            ) from error
    return None if given == NO_GROUPS else given


def group_ids(group_by: str, image_id: pa.Array, known_as: pa.Array, source: pa.Array, key: pa.Array) -> pa.Array:
    """Return the group of each of N images; an image without a group forms its own.

    Args:
        group_by: `source`, `key` or a regular expression over the source.
        image_id: ids of the contents, (N,) string.
        known_as: names of the images, (N,) string.
        source: sources of the images, (N,) string.
        key: keys of the messages, (N,) binary; null without a key and in rows of earlier releases, whose name is the
            key.
    """
    if group_by == KEY:
        return pc.coalesce(_as_text(key), known_as)
    groups = source if group_by == SOURCE else extract_group(source, group_by, "group")
    return pc.coalesce(groups, image_id)


def _as_text(key: pa.Array) -> pa.Array:
    """Decode keys as group names."""
    texts = [None if one is None else one[:MAX_KEY_BYTES].decode("utf-8", "replace") for one in key.to_pylist()]
    return pa.array(texts, pa.string())
