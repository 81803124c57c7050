"""Publishing images to Kafka, for imagestream: `publish` sends files, `message` is what the stream reads them by."""

from producer.errors import PublishError
from producer.publish import Progress, PublishSummary, publish

__all__ = ["Progress", "PublishError", "PublishSummary", "publish"]
