"""What Keras' callbacks remember from one epoch to the next, which a resumed training needs as much as the weights.

Keras itself saves the state of the model and the optimizer only, and every callback starts again in `on_train_begin`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streaming.errors import ConfigurationError, DamagedError

if TYPE_CHECKING:
    import keras

# Class → its attributes that change during a training. A callback that is not named here, such as
# `LearningRateScheduler`, depends on the epoch alone, or starts again when the training is resumed.
REMEMBERED = {
    "EarlyStopping": ("best", "wait", "stopped_epoch", "best_epoch", "best_weights"),
    "ReduceLROnPlateau": ("best", "wait", "cooldown_counter"),
}
CallbackState = dict[str, Any]


def callback_states(callbacks: Sequence["keras.callbacks.Callback"]) -> list[CallbackState]:
    """What each of the callbacks that remember anything does: numbers, None, or a list of arrays."""
    return [
        {"kind": type(one).__name__} | {name: _plain(getattr(one, name)) for name in REMEMBERED[type(one).__name__]}
        for one in callbacks
        if type(one).__name__ in REMEMBERED
    ]


def restore_callbacks(callbacks: Sequence["keras.callbacks.Callback"], states: Sequence[CallbackState] | None) -> None:
    """Let callbacks, after their `on_train_begin`, continue from what `callback_states` gave.

    Args:
        states: None for a checkpoint of an earlier version, which has none.

    Raises:
        ServiceError: the states are of other callbacks, or there are none and some callback needs one.
    """
    remembering = [one for one in callbacks if type(one).__name__ in REMEMBERED]
    kinds = [type(one).__name__ for one in remembering]
    if states is None:
        if kinds:
            raise ConfigurationError(
                f"the checkpoint was written by an earlier version, without the state of {', '.join(kinds)}; train "
                "again without resuming, or resume without --patience and --schedule plateau"
            )
        return
    found = [str(state.get("kind")) for state in states]
    if found != kinds:
        raise ConfigurationError(
            f"the checkpoint is of a training with {', '.join(found) or 'no'} callbacks that keep a state, this has "
            f"{', '.join(kinds) or 'none'}: give the same --schedule and --patience, or train again without resuming"
        )
    for callback, state in zip(remembering, states, strict=True):
        for name in REMEMBERED[type(callback).__name__]:
            setattr(callback, name, _checked(callback, name, state))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, list):
        return value
    return value if isinstance(value, int) else float(value)


def _checked(callback: "keras.callbacks.Callback", name: str, state: CallbackState) -> Any:
    """One value of a state, which comes from a file."""
    value = state.get(name)
    if name != "best_weights":
        sound = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    else:
        shapes = [one.shape for one in callback.model.get_weights()]
        sound = value is None or [np.shape(one) for one in value] == shapes
    if name not in state or not sound:
        raise DamagedError(f"the checkpoint's state of {state['kind']} is damaged ({name}): train again")
    return value
