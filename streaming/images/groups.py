"""Groups of images that stay on one side of the split: frames of one camera, pictures of one person.

Images of a group look alike. Where some of them are fitted on and others are held out, the figures are too good.
"""

import pyarrow as pa
import pyarrow.compute as pc

from models.bundle import Bundle
from streaming.errors import ServiceError
from streaming.images.patterns import extract_group

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
            raise ServiceError(
                f"--group-by is source, key, none, or a regular expression with a group such as ^(cam[0-9]+)/: {error}"
            ) from error
    return None if given == NO_GROUPS else given


def group_ids(group_by: str, image_id: pa.Array, known_as: pa.Array, source: pa.Array) -> pa.Array:
    """The groups of images, by their content, name and source; an image that has none is a group of its own."""
    if group_by == KEY:
        return known_as
    groups = source if group_by == SOURCE else extract_group(source, group_by, "group")
    return pc.coalesce(groups, image_id)
