"""Publishing images to Kafka for imagestream: reading files, building messages, and sending them reliably.

`publish` is the entry point; `producer.message` is the message contract with the stream.
"""

from producer.errors import PublishError
from producer.publish import Progress, PublishSummary, publish

DISTRIBUTION = "imagestream"  # read without an import, see `imagestream._taken`
__all__ = ["Progress", "PublishError", "PublishSummary", "publish"]
