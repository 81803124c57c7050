"""The transactional producer: undocumented parts of kafka-python exist, and a newer producer fences an older one."""

import inspect
import re
from collections.abc import Iterator
from contextlib import closing
from operator import attrgetter
from uuid import uuid4

import kafka
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from kafka.producer.transaction_manager import TransactionalRequestResult

from streaming.platform import transactional_producer
from streaming.platform.transactional_producer import UNDOCUMENTED, TransactionalProducer, is_fencing
from streaming.settings import Settings
from tests.faults.harness import wait_until
from tests.producer.topics import create_topic

LIMIT_S = 300.0


@pytest.fixture(scope="module")
def unconnected() -> Iterator[KafkaProducer]:
    """A producer of the installed kafka-python that has not reached a broker."""
    producer = KafkaProducer(bootstrap_servers="127.0.0.1:1", api_version=(2, 6), transactional_id="unconnected")
    yield producer
    producer._sender.force_close()
    producer.close(timeout=1)


@pytest.mark.parametrize("name", UNDOCUMENTED)
def test_kafka_python_has_the_undocumented_attribute(name: str, unconnected: KafkaProducer) -> None:
    found = attrgetter(name)(unconnected)
    assert found is None or callable(found), f"KafkaProducer.{name} has changed in kafka-python {kafka.__version__}"


def test_undocumented_attributes_are_listed_and_used() -> None:
    source = inspect.getsource(transactional_producer)
    assert {*re.findall(r"\._producer\.(_\w+)", source)} == {name.partition(".")[0] for name in UNDOCUMENTED}
    for name in UNDOCUMENTED:
        assert re.search(rf"\b{name.partition('.')[2]}\b", source.partition("class ")[2]), name
    assert [*inspect.signature(TransactionalRequestResult.wait).parameters] == ["self", "timeout_ms"]


def test_newer_producer_fences_the_older_and_commits_messages_with_offsets(broker: Settings) -> None:
    servers, topic, group = str(broker.bootstrap_servers), f"answers-{uuid4().hex[:8]}", f"group-{uuid4().hex[:8]}"
    create_topic(servers, topic)
    older, newer = (TransactionalProducer(servers, group, LIMIT_S, {}) for _ in range(2))
    older.fence()
    older.begin()
    older.send(topic, b"older", b"key", [])
    older.flush()
    assert not older.is_fenced
    newer.fence()
    newer.begin()
    newer.send(topic, b"newer", None, [("name", b"value")])
    newer.commit(topic, 7, group)
    with pytest.raises(KafkaError) as caught:
        older.commit(topic, 6, group)
    assert is_fencing(caught.value) or older.is_fenced
    senders = [one._producer._sender for one in (older, newer)]
    for one in (older, newer):
        one.abandon()
    wait_until(
        lambda: not any(one.is_alive() for one in senders), lambda: "a thread of an abandoned producer is still alive"
    )

    with closing(KafkaConsumer(bootstrap_servers=servers, group_id=group, isolation_level="read_committed")) as reader:
        partitions = [TopicPartition(topic, one) for one in reader.partitions_for_topic(topic)]
        assert reader.committed(TopicPartition(topic, 0)) == 7
        reader.assign(partitions)
        reader.seek_to_beginning()
        ends = reader.end_offsets(partitions)
        found = []
        while any(reader.position(one) < end for one, end in ends.items()):
            found += [one for some in reader.poll(timeout_ms=200).values() for one in some]
    assert [(one.value, one.headers) for one in found] == [(b"newer", [("name", b"value")])]
