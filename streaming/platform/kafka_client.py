"""Creates Kafka clients that fail fast if the broker denies access, and leave no threads behind if none answers."""

from collections.abc import Callable
from typing import Any

from producer import client
from streaming.platform.kafka_probe import check_broker


def connect(kind: Callable[..., Any], **config: Any) -> Any:
    """Create a KafkaConsumer, KafkaProducer or KafkaAdminClient, which connect on creation.

    Args:
        kind: the class.
        config: its arguments, including those of `kafka_security.client_arguments`.

    Raises:
        RefusedError: a broker answers, but denies access.
        kafka.errors.KafkaError, ValueError: the errors of the class.
    """
    check_broker(config["bootstrap_servers"], config)
    return client.connect(kind, **config)
