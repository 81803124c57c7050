"""Importing this module registers every command; the commands import what they need only when they run."""

from streaming.cli import broker, demo, doctor, models, publish, query, setup, stream, train  # noqa: F401
