"""What the pages of a dashboard share: Streamlit runs the script anew for every click, in the server's own process."""

from collections.abc import Callable
from dataclasses import dataclass

from producer.message import Delivery, Message
from streaming.dashboard.lag import LagProbe
from streaming.dashboard.pictures import Pictures
from streaming.dashboard.reader import Reader
from streaming.errors import ConfigurationError
from streaming.settings import Settings

Post = Callable[[Message], Delivery]  # publishes to the settings' topic and waits; raises ServiceError


@dataclass(frozen=True)
class Dashboard:
    """The service that a dashboard shows, and whether it may change anything."""

    settings: Settings
    read_only: bool
    post: Post
    reader: Reader
    pictures: Pictures
    lag: LagProbe

    @classmethod
    def of(cls, settings: Settings, post: Post, *, read_only: bool = False) -> "Dashboard":
        return cls(settings, read_only, post, Reader(settings.place), Pictures(settings), LagProbe(settings))


_served: list[Dashboard] = []


def serve(dashboard: Dashboard) -> None:
    """Make this the dashboard of the process; called once, before the server starts."""
    _served[:] = [dashboard]


def served() -> Dashboard:
    """The dashboard of the process.

    Raises:
        ServiceError: there is none; the script was started by something else than `imagestream dashboard`.
    """
    if not _served:
        raise ConfigurationError("this page is served by `imagestream dashboard`, start it with that")
    return _served[0]
