"""Making a client of Kafka such that nothing of it stays behind if no broker answers."""

import logging
from collections.abc import Callable
from typing import Any


def connect(kind: Callable[..., Any], **config: Any) -> Any:
    """A KafkaProducer or KafkaAdminClient, which connect when they are made.

    kafka-python 3.0.12 leaves its thread running, trying for ever, where that fails: one more with every attempt.

    Raises:
        kafka.errors.KafkaError, ValueError: as the class does.
    """
    from kafka.net.compat import KafkaNetClient

    # Its retries are no concern of the user's; a program that wants to see them gives the logger a handler.
    logger = logging.getLogger("kafka")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    made: list[Any] = []

    def network(**network_config: Any) -> Any:
        made.append(KafkaNetClient(**network_config))
        return made[-1]

    try:
        return kind(kafka_client=network, **config)
    except BaseException:
        for one in made:
            one.close()
        raise
