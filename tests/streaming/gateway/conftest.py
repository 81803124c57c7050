"""A topic for each file of the gateway's tests."""

import uuid

import pytest

from streaming.platform.broker import bootstrap_servers
from streaming.settings import Settings
from tests.producer.topics import create_topic


@pytest.fixture(scope="module")
def topic(broker: Settings) -> str:
    name = f"gateway-{uuid.uuid4().hex[:8]}"
    create_topic(bootstrap_servers(broker), name, partitions=3)
    return name
