"""Each preprocessing preset compared with the reference implementation, on one photograph."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from models.decode import BadImage
from models.errors import ModelError
from models.recipe import PRESETS, Recipe, recipe_of

FLOWER = Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg"
PICTURE = Image.open(FLOWER).convert("RGB").crop((0, 0, 601, 427))  # not a multiple of any target size
SIDE = 224
TOLERANCE = 1e-3


def encoded(image: Image.Image = PICTURE) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def prepared(recipe: Recipe, data: bytes | None = None) -> np.ndarray:
    pixels = recipe.pixels(encoded() if data is None else data)
    assert not isinstance(pixels, BadImage)
    assert (pixels.shape, pixels.dtype) == (recipe.pixel_shape, recipe.pixel_dtype)
    tensor = recipe.tensor(pixels[np.newaxis])[0]
    height, width, channels = recipe.pixel_shape
    expected = (height, width, channels) if recipe.layout == "nhwc" else (channels, height, width)
    assert (tensor.shape, tensor.dtype) == (expected, recipe.dtype)
    return tensor


def torchvision_reference(
    size: int, resize: int, resampling: Image.Resampling, image: Image.Image = PICTURE
) -> np.ndarray:
    """torchvision.transforms.v2 0.21: Resize(resize), CenterCrop(size), ToTensor, Normalize, on a Pillow image."""
    short, long = sorted(image.size)
    new_long = int(resize * long / short)
    new_width, new_height = (resize, new_long) if image.width <= image.height else (new_long, resize)
    resized = image.resize((new_width, new_height), resampling)
    top, left = round((new_height - size) / 2.0), round((new_width - size) / 2.0)
    cropped = np.asarray(resized.crop((left, top, left + size, top + size)))
    tensor = cropped.transpose(2, 0, 1).astype(np.float32) / 255
    mean, std = (
        np.array(values, np.float32)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return np.asarray((tensor - mean) / std)


@pytest.mark.parametrize(
    ("preset", "resampling"), [("torchvision", Image.Resampling.BILINEAR), ("imagenet", Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_recipe_matches_torchvision(preset: str, resampling: Image.Resampling, turned: bool) -> None:
    image = PICTURE.transpose(Image.Transpose.ROTATE_90) if turned else PICTURE
    recipe = recipe_of(preset, (SIDE, SIDE), layout="nchw")
    assert recipe.shorter_side == 256
    expected = torchvision_reference(SIDE, 256, resampling, image)
    difference = np.abs(prepared(recipe, encoded(image)) - expected)
    # Pillow rounds to whole pixel values: a few values close to a half may be rounded the other way.
    assert np.quantile(difference, 0.999) < TOLERANCE


@pytest.mark.parametrize(("preset", "mode"), [("keras", "caffe"), ("minus1to1", "tf")])
def test_recipe_matches_keras(preset: str, mode: str, tmp_path: Path) -> None:
    import keras

    (tmp_path / "image.png").write_bytes(encoded())
    loaded = keras.utils.load_img(tmp_path / "image.png", target_size=(SIDE, SIDE))
    expected = keras.applications.imagenet_utils.preprocess_input(keras.utils.img_to_array(loaded), mode=mode)
    np.testing.assert_allclose(prepared(recipe_of(preset, (SIDE, SIDE))), expected, atol=TOLERANCE)


def test_recipe_matches_tensorflow_hub() -> None:
    import tensorflow as tf

    image = tf.image.convert_image_dtype(np.asarray(PICTURE), tf.float32)
    for size in ((SIDE, SIDE), (500, 700)):
        expected = tf.image.resize(image, size).numpy()
        np.testing.assert_allclose(prepared(recipe_of("zero_to_one", size)), expected, atol=TOLERANCE)


def test_recipe_matches_efficientnet_lite() -> None:
    """tensorflow/tpu, models/official/efficientnet/preprocessing.py: centre crop with a padding of 32, then bicubic."""
    import tensorflow as tf

    pixels = np.asarray(PICTURE)
    height, width = pixels.shape[:2]
    window = int(SIDE / (SIDE + 32) * min(height, width))
    top, left = (height - window + 1) // 2, (width - window + 1) // 2
    centre = pixels[top : top + window, left : left + window]
    resized = tf.image.resize(centre.astype(np.float32), (SIDE, SIDE), method="bicubic").numpy()
    expected = (resized - 127) / 128
    recipe = recipe_of("efficientnet_lite", (SIDE, SIDE))
    of_window = recipe.model_copy(update={"fit": "stretch"})
    np.testing.assert_allclose(prepared(of_window, encoded(Image.fromarray(centre))), expected, atol=TOLERANCE)
    # The two crop windows may differ by one pixel, which shifts the image by less than that.
    assert np.abs(prepared(recipe) - expected).mean() < 0.05


def test_gray_integer_and_raw_pixels() -> None:
    luma = np.asarray(PICTURE.convert("L").resize((28, 28), Image.Resampling.BILINEAR))
    gray = prepared(recipe_of("zero_to_one", (28, 28), channels="gray", filter="bilinear"))
    np.testing.assert_allclose(gray[..., 0], luma / 255, atol=TOLERANCE)
    stretched = np.asarray(PICTURE.resize((64, 48), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(prepared(recipe_of("raw", (48, 64), dtype="uint8")), stretched)
    centred = prepared(recipe_of("raw", (48, 64), dtype="int8", mean=(128.0,), channels="bgr"))
    np.testing.assert_array_equal(centred, (stretched[..., ::-1].astype(int) - 128).astype(np.int8))


@given(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from(sorted(PRESETS)), st.sampled_from(["rgb", "bgr", "gray"])
)
def test_image_of_any_size_becomes_the_tensor(height: int, width: int, preset: str, channels: str) -> None:
    picture = Image.fromarray(np.full((height, width, 3), (10, 200, 30), np.uint8))
    tensor = prepared(recipe_of(preset, (16, 24), channels=channels), encoded(picture))
    assert np.ptp(tensor, axis=(0, 1)).max() < 1e-4  # a uniform image stays uniform


def test_long_strip_takes_little_memory() -> None:
    strip = Image.fromarray(np.zeros((1, 65_000, 3), np.uint8))
    assert not prepared(recipe_of("raw", (224, 224), fit="resize_crop", shorter_side=2048), encoded(strip)).any()


@pytest.mark.parametrize(
    ("preset", "fields", "reason"),
    [
        ("nonsense", {}, "preset is one of imagenet, torchvision, .*, got 'nonsense'"),
        ("raw", {"std": (0.0,)}, "scale and std must not be 0"),
        ("raw", {"mean": (1.0, 2.0)}, "mean: expected one value or 3, got 2"),
        ("torchvision", {"shorter_side": 100}, "a shorter side of 100 is less than the crop"),
        ("raw", {"crop_share": 0.0}, "crop_share: .* greater than 0"),
    ],
)
def test_invalid_recipe_is_rejected(preset: str, fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        recipe_of(preset, (224, 224), **fields)


def test_recipe_round_trips_through_json() -> None:
    for preset in PRESETS:
        recipe = recipe_of(preset, (224, 192), layout="nchw")
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(ValidationError, match="version"):
        Recipe.model_validate({"version": 2, "input_size": (1, 1)})
