"""Publishing images to Kafka: reading files, shaping messages and sending them until the broker acknowledges.

`publish` is the entry point; `producer.message` is the message contract, which the stream reads by.
"""

from producer.errors import PublishError
from producer.publish import Progress, PublishSummary, publish

__all__ = ["Progress", "PublishError", "PublishSummary", "publish"]
