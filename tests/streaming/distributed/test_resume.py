"""Resumed training equals uninterrupted training bit for bit: weights, learning rate and patience."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pyspark.sql import DataFrame

from models.arrays import read_npz, write_npz
from streaming.distributed.callback_state import STATE_ATTRIBUTES, callback_states, restore_callbacks
from streaming.distributed.checkpoint import FILE, Checkpoint, read_checkpoint
from streaming.distributed.history import History
from streaming.distributed.options import Frequency, TrainerOptions
from streaming.distributed.trainer import DistributedTrainer, Trained
from streaming.distributed.training_run import State
from streaming.errors import ServiceError

if TYPE_CHECKING:
    import keras

SIDE = 8
OPTIONS = TrainerOptions(workers=2, batch_size=64, epochs=7, learning_rate=2e-3, seed=7, frequency=Frequency.EPOCH)


def network() -> "keras.Model":
    """A linear model from pixels to one logit, with 193 weights."""
    import keras

    keras.utils.set_random_seed(7)
    inputs = keras.Input((SIDE, SIDE, 3), dtype="uint8")
    scaled = keras.layers.Rescaling(1 / 255)(inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(scaled)))


def plateau_and_patience() -> "list[keras.callbacks.Callback]":
    """Callbacks that never see an improvement: the rate is halved after two epochs, the training ends after five."""
    import keras

    unreachable = 1e9  # as the minimum improvement
    return [
        keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=2, min_delta=unreachable),
        keras.callbacks.EarlyStopping(patience=5, restore_best_weights=True, min_delta=unreachable),
    ]


def scheduler() -> "keras.callbacks.Callback":
    import keras

    return keras.callbacks.LearningRateScheduler(lambda _: 0.1)


def train(rows: DataFrame, directory: Path, epochs: int, *, resume: bool = False) -> Trained:
    trainer = DistributedTrainer(
        network(), replace(OPTIONS, epochs=epochs), callbacks=plateau_and_patience(), checkpoint_dir=directory
    )
    return trainer.fit(rows, resume=resume)


def weights(trained: Trained) -> list[np.ndarray]:
    return list(trained.model.get_weights())


@pytest.mark.usefixtures("workers_with_tensorflow")
def test_resumed_training_is_identical_to_an_uninterrupted_one(rows: DataFrame, tmp_path: Path) -> None:
    """Interrupted twice: between two reductions of the rate, and after early stopping."""
    whole = train(rows, tmp_path / "whole", 9)
    assert [one.learning_rate for one in whole.history.epochs] == pytest.approx([2e-3] * 3 + [1e-3] * 2 + [5e-4])
    assert whole.history.stopped_early
    train(rows, tmp_path / "parts", 4)
    resumed = train(rows, tmp_path / "parts", 9, resume=True)
    for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # those of the first epoch, the best one
    for name in ("learning_rate", "epoch"):
        ours, theirs = ([getattr(one, name) for one in each.history.epochs] for each in (resumed, whole))
        assert ours == theirs
    again = train(rows, tmp_path / "parts", 9, resume=True)
    assert len(again.history.epochs) == 6
    np.testing.assert_array_equal(weights(again)[0], weights(whole)[0])
    ours, theirs = (read_checkpoint(tmp_path / name) for name in ("parts", "whole"))
    np.testing.assert_array_equal(ours.state.weights, theirs.state.weights)
    np.testing.assert_array_equal(ours.state.optimizer, theirs.state.optimizer)


def callbacks_after(losses: list[float]) -> "list[keras.callbacks.Callback]":
    """Callbacks with a separate model, after epochs with these losses."""
    model = network()
    model.compile("sgd")
    callbacks = plateau_and_patience()
    for one in callbacks:
        one.set_model(model)
        one.on_train_begin()
        for epoch, loss in enumerate(losses):
            one.on_epoch_end(epoch, {"val_loss": loss})
    return callbacks


def checkpoint(callbacks: "list[keras.callbacks.Callback]") -> Checkpoint:
    state = State(np.arange(3, dtype=np.float32), np.zeros(2, np.float32), 3)
    history = History.begin(OPTIONS, 3)
    return Checkpoint(state, history, {"seed": 7}, 0.5, callback_states(callbacks))


def test_callback_state_round_trips_through_the_checkpoint(tmp_path: Path) -> None:
    before = callbacks_after([0.5, 0.7, 0.6])
    checkpoint(before).write(tmp_path)
    found = read_checkpoint(tmp_path)
    assert found.learning_rate == 0.5
    after = callbacks_after([])
    restore_callbacks(after, found.callbacks)
    for ours, theirs in zip(after, before, strict=True):
        for name in STATE_ATTRIBUTES[type(ours).__name__]:
            np.testing.assert_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


def test_callbacks_without_an_epoch_round_trip_through_the_checkpoint(tmp_path: Path) -> None:
    checkpoint(callbacks_after([])).write(tmp_path)
    restore_callbacks(after := callbacks_after([]), read_checkpoint(tmp_path).callbacks)
    assert after[1].best_weights is None


def test_changed_callbacks_are_not_resumed(tmp_path: Path) -> None:
    checkpoint(callbacks_after([0.5])).write(tmp_path)
    found = read_checkpoint(tmp_path)
    with pytest.raises(ServiceError, match="expected none: give the same --schedule and --patience"):
        restore_callbacks([scheduler()], found.callbacks)
    with pytest.raises(ServiceError, match="has the state of the callbacks ReduceLROnPlateau, EarlyStopping"):
        restore_callbacks(callbacks_after([])[:1], found.callbacks)


def to_older_format(directory: Path) -> None:
    """Rewrite the checkpoint in the format of an earlier version."""
    arrays = read_npz((directory / FILE).read_bytes(), FILE)
    record = json.loads(arrays["record"].tobytes())
    del record["callbacks"], record["learning_rate"]
    kept = {"weights": arrays["weights"], "optimizer": arrays["optimizer"]}
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    (directory / FILE).write_bytes(write_npz(kept | {"record": text}))


def test_older_checkpoint_resumes_if_no_callback_needs_a_state(tmp_path: Path) -> None:
    checkpoint(callbacks_after([0.5])).write(tmp_path)
    to_older_format(tmp_path)
    found = read_checkpoint(tmp_path)
    assert (found.learning_rate, found.callbacks) == (None, None)
    restore_callbacks([scheduler()], found.callbacks)
    with pytest.raises(
        ServiceError, match="does not contain the state of ReduceLROnPlateau, EarlyStopping: train again"
    ):
        restore_callbacks(callbacks_after([]), found.callbacks)


@pytest.mark.parametrize("invalid", [{"wait": "three"}, {"best_weights": [np.zeros(2)]}, {"best": [0.5]}])
def test_damaged_callback_state_is_rejected(invalid: dict[str, object]) -> None:
    states = callback_states(callbacks_after([0.5]))
    states[1] |= invalid
    with pytest.raises(ServiceError, match=f"state of EarlyStopping is damaged .{next(iter(invalid))}"):
        restore_callbacks(callbacks_after([]), states)
