"""Small CNNs, declared layer by layer, for training from scratch.

Importing this module does not import TensorFlow: only `build` needs Keras.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

# The luma of ITU-R BT.601, as in Pillow's `convert("L")`, which rounds it.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution with a ReLU. `same` padding preserves the sides; `valid` reduces them by kernel - 1."""

    filters: int
    kernel: int
    padding: str = "valid"


@dataclass(frozen=True, slots=True)
class Pool:
    """Max pooling over windows of size x size; a remainder at the right and bottom is dropped."""

    size: int = 2


@dataclass(frozen=True, slots=True)
class Average:
    """Global average pooling."""


@dataclass(frozen=True, slots=True)
class Flatten:
    """Flattens the map row by row."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A fully connected layer with a ReLU."""

    units: int


Layer = Conv | Pool | Average | Flatten | Dense


@dataclass(frozen=True, slots=True)
class SmallCnn:
    """A network from scaled RGB pixels to features.

    Attributes:
        name: the backbone's name.
        gray: convert to luma first, so that colours cannot distinguish classes.
        layers: the last one is dense; its units are the features.
        min_side: the smallest side of images; below it, a map would be empty.
    """

    name: str
    gray: bool
    layers: tuple[Layer, ...]
    min_side: int

    @property
    def n_features(self) -> int:
        """D, the units of the last layer."""
        last = self.layers[-1]
        if not isinstance(last, Dense):
            raise TypeError(f"the last layer of {self.name} should be dense, it is {last}")
        return last.units


GRAY = SmallCnn(
    name="cnn_gray",
    gray=True,
    layers=(Conv(8, 3), Pool(), Conv(16, 5), Pool(), Flatten(), Dense(32), Dense(16)),
    min_side=14,
)
COLOR = SmallCnn(
    name="cnn_color",
    gray=False,
    layers=(
        Conv(32, 3, "same"),
        Pool(),
        Conv(64, 3, "same"),
        Pool(),
        Conv(128, 3, "same"),
        Average(),
        Dense(128),
    ),
    min_side=8,
)


def build(architecture: SmallCnn, input_size: tuple[int, int]) -> "keras.Model":
    """Build the network: float32 (N, H, W, 3), RGB in 0..1, to float32 features (N, 1, 1, D), a map of one pixel.

    Its weights are Keras' random initial ones.
    """
    import keras

    inputs = keras.Input((*input_size, 3), name="scaled_pixels")
    x = _luma(inputs) if architecture.gray else inputs
    for number, layer in enumerate(architecture.layers, start=1):
        x = _add(layer, x, number)
    features = keras.layers.Reshape((1, 1, architecture.n_features), name="feature_map")(x)
    return keras.Model(inputs, features, name=architecture.name)


def _luma(pixels: Any) -> Any:
    """(N, H, W, 3) → (N, H, W, 1)."""
    # Channel by channel, which on a CPU takes a quarter of the time of a sum over the short last axis.
    red, green, blue = (pixels[..., at : at + 1] * share for at, share in enumerate(LUMA))
    return red + green + blue


def _add(layer: Layer, x: Any, number: int) -> Any:
    from keras import layers

    match layer:
        case Conv(filters, kernel, padding):
            return layers.Conv2D(filters, kernel, padding=padding, activation="relu", name=f"conv{number}")(x)
        case Pool(size):
            return layers.MaxPooling2D(size, name=f"pool{number}")(x)
        case Average():
            return layers.GlobalAveragePooling2D(name=f"average{number}")(x)
        case Flatten():
            return layers.Flatten(name=f"flatten{number}")(x)
        case Dense(units):
            return layers.Dense(units, activation="relu", name=f"dense{number}")(x)
