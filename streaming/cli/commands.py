"""Importing this module registers every command; the commands import what they need only when they run."""

from streaming.cli import (  # noqa: F401
    audit,
    broker,
    config,
    demo,
    doctor,
    features,
    label,
    maintain,
    models,
    publish,
    query,
    replay,
    report,
    rescore,
    setup,
    status,
    stream,
    train,
    train_cnn,
    tune,
)
