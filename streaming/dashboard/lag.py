"""The stream's lag, measured in the background so that a page never waits for a broker."""

import threading
from dataclasses import dataclass

from streaming.errors import ServiceError
from streaming.pipeline.offsets import TopicOffsets, lags
from streaming.pipeline.positions import committed_ends, name_in_kafka
from streaming.platform.broker import bootstrap_servers
from streaming.platform.kafka_security import client_arguments
from streaming.settings import Settings

PROBE_EVERY_S = 3.0


@dataclass(frozen=True)
class Lag:
    """The last measured lag.

    Attributes:
        messages: number of messages without a row; None if unknown.
        trouble: why it is unknown.
    """

    messages: int | None = None
    trouble: str | None = None


class LagProbe:
    """Measures the lag periodically; started by `read` and paused after IDLE_S seconds without a call."""

    IDLE_S = 30.0

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._answered = threading.Event()
        self._thread: threading.Thread | None = None
        self._lag = Lag()

    def read(self, wait_s: float = 1.0) -> Lag:
        """Return the last measured lag; wait up to `wait_s` seconds for the first one."""
        with self._lock:
            self._wanted.set()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="lag", daemon=True)
                self._thread.start()
        self._answered.wait(wait_s)
        return self._lag

    def _run(self) -> None:
        offsets: TopicOffsets | None = None
        pause = threading.Event()
        try:
            while self._wanted.wait(self.IDLE_S):
                self._wanted.clear()
                if offsets is None:
                    offsets = self._connect()
                if offsets is not None:
                    self._lag = self._measure(offsets)
                    if self._lag.messages is None:  # the broker may restart at another address
                        offsets.close()
                        offsets = None
                self._answered.set()
                pause.wait(PROBE_EVERY_S)
        finally:
            if offsets is not None:
                offsets.close()

    def _connect(self) -> TopicOffsets | None:
        try:
            servers, client = bootstrap_servers(self._settings), client_arguments(self._settings)
            topics = [name_in_kafka(one) for one in committed_ends(self._settings)]
            return TopicOffsets(servers, topics, client, self._settings.isolation)
        except ServiceError as error:
            self._lag = Lag(trouble=str(error))
            return None

    def _measure(self, offsets: TopicOffsets) -> Lag:
        try:
            places = committed_ends(self._settings)
        except ServiceError as error:
            return Lag(trouble=str(error))
        known = offsets.read()
        if known is None:
            return Lag(trouble=offsets.refused or "the broker does not answer")
        committed = {place: end for ends in places.values() for place, end in ends.items()}
        return Lag(sum(one.lag or 0 for one in lags(committed, known)))
