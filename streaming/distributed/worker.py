"""A worker's task: read and decode its images once, then learn, epoch after epoch, with the server's help."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark import TaskContext

from models.augment import Augmentation, augment
from models.decode import DEFAULT_LIMITS, Limits
from models.scorer import Images, decode_all
from streaming.distributed.history import Counts
from streaming.distributed.images_cache import ImagesCache
from streaming.distributed.network import Network, NetworkParts
from streaming.distributed.options import Frequency, TrainerOptions
from streaming.distributed.protocol import Channel, Kind, LostPeerError, Message, Values, connect
from streaming.distributed.synchronous import digest
from streaming.errors import ConfigurationError, ServiceError
from streaming.images.sources import read_source

DONE = pa.schema([pa.field("worker", pa.int32()), pa.field("rows", pa.int64())])
DONE_DDL = "worker int, rows long"
IMAGES_PER_READ = 64
BAD_NAMED = 20
TELL_EVERY_S = 1.0


@dataclass(frozen=True)
class WorkerTask:
    """What a worker needs to know beside the network; the same for all of them."""

    options: TrainerOptions
    classes: tuple[str, ...]
    address: tuple[str, int]
    token: bytes
    sizes: frozenset[int]
    limits: Limits = DEFAULT_LIMITS


@dataclass
class _Read:
    """The images of this worker, and those that it could not read."""

    training: ImagesCache
    validation: ImagesCache
    bad: dict[str, str] = field(default_factory=dict)
    n_bad: int = 0


def train_partition(
    batches: Iterator[pa.RecordBatch], parts: Callable[[], NetworkParts], task: WorkerTask
) -> Iterator[pa.RecordBatch]:
    """Train on the images of one partition until the server says that it is enough.

    Args:
        batches: of the columns image_id, label, validation, content, and source, which names the file that holds the
            image where content is null.

    Raises:
        ServiceError: the server gave this try up, or has gone.
    """
    context = TaskContext.get()
    if context is None:
        raise ConfigurationError("a worker's task runs in Spark")
    worker, attempt = context.partitionId(), context.taskAttemptId()
    channel = connect(task.address, task.token, task.sizes, task.options.timeout_s * 2)
    try:
        channel.send(Message(Kind.HELLO, worker, meta={"attempt": attempt}))
        network = Network(parts(), task.options, worker)
        read = _read(batches, network.input_size, task, _Teller(channel, worker))
        rows = _Learner(channel, worker, network, read, task).run()
    finally:
        channel.close()
    yield pa.RecordBatch.from_pydict({"worker": [worker], "rows": [rows]}, DONE)


class _Teller:
    """Lets the server know that this worker is alive, not more often than it cares."""

    def __init__(self, channel: Channel, worker: int) -> None:
        self._channel = channel
        self._worker = worker
        self._told = monotonic()

    def tell(self, epoch: int, rows: int) -> None:
        if monotonic() - self._told >= TELL_EVERY_S:
            self._channel.send(Message(Kind.PROGRESS, self._worker, epoch=epoch, rows=rows))
            self._told = monotonic()


def _read(batches: Iterator[pa.RecordBatch], size: tuple[int, int], task: WorkerTask, teller: _Teller) -> _Read:
    read = _Read(ImagesCache(size), ImagesCache(size))
    for batch in batches:
        for start in range(0, batch.num_rows, IMAGES_PER_READ):
            rows = batch.slice(start, IMAGES_PER_READ)
            contents = [_content(row) for row in rows.select(["source", "content"]).to_pylist()]
            decoded = decode_all(contents, size, limits=task.limits)
            for at, bad in decoded.bad.items():
                read.n_bad += 1
                if len(read.bad) < BAD_NAMED:
                    read.bad[str(rows.column("source")[at])] = f"{bad.reason}: {bad.detail}"[:200]
            good = rows.take(pa.array(decoded.rows, pa.int64()))
            labels = pc.index_in(good.column("label"), pa.array(task.classes)).to_numpy().astype(np.int64)
            ids = np.array(good.column("image_id").to_pylist(), object)
            held = good.column("validation").to_numpy(zero_copy_only=False).astype(bool)
            for cache, of_it in ((read.training, ~held), (read.validation, held)):
                cache.append(decoded.images[of_it], labels[of_it], list(ids[of_it]))
            teller.tell(0, len(read.training))
    read.training.close()
    read.validation.close()
    return read


def _content(row: dict[str, Any]) -> bytes | None:
    content: bytes | None = row["content"]
    if content is not None or row["source"] is None:
        return content
    try:
        return read_source(row["source"])
    except OSError:
        return None


class _Learner:
    """The epochs of one try."""

    def __init__(self, channel: Channel, worker: int, network: Network, read: _Read, task: WorkerTask) -> None:
        self._channel = channel
        self._worker = worker
        self._network = network
        self._read = read
        self._options = task.options
        self._teller = _Teller(channel, worker)
        weights = task.options.class_weights or {}
        self._importance: Values = np.array([weights.get(name, 1.0) for name in task.classes], np.float32)
        self._augmentation = Augmentation(mirror=task.options.mirror)
        self._version = 0
        self._counts = Counts()

    def run(self) -> int:
        """Learn until the server says stop; returns how many images this worker learned from."""
        network, n = self._network, self._network.n_weights
        cache = self._read.training
        meta = {"bad": self._read.bad, "n_bad": self._read.n_bad, "validation": len(self._read.validation)}
        start = self._ask(Message(Kind.READY, self._worker, rows=len(cache), meta=meta), Kind.START)
        network.weights, network.optimizer = start.values[:n], start.values[n:]
        self._version = start.version
        own_steps = -(-len(cache) // self._options.local_batch)
        epoch, stop = start.epoch, bool(start.meta["stop"])
        network.learning_rate = float(start.meta["learning_rate"])
        while not stop:
            since = monotonic()
            self._counts = Counts()
            self._learn(epoch, start.step if self._options.waits else own_steps)
            answer = self._ask(self._epoch_message(epoch, monotonic() - since), Kind.NEXT)
            network.learning_rate, stop = float(answer.meta["learning_rate"]), bool(answer.meta["stop"])
            epoch += 1
        return len(cache)

    def _learn(self, epoch: int, steps: int) -> None:
        """One epoch, in an order that depends on the seed, the worker and the epoch alone."""
        order = np.random.default_rng([self._options.seed, self._worker, epoch]).permutation(len(self._read.training))
        size = self._options.local_batch
        batches = [order[at * size : (at + 1) * size] for at in range(steps)]
        waits, each = self._options.waits, self._options.frequency is Frequency.BATCH
        before = None if waits or each else self._network.weights
        for step, rows in enumerate(batches):
            match waits, each:
                case True, True:
                    self._reduce_gradient(epoch, step, rows)
                case False, True:
                    at_first = self._network.weights
                    self._step(epoch, rows)
                    self._push(epoch, at_first, len(rows))
                case _:
                    self._step(epoch, rows)
            self._teller.tell(epoch, min((step + 1) * size, len(order)))
        if waits and not each:
            self._average(epoch, steps, len(order))
        if before is not None:
            self._push(epoch, before, len(order))

    def _batch(self, epoch: int, rows: NDArray[np.int64]) -> tuple[Images, NDArray[np.int64], Values]:
        cache = self._read.training
        images, labels = cache.take(rows), cache.labels[rows]
        if self._options.augment:
            # Of the image's own id, so that the copy does not depend on the worker that makes it.
            altered = [
                augment(image, f"{self._options.seed}:{image_id}", epoch, self._augmentation)
                for image, image_id in zip(images, cache.ids(rows), strict=True)
            ]
            images = np.array(altered, np.uint8)
        return images, labels, self._importance[labels]

    def _step(self, epoch: int, rows: NDArray[np.int64]) -> None:
        if len(rows):
            images, labels, importance = self._batch(epoch, rows)
            self._counts += Counts.of(self._network.step(images, labels, importance), labels)

    def _reduce_gradient(self, epoch: int, step: int, rows: NDArray[np.int64]) -> None:
        """The step that one process would take on the batches of all workers together."""
        if len(rows):
            images, labels, importance = self._batch(epoch, rows)
            gradient, logits = self._network.gradient(images, labels, importance)
            self._counts += Counts.of(logits, labels)
        else:  # has run out, and takes the others' step
            gradient = np.zeros(self._network.n_weights, np.float32)
        message = Message(Kind.REDUCE, self._worker, epoch, step, len(rows), values=gradient)
        self._network.apply(self._ask(message, Kind.REDUCED).values)

    def _average(self, epoch: int, step: int, rows: int) -> None:
        network, n = self._network, self._network.n_weights
        own = np.concatenate([network.weights, network.optimizer])
        mean = self._ask(Message(Kind.REDUCE, self._worker, epoch, step, rows, values=own), Kind.REDUCED).values
        network.weights, network.optimizer = mean[:n], mean[n:]

    def _push(self, epoch: int, before: Values, rows: int) -> None:
        """Tell the server how the weights have changed, and take its own."""
        change = self._network.weights - before
        message = Message(Kind.PUSH, self._worker, epoch, rows=rows, version=self._version, values=change)
        answer = self._ask(message, Kind.WEIGHTS)
        self._network.weights, self._version = answer.values, answer.version

    def _epoch_message(self, epoch: int, seconds: float) -> Message:
        network, cache = self._network, self._read.validation
        validation = Counts()
        for rows in cache.batches(IMAGES_PER_READ):
            validation += Counts.of(network.logits(cache.take(rows)), cache.labels[rows])
            self._teller.tell(epoch, len(self._read.training))
        meta = {
            "training": vars(self._counts),
            "validation": vars(validation),
            "seconds": seconds,
            "bytes": self._channel.sent + self._channel.received,
            "process": f"{socket.gethostname()}:{os.getpid()}",
        }
        state = network.optimizer
        if self._options.waits:
            state = np.concatenate([network.weights, state])
            meta["digest"] = digest(state)
            if self._worker:  # all have the same
                state = state[:0]
        return Message(Kind.EPOCH, self._worker, epoch, rows=len(self._read.training), meta=meta, values=state)

    def _ask(self, message: Message, expected: Kind) -> Message:
        self._channel.send(message)
        while (answer := self._channel.receive()).kind is Kind.PROGRESS:
            pass  # the others are not there yet
        if answer.kind is Kind.FAILED:
            raise ServiceError(str(answer.meta.get("why", "the server gave this worker up")))
        if answer.kind is not expected:
            raise LostPeerError(f"expected {expected.name}, the server said {answer.kind.name}")
        return answer
