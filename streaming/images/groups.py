"""Groups of images that stay on one side of the split: frames of one camera, pictures of one person.

Images of a group look alike. Where some of them are fitted on and others are held out, the figures are too good.
"""

import pyarrow as pa
import pyarrow.compute as pc

from models.bundle import Bundle
from streaming.errors import ServiceError, UsageError
from streaming.images.patterns import extract_group

MAX_KEY_BYTES = 256  # of a key, as the names of images had them before
SOURCE, KEY, NO_GROUPS = "source", "key", "none"


def chosen_groups(given: str | None, champion: Bundle | None) -> str | None:
    """How images are grouped: as the option says, else as for the champion; None for not at all.

    Raises:
        ServiceError: the option is neither `source`, `key`, `none` nor a regular expression with a group.
    """
    if given is None and champion is not None:
        given = champion.manifest.training_data.group_by
    if given not in (None, SOURCE, KEY, NO_GROUPS):
        try:
            extract_group(pa.array([""]), given, "group")
        except ServiceError as error:
            raise UsageError(
                f"--group-by is source, key, none, or a regular expression with a group such as ^(cam[0-9]+)/: {error}"
            ) from error
    return None if given == NO_GROUPS else given


def group_ids(group_by: str, image_id: pa.Array, known_as: pa.Array, source: pa.Array, key: pa.Array) -> pa.Array:
    """The groups of images, by their content, name, source and key; an image that has none is a group of its own.

    Args:
        key: of the message, as bytes; null where there was none, and in rows from before it was kept, when the name was
            the key.
    """
    if group_by == KEY:
        return pc.coalesce(_as_text(key), known_as)
    groups = source if group_by == SOURCE else extract_group(source, group_by, "group")
    return pc.coalesce(groups, image_id)


def _as_text(key: pa.Array) -> pa.Array:
    """Keys as names of groups."""
    texts = [None if one is None else one[:MAX_KEY_BYTES].decode("utf-8", "replace") for one in key.to_pylist()]
    return pa.array(texts, pa.string())
