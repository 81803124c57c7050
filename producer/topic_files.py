"""Names of files that are named after a topic: a topic's name may be almost as long as a file's."""

import hashlib

MAX_STEM_CHARS = 200  # a file's name has at most 255 bytes


def file_stem(topic: str) -> str:
    """The topic's name, a long one truncated and followed by a hash to leave room for endings such as `.sqlite-wal`."""
    if len(topic) <= MAX_STEM_CHARS:
        return topic
    digest = hashlib.sha256(topic.encode()).hexdigest()[:16]
    return f"{topic[: MAX_STEM_CHARS - 17]}~{digest}"  # ~ is not allowed in topic names: no collision
