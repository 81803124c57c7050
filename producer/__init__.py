"""Publishing images to Kafka: `publish` sends files, `message` is the contract by which the stream reads them."""

from producer.errors import PublishError
from producer.publish import Progress, PublishSummary, publish

__all__ = ["Progress", "PublishError", "PublishSummary", "publish"]
