"""Preprocessing recipes: from an encoded image to the input tensor of an imported network.

    decode → rotate upright → resize and crop → channels → scale and normalise → layout and type

The first three steps yield pixels (`Recipe.pixels`), the others the tensor (`Recipe.tensor`). A recipe is part of the
manifest of an imported model; its version defines the meaning of its fields. The presets follow published ones:
torchvision's `ImageClassification` transform, `keras.applications.imagenet_utils.preprocess_input` after
`keras.utils.load_img`, and TensorFlow Hub's common signatures for images.
"""

from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.decode import DEFAULT_LIMITS, BadImage, Limits, Picture, Resize, decode_full_size, decode_marked
from models.errors import ModelError

MAX_SIDE = 2048  # of the input of a network
RGB_CHANNELS = 3

Fit = Literal["stretch", "crop", "resize_crop"]
Filter = Literal["nearest", "bilinear", "bicubic", "lanczos", "bilinear_sampled", "bicubic_sampled"]
Channels = Literal["rgb", "bgr", "gray"]
Layout = Literal["nhwc", "nchw"]
Dtype = Literal["float32", "float16", "uint8", "int8"]
Pixels = NDArray[Any]  # uint8, or float32 if the filter does not round
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]

_PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SAMPLED_TAPS = {"bilinear_sampled": 2, "bicubic_sampled": 4}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Recipe(BaseModel):
    """How an image is converted to the input tensor of a network.

    Attributes:
        version: defines the meaning of the fields.
        input_size: (height, width) of the tensor.
        fit: `stretch` resizes the whole image to the input size; `crop` a centred window of the input's aspect ratio,
            with sides of `crop_share` times the largest one; `resize_crop` resizes the image so that its shorter side
            has `shorter_side` pixels, and crops the input size from its centre.
        shorter_side: in pixels, for `resize_crop` only.
        crop_share: for `crop`.
        filter: `nearest`, `bilinear`, `bicubic` and `lanczos` are Pillow's, which average over all pixels that an
            output pixel covers and round to integers; the `_sampled` ones interpolate between the nearest 2 × 2 or
            4 × 4 pixels without rounding, as `tf.image.resize` does by default.
        channels: the order of channels; `gray` is ITU-R 601 luma, one channel.
        scale, mean, std: a pixel value p in 0..255 becomes (p · scale − mean) / std; one value, or one per channel in
            the order of `channels`.
        layout: nhwc or nchw.
        dtype: the type of the tensor; for integers, values are rounded and clipped to their range, unless the network
            defines its own scale and zero point.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    input_size: tuple[Side, Side]
    fit: Fit = "stretch"
    shorter_side: Side | None = None
    crop_share: float = Field(1.0, gt=0, le=1)
    filter: Filter = "bilinear"
    channels: Channels = "rgb"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Layout = "nhwc"
    dtype: Dtype = "float32"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.fit == "resize_crop") != (self.shorter_side is not None):
            raise ValueError("shorter_side is required with the fit resize_crop, and only allowed with it")
        if self.shorter_side is not None and self.shorter_side < max(self.input_size):
            raise ValueError(f"a shorter side of {self.shorter_side} is less than the crop of {self.input_size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {1, self.n_channels}:
                raise ValueError(f"{name}: expected one value or {self.n_channels}, got {len(values)}")
        if not all(self.std) or not self.scale:
            raise ValueError("scale and std must not be 0")
        return self

    @property
    def n_channels(self) -> int:
        return 1 if self.channels == "gray" else RGB_CHANNELS

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the result of `pixels`."""
        return (*self.input_size, self.n_channels)

    @property
    def pixel_dtype(self) -> type[np.uint8 | np.float32]:
        """The type of the result of `pixels`: float32 for filters that do not round."""
        return np.float32 if self.filter in _SAMPLED_TAPS else np.uint8

    def pixels(self, data: bytes | None, limits: Limits = DEFAULT_LIMITS) -> Pixels | BadImage:
        """Decode, rotate upright, resize and crop: encoded bytes to `pixel_shape`, values 0..255."""
        found = self.picture(data, limits)
        return found if isinstance(found, BadImage) else found.pixels

    def picture(self, data: bytes | None, limits: Limits = DEFAULT_LIMITS) -> Picture | BadImage:
        """As `pixels`, with the damage of an image that was decoded despite it."""
        found = decode_full_size(data, limits)
        return found if isinstance(found, BadImage) else found._replace(pixels=self.fitted(found.pixels))

    def fitted(self, picture: NDArray[np.uint8]) -> Pixels:
        """An upright RGB image (H, W, 3) uint8 of any size → `pixel_shape`."""
        image: NDArray[np.uint8] = picture
        if self.channels == "gray":
            image = np.asarray(Image.fromarray(picture).convert("L"))[..., np.newaxis]
        elif self.channels == "bgr":
            image = picture[..., ::-1]
        box = self._window(*picture.shape[:2])
        if self.filter in _SAMPLED_TAPS:
            return _sampled(image, box, self.input_size, _SAMPLED_TAPS[self.filter])
        height, width = self.input_size
        pillow = Image.fromarray(np.ascontiguousarray(image[..., 0] if self.n_channels == 1 else image))
        # Pillow's filter also reads pixels around the box, so this equals a crop of the resized image.
        resized = np.asarray(pillow.resize((width, height), _PILLOW[self.filter], box=box))
        return resized[..., np.newaxis] if self.n_channels == 1 else resized

    def tensor(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """(N, *pixel_shape) → (N, H, W, C) or, by the layout, (N, C, H, W) of `dtype`."""
        if pixels.shape[1:] != self.pixel_shape:
            raise ModelError(
                f"expected images of shape (N, {', '.join(map(str, self.pixel_shape))}), got {pixels.shape}"
            )
        if self._passes_pixels and pixels.dtype == np.uint8:
            values: NDArray[Any] = pixels
        else:
            # One multiplication and one addition in float64: in float32, the result equals that of the framework in any
            # order of its steps.
            factor = self.scale / np.asarray(self.std)
            shift = -np.asarray(self.mean) / np.asarray(self.std)
            values = (pixels * factor + shift).astype(np.float32)
            if self.dtype in {"uint8", "int8"}:
                limits = np.iinfo(self.dtype)
                values = np.clip(np.rint(values), limits.min, limits.max).astype(self.dtype)
        if self.layout == "nchw":
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values, self.dtype)

    @property
    def _passes_pixels(self) -> bool:
        """Whether the network takes pixel values as they are."""
        return self.dtype == "uint8" and self.scale == 1 and not any(self.mean) and set(self.std) == {1.0}

    def _window(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of a picture that is resized to the input size: (left, top, right, bottom) in its pixels."""
        if self.fit == "stretch":
            return 0, 0, width, height
        want_height, want_width = self.input_size
        if self.shorter_side is None:
            scale = min(width / want_width, height / want_height) * self.crop_share
            box_width, box_height = max(1, round(want_width * scale)), max(1, round(want_height * scale))
            left, top = (width - box_width) // 2, (height - box_height) // 2
            return left, top, left + box_width, top + box_height
        # torchvision.transforms: Resize truncates the longer side, CenterCrop rounds half to even.
        short, long = sorted((height, width))
        longer = int(self.shorter_side * long / short)
        new_height, new_width = (self.shorter_side, longer) if height <= width else (longer, self.shorter_side)
        top, left = round((new_height - want_height) / 2), round((new_width - want_width) / 2)
        x, y = width / new_width, height / new_height
        return left * x, top * y, min(width, (left + want_width) * x), min(height, (top + want_height) * y)


def _sampled(
    image: NDArray[np.uint8], box: tuple[float, float, float, float], size: tuple[int, int], taps: int
) -> NDArray[np.float32]:
    """Interpolate between the nearest `taps` pixels in each direction, with half-pixel centres, without rounding."""
    left, top, right, bottom = box
    rows, row_weights = _taps(top, bottom, size[0], image.shape[0], taps)
    columns, column_weights = _taps(left, right, size[1], image.shape[1], taps)
    result = np.zeros((*size, image.shape[2]), np.float32)
    for i in range(taps):
        strip = image[rows[:, i]]
        line = sum(strip[:, columns[:, j]] * column_weights[:, j, np.newaxis] for j in range(taps))
        result += row_weights[:, i, np.newaxis, np.newaxis] * line
    return result


def _taps(start: float, end: float, n: int, limit: int, taps: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The input pixels of each of `n` output pixels and their weights, (n, taps) each.

    As TensorFlow's `ResizeBilinear` and `ResizeBicubic` with `half_pixel_centers`: bilinear repeats the border, bicubic
    (Keys 1981, a = -0.5) ignores pixels beyond it.
    """
    centres = start + (np.arange(n) + 0.5) * ((end - start) / n) - 0.5
    first = np.floor(centres).astype(np.int64) - (taps // 2 - 1)
    places = first[:, np.newaxis] + np.arange(taps)
    distance = np.abs(centres[:, np.newaxis] - places)
    if taps == 2:  # noqa: PLR2004
        weights = 1 - distance
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))  # noqa: PLR2004
        weights *= (places >= 0) & (places < limit)
        weights /= weights.sum(axis=1, keepdims=True)
    return np.clip(places, 0, limit - 1), weights.astype(np.float32)


def decode_fitted(
    data: bytes | None, size: tuple[int, int], fitting: Resize | Recipe, limits: Limits = DEFAULT_LIMITS
) -> Picture | BadImage:
    """Decode an image for a backbone, by a recipe or by `models.decode` at (height, width) = `size`."""
    return fitting.picture(data, limits) if isinstance(fitting, Recipe) else decode_marked(data, size, limits, fitting)


def empty_pixels(n: int, size: tuple[int, int], fitting: Resize | Recipe) -> Pixels:
    """An uninitialised array for `n` such images."""
    if isinstance(fitting, Recipe):
        return np.empty((n, *fitting.pixel_shape), fitting.pixel_dtype)
    return np.empty((n, *size, RGB_CHANNELS), np.uint8)


# The fields of each preset, which options of the import override. With `resize_crop`, `shorter_side` is the input size
# times 8/7, such as 256 for 224.
PRESETS: dict[str, dict[str, Any]] = {
    # timm's default: resize by bicubic interpolation, centre crop, mean and deviation of ImageNet
    "imagenet": {
        "fit": "resize_crop", "filter": "bicubic", "scale": 1 / 255, "mean": _IMAGENET_MEAN, "std": _IMAGENET_STD,
    },
    # torchvision's transforms of its classifiers: the same by bilinear interpolation
    "torchvision": {
        "fit": "resize_crop", "filter": "bilinear", "scale": 1 / 255, "mean": _IMAGENET_MEAN, "std": _IMAGENET_STD,
    },
    # keras.utils.load_img, then preprocess_input in mode `caffe`, its default: ResNet50, VGG16, VGG19
    "keras": {"filter": "nearest", "channels": "bgr", "mean": (103.939, 116.779, 123.68)},
    # keras.utils.load_img, then preprocess_input in mode `tf`: MobileNet, MobileNetV2, Inception, Xception
    "minus1to1": {"filter": "nearest", "scale": 1 / 127.5, "mean": (1.0,)},
    # TensorFlow Hub's common signatures: values from 0 to 1, tf.image.resize
    "zero_to_one": {"filter": "bilinear_sampled", "scale": 1 / 255},
    # EfficientNet-Lite: centre crop of 7/8, tf.image.resize(method="bicubic"), (p - 127) / 128
    "efficientnet_lite": {
        "fit": "crop", "crop_share": 0.875, "filter": "bicubic_sampled", "scale": 1 / 128, "mean": (127 / 128,),
    },
    # pixels from 0 to 255: preprocessing is part of the network
    "raw": {},
}  # fmt: skip


def recipe_of(preset: str, input_size: tuple[int, int], **changes: Any) -> Recipe:
    """The recipe of a preset for an input size.

    Args:
        preset: a name in `PRESETS`.
        input_size: (height, width).
        changes: fields that differ from the preset.

    Raises:
        ModelError: an unknown preset, or inconsistent fields.
    """
    if preset not in PRESETS:
        raise ModelError(f"the preset is one of {', '.join(PRESETS)}, got {preset!r}")
    values = {**PRESETS[preset], **changes}
    if values.get("fit") == "resize_crop":
        values.setdefault("shorter_side", round(max(input_size) * 8 / 7))
    elif "fit" in changes:
        values.pop("shorter_side", None)
    if values.get("channels") == "gray":
        for name in ("mean", "std"):
            if name not in changes and name in values:
                values[name] = (float(np.mean(values[name])),)
    try:
        return Recipe(input_size=input_size, **values)
    except ValueError as error:
        raise ModelError(f"the preprocessing is inconsistent: {_first_line(error)}") from error


def _first_line(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])
