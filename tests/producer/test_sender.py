"""The sender with a missing broker, several threads and rejected messages."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from producer.errors import PublishError
from producer.message import Delivery, build_message
from producer.sender import Sender
from streaming.platform.broker import bootstrap_servers
from streaming.settings import Settings
from tests.faults.harness import wait_until
from tests.producer.topics import create_topic, messages


def test_missing_broker_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    for _ in range(2):
        with pytest.raises(PublishError, match=r"no Kafka broker answered at '127\.0\.0\.1:1' within 0\.3 s"):
            Sender("127.0.0.1:1", "images", connect_timeout_s=0.3)
    assert set(threading.enumerate()) <= before


def test_threads_share_a_sender(broker: Settings) -> None:
    servers, topic = bootstrap_servers(broker), f"sender-{uuid.uuid4().hex[:8]}"
    create_topic(servers, topic, partitions=2)
    sender = Sender(servers, topic)
    try:
        wait_until(sender.answers, lambda: "the broker does not answer")
        with ThreadPoolExecutor(8) as pool:
            places = list(pool.map(lambda n: sender.send(build_message(b"%d" % n, "test")).result(30), range(100)))
    finally:
        sender.close()
    found = {Delivery(topic, one.partition, one.offset): one.value for one in messages(servers, topic)}
    assert [found[place] for place in places] == [b"%d" % number for number in range(100)]


def test_rejected_message_does_not_fail_the_next_ones(broker: Settings) -> None:
    servers, topic = bootstrap_servers(broker), f"sender-{uuid.uuid4().hex[:8]}"
    create_topic(servers, topic, max_message_bytes=10_000)
    sender = Sender(servers, topic)
    try:
        error = sender.send(build_message(bytes(20_000), "test")).exception(30)
        assert isinstance(error, PublishError)
        for number in range(3):
            assert sender.send(build_message(b"%d" % number, "test")).result(30).topic == topic
    finally:
        sender.close()
    assert [one.value for one in messages(servers, topic)] == [b"0", b"1", b"2"]
