"""State shared by the pages of a dashboard: Streamlit runs the script on every interaction, in the server's process."""

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
    """The service that a dashboard shows, and whether it may be changed."""

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
    """Set the dashboard of this process; called once, before the server starts."""
    _served[:] = [dashboard]


def served() -> Dashboard:
    """Return the dashboard of this process.

    Raises:
        ServiceError: the script was not started by `imagestream dashboard`.
    """
    if not _served:
        raise ConfigurationError(
            "this script runs in the dashboard's server only: start it with `imagestream dashboard`"
        )
    return _served[0]
