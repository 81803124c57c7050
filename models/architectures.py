"""The table of backbones: name, input, output and Keras builder of each.

Importing this module does not import TensorFlow: workers read the table, and only the builders need Keras.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

from models import efficientnet_lite0, small_cnn
from models.errors import ModelError
from models.small_cnn import SmallCnn

if TYPE_CHECKING:
    import keras

Size = tuple[int, int]  # (height, width)
Output = Literal["pooled", "flat"]
# Given None or "imagenet" and an input size, the network from preprocessed pixels to its last feature map.
BodyBuilder = Callable[[Literal["imagenet"] | None, Size], "keras.Model"]

DEFAULT_BACKBONE = "efficientnet_lite0"
MAX_INPUT_SIDE = 640  # at which flat features have about a million values


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pixel values p in 0..255 are scaled: p * scale + offset - the mean of the channel.

    Images are RGB; `channel_order` is the order that the network expects, and that of `channel_means`.
    """

    scale: float = 1.0
    offset: float = 0.0
    channel_order: Literal["rgb", "bgr"] = "rgb"
    channel_means: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """A row of the table, with the requested input size and output.

    Attributes:
        input_size: (height, width) of the images; by default the size that the ImageNet weights were trained at.
        channels: C of the last feature map (N, h, w, C).
        map_side: maps a side of the input to that side of the feature map.
        min_side, max_side: the smallest and the largest input side.
        imagenet_identity: changes whenever the weights called `imagenet` do; None if there are none.
        has_weights: False for a network that only scales pixels.
        output: `pooled` is the mean over the feature map, `flat` the whole map row by row.
        always_flat: whether `output` is always `flat`, because the mean of the map carries no information.
    """

    name: str
    input_size: Size
    channels: int
    map_side: Callable[[int], int]
    min_side: int
    preprocessing: Preprocessing
    build_map: BodyBuilder
    imagenet_identity: str | None = "keras.applications"
    has_weights: bool = True
    output: Output = "pooled"
    always_flat: bool = False
    max_side: int = MAX_INPUT_SIDE

    @property
    def n_features(self) -> int:
        """D, the number of features per image."""
        height, width = (self.map_side(side) for side in self.input_size)
        return self.channels if self.output == "pooled" else height * width * self.channels


def _keras_application(
    class_name: str, weights: Literal["imagenet"] | None, input_size: Size
) -> "keras.Model":  # Keras downloads, caches and verifies the weights
    import keras

    network: keras.Model = getattr(keras.applications, class_name)(
        input_shape=(*input_size, 3), include_top=False, weights=weights
    )
    return network


def _efficientnet_lite0(weights: Literal["imagenet"] | None, input_size: Size) -> "keras.Model":
    return efficientnet_lite0.build(weights=weights, input_size=input_size, pooled=False)


def _small_cnn(architecture: SmallCnn, _: Literal["imagenet"] | None, input_size: Size) -> "keras.Model":
    return small_cnn.build(architecture, input_size)


def _pixels(_: Literal["imagenet"] | None, input_size: Size) -> "keras.Model":
    import keras

    scaled = keras.Input((*input_size, 3), name="scaled_pixels")
    return keras.Model(scaled, keras.layers.Identity(name="identity")(scaled), name="pixel_map")


def _single(_: int) -> int:
    """The map is a single pixel for any input."""
    return 1


def _unchanged(side: int) -> int:
    return side


def _halved_five_times(side: int) -> int:
    """Strides of 2 that pad an odd side."""
    return -(-side // 32)


def _halved_five_times_unpadded(side: int) -> int:
    return side // 32


def _xception_side(side: int) -> int:
    """Two convolutions without padding, the first with stride 2; then four strides of 2 with padding."""
    return -(-((side - 1) // 2 - 2) // 16)


def _inception_v3_side(side: int) -> int:
    """3x3 windows without padding: stride, convolution, stride, convolution, three strides."""

    def stride(n: int) -> int:
        return (n - 1) // 2

    return stride(stride(stride(stride(stride(side) - 2) - 2)))


_TO_UNIT_INTERVAL = Preprocessing(scale=1 / 127.5, offset=-1.0)  # Keras' mode `tf`
_TO_ZERO_ONE = Preprocessing(scale=1 / 255)
_CENTRED_BGR = Preprocessing(channel_order="bgr", channel_means=(103.939, 116.779, 123.68))  # Keras' mode `caffe`

BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            name=DEFAULT_BACKBONE,
            input_size=efficientnet_lite0.INPUT_SIZE,
            channels=efficientnet_lite0.N_FEATURES,
            map_side=_halved_five_times,
            min_side=32,
            preprocessing=Preprocessing(scale=1 / 128, offset=-127 / 128),
            build_map=_efficientnet_lite0,
            imagenet_identity=efficientnet_lite0.WEIGHTS_SHA256,
        ),
        *(
            BackboneSpec(name, size, channels, map_side, min_side, scaling, partial(_keras_application, class_name))
            for name, class_name, size, channels, map_side, min_side, scaling in (
                ("mobilenet_v2", "MobileNetV2", (224, 224), 1280, _halved_five_times, 32, _TO_UNIT_INTERVAL),
                ("inception_v3", "InceptionV3", (299, 299), 2048, _inception_v3_side, 75, _TO_UNIT_INTERVAL),
                ("xception", "Xception", (299, 299), 2048, _xception_side, 71, _TO_UNIT_INTERVAL),
                ("resnet50", "ResNet50", (224, 224), 2048, _halved_five_times, 32, _CENTRED_BGR),
                ("vgg16", "VGG16", (224, 224), 512, _halved_five_times_unpadded, 32, _CENTRED_BGR),
                ("vgg19", "VGG19", (224, 224), 512, _halved_five_times_unpadded, 32, _CENTRED_BGR),
            )
        ),
        *(
            BackboneSpec(
                name=architecture.name,
                input_size=size,
                channels=architecture.n_features,
                map_side=_single,
                min_side=architecture.min_side,
                preprocessing=_TO_ZERO_ONE,
                build_map=partial(_small_cnn, architecture),
                imagenet_identity=None,
            )
            for architecture, size in ((small_cnn.GRAY, (128, 128)), (small_cnn.COLOR, (64, 64)))
        ),
        BackboneSpec(
            name="pixels",
            input_size=(32, 32),
            channels=3,
            map_side=_unchanged,
            min_side=1,
            preprocessing=_TO_ZERO_ONE,
            build_map=_pixels,
            imagenet_identity=None,
            has_weights=False,
            output="flat",
            always_flat=True,
            max_side=512,
        ),
    )
}


def find_backbone(name: str, output: Output = "pooled", input_size: Size | None = None) -> BackboneSpec:
    """Return the table's row for `name` with this output and input size.

    Args:
        name: the backbone.
        output: `pooled` or `flat`.
        input_size: (height, width); default: that of the row.

    Raises:
        ModelError: an unknown name or output, or an unsupported size.
    """
    if name not in BACKBONES:
        close = get_close_matches(name.lower().replace("-", "_"), BACKBONES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ModelError(f"unknown backbone {name!r}, known are {', '.join(BACKBONES)}{hint}")
    spec = BACKBONES[name]
    if output not in get_args(Output):
        raise ModelError(f"the output of a backbone is pooled or flat, got {output!r}")
    if spec.always_flat:
        output = "flat"
    if input_size is None:
        return replace(spec, output=output)
    if len(input_size) != 2 or not all(spec.min_side <= side <= spec.max_side for side in input_size):  # noqa: PLR2004
        raise ModelError(
            f"{name} takes images of (height, width) from {spec.min_side} to {spec.max_side}, got {input_size}"
        )
    height, width = input_size
    return replace(spec, output=output, input_size=(int(height), int(width)))
