"""A service under random operations in random order: every message has one row in the end."""

import shutil
import threading
from collections.abc import Callable
from random import Random

from models.errors import ModelError
from streaming.jobs.maintain import maintain
from streaming.platform.broker import start_broker, stop_broker
from streaming.registry import CHALLENGER, open_registry
from streaming.settings import Settings
from tests.faults.harness import Sent, Stream, check_exactly_once, register_copy, scored, send
from tests.faults.poison import samples
from tests.forms import Form, Record

IMAGES_PER_BATCH = 15
MAX_PAUSE_S = 3.0


class Operator:
    """Operates one service at random, by the steps that are possible in its current state."""

    def __init__(self, settings: Settings, broker: Settings, rng: Random) -> None:
        self.sent: Sent = {}
        self._settings = settings
        self._broker = broker
        self._rng = rng
        self._registry = open_registry(settings.home)
        self._versions = [1, register_copy(settings)]
        self._stream: Stream | None = None

    def possible(self) -> list[Callable[[], None]]:
        """The steps that can be done now; more likely ones several times."""
        always = [self.publish, self.publish, self.promote, self.challenge, self.roll_back]
        broker = [self.restart_broker]
        if self._stream is None:
            return [*always, *broker, self.start, self.start, self.start, self.maintain, self.lose_stream]
        return [*always, *broker, self.kill, self.kill, self.stop, self.maintain]

    def step(self) -> str:
        one = self._rng.choice(self.possible())
        one()
        threading.Event().wait(self._rng.uniform(0, MAX_PAUSE_S))
        return one.__name__

    def publish(self) -> None:
        self.sent |= send(
            self._settings, samples(self._rng, good=self._rng.randint(5, 25), bad=self._rng.randint(0, 9))
        )

    def start(self) -> None:
        self._stream = Stream(self._settings, images_per_batch=IMAGES_PER_BATCH)
        if self._rng.random() < 0.7:  # otherwise, the next step is done while it starts
            before = scored(self._settings)
            done = len(self.sent) == before
            self._stream.wait_started() if done else self._stream.wait_for(lambda: scored(self._settings) > before)

    def kill(self) -> None:
        if self._stream is not None:
            self._stream.kill_now()
            self._ended()

    def stop(self) -> None:
        if self._stream is not None:
            self._stream.wait_started()
            self._stream.stop()
            self._ended()

    def promote(self) -> None:
        if self._rng.random() < 0.3:
            self._versions.append(register_copy(self._settings))
        self._registry.promote(self._rng.choice(self._versions), by="test", why="test")

    def challenge(self) -> None:
        self._registry.promote(self._rng.choice(self._versions), alias=CHALLENGER, by="test", why="test")

    def roll_back(self) -> None:
        try:
            self._registry.rollback(by="test")
        except ModelError as error:
            assert "no earlier version" in str(error)  # noqa: PT017  there may be none yet

    def restart_broker(self) -> None:
        stop_broker(self._broker)
        start_broker(self._broker)

    def maintain(self) -> None:
        if scored(self._settings):
            maintain(self._settings, retention_hours=0)

    def lose_stream(self) -> None:
        """The stream must continue from the tables only."""
        shutil.rmtree(self._settings.work_dir / "streams", ignore_errors=True)

    def finish(self) -> None:
        """Publish more messages and wait until the stream has scored all."""
        self.publish()
        if self._stream is None:
            self.start()
        assert self._stream is not None
        self._stream.wait_for(lambda: scored(self._settings) >= len(self.sent))
        self.stop()

    def close(self) -> None:
        if self._stream is not None and self._stream.running:
            self._stream.kill_now()

    def _ended(self) -> None:
        self._stream = None


def test_randomly_operated_service_has_one_row_per_message(
    fragile_service: Settings, fragile_broker: Settings, rng: Random, form: Form[int], record: Record
) -> None:
    operator = Operator(fragile_service, fragile_broker, rng)
    steps = form(200, 15)
    try:
        operator.publish()
        for number in range(steps):
            print(f"{number}: {operator.step()}", flush=True)
        operator.finish()
    finally:
        operator.close()
    check_exactly_once(fragile_service, operator.sent)
    record("random operation: steps, audit", f"{steps}, clean", f"{steps}, clean ({len(operator.sent):,} messages)")
