"""What tests share: the jars of the checkout, and one real broker for the session."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.broker import start_broker, stop_broker
from streaming.jars import install_jars
from streaming.java import find_java
from streaming.kafka_node import free_port
from streaming.settings import Settings

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def jars_dir() -> Path:
    """The checkout's own jars, fetched if they are not there yet."""
    home = CHECKOUT / ".imagestream"
    install_jars(home / "jars", find_java(home))
    return home / "jars"


@pytest.fixture(scope="session")
def broker(jars_dir: Path) -> Iterator[Settings]:
    """Settings with a home of their own and the address of a real broker there, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="imagestream-") as directory:
        home = Path(directory)
        if (CHECKOUT / ".imagestream" / "java").is_dir():  # the Java that `make` installed where there was none
            (home / "java").symlink_to(CHECKOUT / ".imagestream" / "java")
        settings = Settings(home=home, jars=jars_dir, bootstrap_servers=None)
        state, _ = start_broker(settings, free_port())
        try:
            yield settings.model_copy(update={"bootstrap_servers": state.address})
        finally:
            stop_broker(settings)
