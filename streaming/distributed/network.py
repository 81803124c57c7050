"""A Keras network in a worker, with its weights and optimizer state as flat arrays.

This is the only module of a worker that imports TensorFlow, and only when a network is built.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.engine import without_native_log
from models.scorer import Images
from streaming.distributed.options import TrainerOptions
from streaming.distributed.protocol import Values

if TYPE_CHECKING:
    import keras

PREDICTION_BATCH = 64


@dataclass(frozen=True)
class NetworkParts:
    """The parts from which a worker builds the network: Keras's JSON of the layers, all weights, and the optimizer."""

    architecture: str  # JSON
    weights: Sequence[NDArray[Any]]
    optimizer: dict[str, Any]

    @classmethod
    def of(cls, model: "keras.Model", optimizer: "keras.Optimizer") -> "NetworkParts":
        import keras

        return cls(model.to_json(), model.get_weights(), keras.optimizers.serialize(optimizer))


def quiet_tensorflow() -> None:
    """Import TensorFlow without the log lines of its native code on standard error."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with without_native_log():  # log lines during the import ignore the log level
        import keras  # noqa: F401
        import tensorflow  # noqa: F401


def use_threads(threads: int) -> None:
    """Set TensorFlow's number of threads and deterministic operations in this process, before its first computation."""
    quiet_tensorflow()
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:  # a process reused by Spark, in which TensorFlow has already computed
        return
    tf.config.experimental.enable_op_determinism()


class TrainableNetwork:
    """A trainable network."""

    def __init__(self, parts: NetworkParts, options: TrainerOptions, worker: int = 0) -> None:
        use_threads(options.threads)
        import keras
        import tensorflow as tf

        keras.utils.set_random_seed(options.seed * 1_000_003 % 2**31 + worker)  # of layers such as dropout
        self.model: keras.Model = keras.models.model_from_json(parts.architecture)
        self.model.set_weights(list(parts.weights))
        if options.mixed_precision and tf.config.list_physical_devices("GPU"):
            compute_in_bfloat16(self.model)
        self._optimizer = keras.optimizers.deserialize(parts.optimizer)
        self._variables = self.model.trainable_variables
        self.n_weights = sum(int(np.prod(one.shape)) for one in self._variables)
        self._optimizer.build(self._variables)
        self._state = [one for one in self._optimizer.variables if one.name != "learning_rate"]
        self._binary = self.model.output_shape[-1] == 1
        spec = tf.TensorSpec
        shape = (None, *self.model.input_shape[1:])
        row = spec([None], tf.float32)
        inputs = [spec(shape, tf.uint8), spec([None], tf.int64), row]

        def compiled(python: Callable[..., Any], signature: list[Any]) -> Any:
            # No function branches on a tensor, so AutoGraph is not needed.
            return tf.function(python, input_signature=signature, autograph=False)

        self._gradient = compiled(self._compute_gradient, inputs)
        self._step = compiled(self._compute_step, inputs)
        self._apply = compiled(
            lambda gradient: self._optimizer.apply(_split(gradient, self._variables), self._variables), [row]
        )
        self._answer = compiled(lambda x: self.model(x, training=False), inputs[:1])

    @property
    def input_size(self) -> tuple[int, int]:
        _, height, width, _ = self.model.input_shape
        return height, width

    @property
    def weights(self) -> Values:
        """The trainable weights, (n_weights,) float32."""
        return _read(self._variables)

    @weights.setter
    def weights(self, values: Values) -> None:
        _write(self._variables, values)

    @property
    def optimizer(self) -> Values:
        """The optimizer's state, flattened to float32: its step counter and its variables of each weight."""
        return _read(self._state)

    @optimizer.setter
    def optimizer(self, values: Values) -> None:
        _write(self._state, values)

    @property
    def learning_rate(self) -> float:
        return float(self._optimizer.learning_rate)

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._optimizer.learning_rate = value

    def gradient(
        self, images: Images, labels: NDArray[np.int64], importance: Values
    ) -> tuple[Values, NDArray[np.float32]]:
        """Return the mean gradient over the images (n_weights,) and the logits before the step.

        Args:
            images: (N, H, W, 3) uint8.
            labels: class indices (N,).
            importance: weights of the images in the loss (N,).
        """
        gradient, logits = self._gradient(images, labels, importance)
        return gradient.numpy(), logits.numpy()

    def apply(self, gradient: Values) -> None:
        """Apply a gradient with the optimizer."""
        self._apply(gradient)

    def step(self, images: Images, labels: NDArray[np.int64], importance: Values) -> NDArray[np.float32]:
        """Compute and apply a gradient; return the logits. Arguments as for `gradient`."""
        logits: NDArray[np.float32] = self._step(images, labels, importance).numpy()
        return logits

    def logits(self, images: Images) -> NDArray[np.float32]:
        """Return the logits, (N, 1) or (N, C), of images (N, H, W, 3) uint8."""
        parts = [images[at : at + PREDICTION_BATCH] for at in range(0, len(images), PREDICTION_BATCH)]
        answers = [self._answer(part).numpy() for part in parts]
        return np.concatenate(answers) if answers else np.empty((0, self.model.output_shape[-1]), np.float32)

    def _compute_gradients(self, images: Any, labels: Any, importance: Any) -> tuple[list[Any], Any]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            logits = tf.cast(self.model(images, training=True), tf.float32)
            if self._binary:
                truth = tf.cast(labels, tf.float32)
                losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=truth, logits=logits[:, 0])
            else:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            loss = tf.reduce_mean(losses * importance)
        return tape.gradient(loss, self._variables, unconnected_gradients="zero"), logits

    def _compute_gradient(self, images: Any, labels: Any, importance: Any) -> tuple[Any, Any]:
        gradients, logits = self._compute_gradients(images, labels, importance)
        return _flat(gradients), logits

    def _compute_step(self, images: Any, labels: Any, importance: Any) -> Any:
        gradients, logits = self._compute_gradients(images, labels, importance)
        self._optimizer.apply(gradients, self._variables)
        return logits


def compute_in_bfloat16(model: "keras.Model") -> None:
    """Compute all layers except the head in bfloat16, which needs no loss scaling; weights stay float32."""
    import keras

    for layer in model.layers[:-1]:
        if isinstance(layer, keras.Model):
            for inner in layer.layers:
                inner.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
        else:
            layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")


def _flat(gradients: Sequence[Any]) -> Any:
    import tensorflow as tf

    if not gradients:
        return tf.zeros([0], tf.float32)
    return tf.concat([tf.reshape(tf.cast(tf.convert_to_tensor(one), tf.float32), [-1]) for one in gradients], 0)


def _split(row: Any, variables: Sequence[Any]) -> list[Any]:
    import tensorflow as tf

    parts = tf.split(row, [int(np.prod(one.shape)) for one in variables])
    return [tf.reshape(part, one.shape) for part, one in zip(parts, variables, strict=True)]


def _read(variables: Sequence[Any]) -> Values:
    """Flatten variables one by one; tracing a function for this would take longer than it saves."""
    parts = [np.ravel(one.numpy()).astype(np.float32, copy=False) for one in variables]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _write(variables: Sequence[Any], row: Values) -> None:
    at = 0
    for one in variables:
        size = int(np.prod(one.shape))
        part = row[at : at + size].reshape(one.shape)
        one.assign(np.rint(part) if "int" in str(one.dtype) else part)
        at += size
    if at != len(row):
        raise ValueError(f"expected {at} numbers, got {len(row)}")
