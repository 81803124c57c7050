"""Files that are called after a topic, whose name may have almost as many letters as a file's."""

import hashlib

MAX_STEM_CHARS = 200  # a file's name has at most 255 bytes


def file_stem(topic: str) -> str:
    """A topic's name as that of a file: of a long one its beginning and a hash, for endings such as `.sqlite-wal`."""
    if len(topic) <= MAX_STEM_CHARS:
        return topic
    digest = hashlib.sha256(topic.encode()).hexdigest()[:16]
    return f"{topic[: MAX_STEM_CHARS - 17]}~{digest}"  # a topic has no ~ in its name
