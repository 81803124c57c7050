"""CNNs for training: a backbone with a new head, from raw pixels to logits, as one Keras network.

A trained network is split again into a backbone (a weights file for `models.backbone.export_backbone`) and a logistic
regression on its features, so that it is exported, checked, bundled, served and retrained as any other model.

Importing this module does not import TensorFlow.
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

    The logits are (N, 1) for two classes, log p/(1 - p) of the second, and (N, C) for more. Initial weights are
    deterministic: He-normal kernels if `weights` is `random`, Glorot-uniform ones in the head, zero biases. Networks
    without ImageNet weights (`cnn_gray`, `cnn_color`) are trained entirely, others only in the head and the last
    `unfreeze` blocks. Batch normalisation layers stay frozen.

    Args:
        name: the backbone.
        weights: of the backbone; see `models.backbone.build`.
        input_size: (height, width); default: that of the table.
        seed: of the initial weights.
        unfreeze: the number of blocks to train, or `ALL_BLOCKS`; a block is all layers with maps of one size.

    Raises:
        ModelError: an unknown backbone, fewer than two classes, weights that do not fit, or too many blocks.
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
        dtype="float32",  # also with mixed precision
        name=HEAD,
    )
    return keras.Model(backbone.input, head(backbone.output), name=f"{name}_network")


def body_of(network: "keras.Model") -> "keras.Model":
    """The part of a network or backbone between preprocessing and features, to which its weights file applies."""
    import keras

    bodies = [layer for layer in network.layers if isinstance(layer, keras.Model)]
    if len(bodies) != 1:
        raise ModelError(f"expected a network of models.cnn.build_network, got {network.name} of {len(bodies)} bodies")
    return bodies[0]


def save_body(network: "keras.Model", path: Path) -> None:
    """Write the backbone's weights into `path`, a `.weights.h5` for `export_backbone`.

    Raises:
        ModelError: another suffix, or weights that are not finite because training diverged.
    """
    if not path.name.endswith(".weights.h5"):
        raise ModelError(f"expected a weights file that ends in .weights.h5, got {path.name!r}")
    body = body_of(network)
    _check_finite(body)
    body.save_weights(path)


def head_of(network: "keras.Model") -> LogisticRegression:
    """The head as a logistic regression on the backbone's features.

    A single logit z becomes the two logits 0 and z, whose softmax is 1 - sigmoid(z) and sigmoid(z).

    Raises:
        ModelError: weights that are not finite because training diverged.
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
    """Freeze all but the last `unfreeze` blocks, and all normalisations."""
    import keras

    weighted = [layer for layer in body.layers if layer.weights]
    areas = sorted({_area(layer) for layer in weighted})  # maps shrink from block to block: the last comes first
    if not ALL_BLOCKS <= unfreeze <= len(areas):
        raise ModelError(
            f"{name} has {len(areas)} blocks at this size, so {ALL_BLOCKS} (all) to {len(areas)} can be unfrozen, "
            f"got {unfreeze}"
        )
    trained = set(areas if unfreeze == ALL_BLOCKS else areas[:unfreeze])
    for layer in weighted:
        # A trainable batch normalisation would also use the statistics of each batch.
        layer.trainable = _area(layer) in trained and not isinstance(layer, keras.layers.BatchNormalization)


def _area(layer: Any) -> int:
    """Pixels of a layer's output map; 1 for pooled features."""
    shape = layer.output.shape
    return int(np.prod(shape[1:-1]))


def _check_finite(layer: Any) -> None:
    if not all(np.isfinite(values).all() for values in layer.get_weights()):
        raise ModelError(f"weights of {layer.name} are NaN or infinite: training diverged; lower the learning rate")
