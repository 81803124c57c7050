"""Making a client of Kafka such that it is refused at once, and nothing of it stays behind if no broker answers."""

from collections.abc import Callable
from typing import Any

from producer import client
from streaming.platform.kafka_probe import check_broker


def connect(kind: Callable[..., Any], **config: Any) -> Any:
    """A KafkaConsumer, KafkaProducer or KafkaAdminClient, which connect when they are made.

    Args:
        kind: the class.
        config: its arguments, with those of `kafka_security.client_arguments`.

    Raises:
        RefusedError: a broker is there, and does not let us in.
        kafka.errors.KafkaError, ValueError: as the class does.
    """
    check_broker(config["bootstrap_servers"], config)
    return client.connect(kind, **config)
