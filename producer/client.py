"""Connecting and closing the clients of kafka-python without leaking threads or blocking on a silent broker."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kafka import KafkaProducer


def connect(client_class: Callable[..., Any], **config: Any) -> Any:
    """Return a connected KafkaProducer, KafkaConsumer or KafkaAdminClient.

    If the constructor of kafka-python 3.0.12 fails, its network thread keeps reconnecting for good; it is stopped here.

    Raises:
        kafka.errors.KafkaError, ValueError: as `client_class` does.
    """
    from kafka.net.compat import KafkaNetClient

    # Reconnection attempts are noise to users; a program that wants to see them adds its own handler.
    logger = logging.getLogger("kafka")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    network_clients: list[Any] = []

    def network_client(**network_config: Any) -> Any:
        network_clients.append(KafkaNetClient(**network_config))
        return network_clients[-1]

    try:
        return client_class(kafka_client=network_client, **config)
    except BaseException:
        for one in network_clients:
            one.close()
        raise


def close_producer(producer: "KafkaProducer") -> None:
    """Close a producer within a second or two, dropping messages that a silent broker has not acknowledged."""
    from kafka.errors import KafkaTimeoutError

    try:
        producer.close(timeout=1)
    except KafkaTimeoutError:  # raised while messages are in flight
        producer._sender.force_close()
        producer.close(timeout=1)
