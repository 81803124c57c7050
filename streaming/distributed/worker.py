"""A worker's task: read and decode its images once, then train for the epochs that the server requests."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic

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
from streaming.distributed.network import NetworkParts, TrainableNetwork
from streaming.distributed.options import Frequency, TrainerOptions
from streaming.distributed.protocol import Channel, LostPeerError, MessageKind, PeerMessage, Values, connect
from streaming.distributed.synchronous import digest
from streaming.errors import ConfigurationError, ServiceError
from streaming.images.sources import read_if_possible

DONE = pa.schema([pa.field("worker", pa.int32()), pa.field("rows", pa.int64())])
DONE_DDL = "worker int, rows long"
IMAGES_PER_READ = 64
BAD_NAMED = 20
REPORT_EVERY_S = 1.0


@dataclass(frozen=True)
class WorkerTask:
    """Parameters of a worker besides the network; the same for all workers."""

    options: TrainerOptions
    classes: tuple[str, ...]
    address: tuple[str, int]
    token: bytes
    sizes: frozenset[int]
    limits: Limits = DEFAULT_LIMITS


@dataclass
class _WorkerImages:
    """A worker's images, and those that it could not read."""

    training: ImagesCache
    validation: ImagesCache
    bad: dict[str, str] = field(default_factory=dict)
    n_bad: int = 0


def train_partition(
    batches: Iterator[pa.RecordBatch], parts: Callable[[], NetworkParts], task: WorkerTask
) -> Iterator[pa.RecordBatch]:
    """Train on the images of one partition until the server stops the training.

    Args:
        batches: columns image_id, label, validation, source and content; null if the image is in the file `source`.

    Raises:
        ServiceError: the server dropped this attempt, or is lost.
    """
    context = TaskContext.get()
    if context is None:
        raise ConfigurationError("a worker runs in a Spark task only")
    worker, attempt = context.partitionId(), context.taskAttemptId()
    channel = connect(task.address, task.token, task.sizes, task.options.timeout_s * 2)
    try:
        channel.send(PeerMessage(MessageKind.HELLO, worker, meta={"attempt": attempt}))
        network = TrainableNetwork(parts(), task.options, worker)
        read = _read(batches, network.input_size, task, _ProgressReporter(channel, worker))
        rows = _Learner(channel, worker, network, read, task).run()
    finally:
        channel.close()
    yield pa.RecordBatch.from_pydict({"worker": [worker], "rows": [rows]}, DONE)


class _ProgressReporter:
    """Sends the server a heartbeat at most every `REPORT_EVERY_S` seconds."""

    def __init__(self, channel: Channel, worker: int) -> None:
        self._channel = channel
        self._worker = worker
        self._reported = monotonic()

    def report(self, epoch: int, rows: int) -> None:
        if monotonic() - self._reported >= REPORT_EVERY_S:
            self._channel.send(PeerMessage(MessageKind.PROGRESS, self._worker, epoch=epoch, rows=rows))
            self._reported = monotonic()


def _read(
    batches: Iterator[pa.RecordBatch], size: tuple[int, int], task: WorkerTask, reporter: _ProgressReporter
) -> _WorkerImages:
    read = _WorkerImages(ImagesCache(size), ImagesCache(size))
    for batch in batches:
        for start in range(0, batch.num_rows, IMAGES_PER_READ):
            rows = batch.slice(start, IMAGES_PER_READ)
            found = zip(rows.column("source").to_pylist(), rows.column("content").to_pylist(), strict=True)
            contents = [
                read_if_possible(source) if content is None and source is not None else content
                for source, content in found
            ]
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
            reporter.report(0, len(read.training))
    read.training.close()
    read.validation.close()
    return read


class _Learner:
    """The epochs of one attempt."""

    def __init__(
        self, channel: Channel, worker: int, network: TrainableNetwork, read: _WorkerImages, task: WorkerTask
    ) -> None:
        self._channel = channel
        self._worker = worker
        self._network = network
        self._read = read
        self._options = task.options
        self._teller = _ProgressReporter(channel, worker)
        weights = task.options.class_weights or {}
        self._importance: Values = np.array([weights.get(name, 1.0) for name in task.classes], np.float32)
        self._augmentation = Augmentation(mirror=task.options.mirror)
        self._version = 0
        self._counts = Counts()

    def run(self) -> int:
        """Train until the server stops the training; return the number of training images."""
        network, n = self._network, self._network.n_weights
        cache = self._read.training
        meta = {"bad": self._read.bad, "n_bad": self._read.n_bad, "validation": len(self._read.validation)}
        start = self._request(
            PeerMessage(MessageKind.READY, self._worker, rows=len(cache), meta=meta), MessageKind.START
        )
        network.weights, network.optimizer = start.values[:n], start.values[n:]
        self._version = start.version
        own_steps = -(-len(cache) // self._options.local_batch)
        epoch, stop = start.epoch, bool(start.meta["stop"])
        network.learning_rate = float(start.meta["learning_rate"])
        while not stop:
            since = monotonic()
            self._counts = Counts()
            self._train_epoch(epoch, start.step if self._options.waits else own_steps)
            reply = self._request(self._epoch_message(epoch, monotonic() - since), MessageKind.NEXT)
            network.learning_rate, stop = float(reply.meta["learning_rate"]), bool(reply.meta["stop"])
            epoch += 1
        return len(cache)

    def _train_epoch(self, epoch: int, steps: int) -> None:
        """Train one epoch in an order determined by the seed, the worker and the epoch."""
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
            self._teller.report(epoch, min((step + 1) * size, len(order)))
        if waits and not each:
            self._average(epoch, steps, len(order))
        if before is not None:
            self._push(epoch, before, len(order))

    def _batch(self, epoch: int, rows: NDArray[np.int64]) -> tuple[Images, NDArray[np.int64], Values]:
        cache = self._read.training
        images, labels = cache.take(rows), cache.labels[rows]
        if self._options.augment:
            # Seeded by the image's id, so that the copy does not depend on the worker.
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
        """Take the step of a single process on the batches of all workers."""
        if len(rows):
            images, labels, importance = self._batch(epoch, rows)
            gradient, logits = self._network.gradient(images, labels, importance)
            self._counts += Counts.of(logits, labels)
        else:  # this worker has no more images and takes the others' step
            gradient = np.zeros(self._network.n_weights, np.float32)
        message = PeerMessage(MessageKind.REDUCE, self._worker, epoch, step, len(rows), values=gradient)
        self._network.apply(self._request(message, MessageKind.REDUCED).values)

    def _average(self, epoch: int, step: int, rows: int) -> None:
        network, n = self._network, self._network.n_weights
        own = np.concatenate([network.weights, network.optimizer])
        mean = self._request(
            PeerMessage(MessageKind.REDUCE, self._worker, epoch, step, rows, values=own), MessageKind.REDUCED
        ).values
        network.weights, network.optimizer = mean[:n], mean[n:]

    def _push(self, epoch: int, before: Values, rows: int) -> None:
        """Send the update of the weights to the server and receive its weights."""
        change = self._network.weights - before
        message = PeerMessage(MessageKind.PUSH, self._worker, epoch, rows=rows, version=self._version, values=change)
        reply = self._request(message, MessageKind.WEIGHTS)
        self._network.weights, self._version = reply.values, reply.version

    def _epoch_message(self, epoch: int, seconds: float) -> PeerMessage:
        network, cache = self._network, self._read.validation
        validation = Counts()
        for rows in cache.batches(IMAGES_PER_READ):
            validation += Counts.of(network.logits(cache.take(rows)), cache.labels[rows])
            self._teller.report(epoch, len(self._read.training))
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
            if self._worker:  # all workers have the same weights
                state = state[:0]
        return PeerMessage(
            MessageKind.EPOCH, self._worker, epoch, rows=len(self._read.training), meta=meta, values=state
        )

    def _request(self, message: PeerMessage, expected: MessageKind) -> PeerMessage:
        self._channel.send(message)
        while (reply := self._channel.receive()).kind is MessageKind.PROGRESS:
            pass  # the server is waiting for other workers
        if reply.kind is MessageKind.FAILED:
            raise ServiceError(str(reply.meta.get("why", "the server dropped this worker")))
        if reply.kind is not expected:
            raise LostPeerError(f"expected {expected.name}, the server sent {reply.kind.name}")
        return reply
