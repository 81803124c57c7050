"""CNNs to train: a backbone of the table with a new head, from raw pixels to logits, as one Keras network.

What was trained comes apart again into what the rest of the package knows: a backbone (its weights file, which
`models.backbone.export_backbone` takes) and a logistic regression on the backbone's features. So a trained CNN is
exported, checked, bundled, served and retrained as every other model is.

Importing this module imports no TensorFlow.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.architectures import Size, find_backbone
from models.backbone import build
from models.classifier import LogisticRegression
from models.errors import ModelError

if TYPE_CHECKING:
    import keras

HEAD = "head"
ALL_BLOCKS = -1
_MAX_CLASSES = 1_000_000


def build_network(
    name: str,
    n_classes: int,
    *,
    weights: str = "random",
    input_size: Size | None = None,
    seed: int = 42,
    unfreeze: int = 0,
) -> "keras.Model":
    """Build backbone `name` with a new head: uint8 (N, H, W, 3) RGB pixels to float32 logits.

    The logits are (N, 1) for two classes, log p/(1 - p) of the second one, and (N, C) for more, whose softmax the
    probabilities are. The same seed gives the same initial weights, bit for bit: He-normal kernels where `weights` is
    `random`, Glorot-uniform ones in the head, and biases of 0. A network without ImageNet weights (`cnn_gray`,
    `cnn_color`) is trained whole; of another one only the head and the last `unfreeze` blocks. Normalisations keep
    their statistics, scales and offsets, so nothing changes but by gradients.

    Args:
        weights: of the backbone; see `models.backbone.build`.
        unfreeze: a block is all layers whose maps have the same height and width; `ALL_BLOCKS` for every one of them.

    Raises:
        ModelError: unknown backbone, fewer than two classes, weights that do not fit, more blocks than there are.
    """
    import keras

    if not 2 <= n_classes <= _MAX_CLASSES:  # noqa: PLR2004
        raise ModelError(f"a classifier has from 2 to {_MAX_CLASSES:,} classes, got {n_classes}")
    spec = find_backbone(name, input_size=input_size)
    backbone = build(name, weights, output=spec.output, input_size=spec.input_size, seed=seed)
    _freeze(body_of(backbone), name, ALL_BLOCKS if spec.imagenet_identity is None else unfreeze)
    head = keras.layers.Dense(
        1 if n_classes == 2 else n_classes,  # noqa: PLR2004
        kernel_initializer=keras.initializers.GlorotUniform(seed),
        dtype="float32",  # also where the rest computes in fewer bits
        name=HEAD,
    )
    return keras.Model(backbone.input, head(backbone.output), name=f"{name}_network")


def body_of(network: "keras.Model") -> "keras.Model":
    """The part of a network, or of a backbone, that its weights file holds: between preprocessing and features."""
    import keras

    bodies = [layer for layer in network.layers if isinstance(layer, keras.Model)]
    if len(bodies) != 1:
        raise ModelError(f"expected a network of models.cnn.build_network, got {network.name} of {len(bodies)} bodies")
    return bodies[0]


def save_body(network: "keras.Model", path: Path) -> None:
    """Write the backbone's weights into `path`, a `.weights.h5` that `export_backbone` takes as `weights`.

    Raises:
        ModelError: another suffix, or weights that are no longer finite: the training has diverged.
    """
    if not path.name.endswith(".weights.h5"):
        raise ModelError(f"the file of a body's weights ends in .weights.h5, got {path.name!r}")
    body = body_of(network)
    _check_finite(body)
    body.save_weights(path)


def head_of(network: "keras.Model") -> LogisticRegression:
    """The head as a logistic regression on the backbone's features, whose softmax is the network's answer.

    A single logit z becomes the two logits 0 and z: their softmax is 1 - sigmoid(z) and sigmoid(z).

    Raises:
        ModelError: weights that are no longer finite: the training has diverged.
    """
    layer = network.get_layer(HEAD)
    _check_finite(layer)
    kernel, bias = (values.astype(np.float64) for values in layer.get_weights())
    coefficients = kernel.T
    if len(bias) == 1:
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
        bias = np.concatenate([np.zeros(1), bias])
    return LogisticRegression(np.ascontiguousarray(coefficients), bias)


def _freeze(body: "keras.Model", name: str, unfreeze: int) -> None:
    """Leave the last `unfreeze` blocks trainable, without their normalisations."""
    import keras

    weighted = [layer for layer in body.layers if layer.weights]
    areas = sorted({_area(layer) for layer in weighted})  # maps shrink on their way, so the last block comes first
    if not ALL_BLOCKS <= unfreeze <= len(areas):
        raise ModelError(
            f"{name} has {len(areas)} blocks at this size, so {ALL_BLOCKS} (all) to {len(areas)} can be unfrozen, "
            f"got {unfreeze}"
        )
    trained = set(areas if unfreeze == ALL_BLOCKS else areas[:unfreeze])
    for layer in weighted:
        # A normalisation that may be trained would also take the statistics of each batch.
        layer.trainable = _area(layer) in trained and not isinstance(layer, keras.layers.BatchNormalization)


def _area(layer: Any) -> int:
    """Pixels of the map that a layer gives; 1 for features without a place."""
    shape = layer.output.shape
    return int(np.prod(shape[1:-1]))


def _check_finite(layer: Any) -> None:
    if not all(np.isfinite(values).all() for values in layer.get_weights()):
        raise ModelError(f"weights of {layer.name} are NaN or infinite: the training has diverged; learn more slowly")
