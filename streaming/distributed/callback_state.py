"""The state of Keras callbacks between epochs, which is required to resume a training.

Keras saves the state of the model and the optimizer only, and resets callbacks in `on_train_begin`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streaming.errors import ConfigurationError, DamagedError

if TYPE_CHECKING:
    import keras

# Class → attributes that change during a training. Other callbacks, such as `LearningRateScheduler`, depend on the
# epoch only, or are reset when the training is resumed.
STATE_ATTRIBUTES = {
    "EarlyStopping": ("best", "wait", "stopped_epoch", "best_epoch", "best_weights"),
    "ReduceLROnPlateau": ("best", "wait", "cooldown_counter"),
}
CallbackState = dict[str, Any]


def callback_states(callbacks: Sequence["keras.callbacks.Callback"]) -> list[CallbackState]:
    """Return the state of each stateful callback: numbers, None, or lists of arrays."""
    return [
        {"kind": type(one).__name__}
        | {name: _plain(getattr(one, name)) for name in STATE_ATTRIBUTES[type(one).__name__]}
        for one in callbacks
        if type(one).__name__ in STATE_ATTRIBUTES
    ]


def restore_callbacks(callbacks: Sequence["keras.callbacks.Callback"], states: Sequence[CallbackState] | None) -> None:
    """Restore the states of callbacks after their `on_train_begin`.

    Args:
        states: the result of `callback_states`; None for a checkpoint of an earlier release.

    Raises:
        ServiceError: the states do not match the callbacks.
    """
    stateful = [one for one in callbacks if type(one).__name__ in STATE_ATTRIBUTES]
    kinds = [type(one).__name__ for one in stateful]
    if states is None:
        if kinds:
            raise ConfigurationError(
                f"the checkpoint of an earlier release does not contain the state of {', '.join(kinds)}: train again "
                "without --resume, or resume without --patience and --schedule plateau"
            )
        return
    found = [str(state.get("kind")) for state in states]
    if found != kinds:
        raise ConfigurationError(
            f"the checkpoint has the state of the callbacks {', '.join(found) or 'none'}, expected "
            f"{', '.join(kinds) or 'none'}: give the same --schedule and --patience, or train again without --resume"
        )
    for callback, state in zip(stateful, states, strict=True):
        for name in STATE_ATTRIBUTES[type(callback).__name__]:
            setattr(callback, name, _checked(callback, name, state))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, list):
        return value
    return value if isinstance(value, int) else float(value)


def _checked(callback: "keras.callbacks.Callback", name: str, state: CallbackState) -> Any:
    """Return a value of a state after validating it, since it comes from a file."""
    value = state.get(name)
    if name != "best_weights":
        sound = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    else:
        shapes = [one.shape for one in callback.model.get_weights()]
        sound = value is None or [np.shape(one) for one in value] == shapes
    if name not in state or not sound:
        raise DamagedError(
            f"the checkpoint's state of {state['kind']} is damaged ({name}): train again without --resume"
        )
    return value
