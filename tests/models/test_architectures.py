import numpy as np
import pytest

from models.architectures import BACKBONES, MAX_INPUT_SIDE, find_backbone
from models.backbone import preprocess
from models.errors import ModelError

# The default input sizes, and the published size of the last feature map for them.
EXPECTED = {
    "efficientnet_lite0": ((224, 224), 1280, 7 * 7 * 1280),
    "mobilenet_v2": ((224, 224), 1280, 62_720),
    "inception_v3": ((299, 299), 2048, 8 * 8 * 2048),
    "xception": ((299, 299), 2048, 10 * 10 * 2048),
    "resnet50": ((224, 224), 2048, 7 * 7 * 2048),
    "vgg16": ((224, 224), 512, 25_088),
    "vgg19": ((224, 224), 512, 25_088),
    "cnn_gray": ((128, 128), 16, 16),
    "cnn_color": ((64, 64), 128, 128),
}
KERAS_MODULES = {
    "mobilenet_v2": "mobilenet_v2",
    "inception_v3": "inception_v3",
    "xception": "xception",
    "resnet50": "resnet50",
    "vgg16": "vgg16",
    "vgg19": "vgg19",
}


def test_table_contains_exactly_the_documented_backbones() -> None:
    assert set(BACKBONES) == {*EXPECTED, "pixels"}


@pytest.mark.parametrize("name", EXPECTED)
def test_backbone_has_its_default_size_and_both_outputs(name: str) -> None:
    size, pooled, flat = EXPECTED[name]
    assert find_backbone(name) == BACKBONES[name]
    assert (find_backbone(name).input_size, find_backbone(name).n_features) == (size, pooled)
    assert find_backbone(name, "flat").n_features == flat


@pytest.mark.parametrize("name", EXPECTED)
def test_width_matches_the_keras_network_at_every_size(name: str) -> None:
    """At the smallest side and at an odd one; test_backbone_contract.py compares other sizes."""
    size = (BACKBONES[name].min_side, 97)
    spec = find_backbone(name, "flat", size)
    _, height, width, channels = spec.build_map(None, size).output_shape
    assert spec.n_features == height * width * channels
    assert find_backbone(name, "pooled", size).n_features == channels


def test_pixels_output_is_always_flat() -> None:
    assert find_backbone("pixels").n_features == 32 * 32 * 3
    spec = find_backbone("pixels", "pooled", (7, 5))
    assert (spec.output, spec.n_features) == ("flat", 7 * 5 * 3)
    assert find_backbone("pixels", input_size=(512, 512)).n_features == 512 * 512 * 3
    with pytest.raises(ModelError, match=r"pixels takes images .* from 1 to 512, got \(513, 513\)"):
        find_backbone("pixels", input_size=(513, 513))


@pytest.mark.parametrize("name", KERAS_MODULES)
def test_preprocessing_matches_keras_applications(name: str) -> None:
    import keras

    pixels = keras.Input((4, 5, 3), dtype="uint8")
    ours = keras.Model(pixels, preprocess(pixels, BACKBONES[name].preprocessing))
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    theirs = getattr(keras.applications, KERAS_MODULES[name]).preprocess_input(images.astype(np.float32))
    np.testing.assert_allclose(np.asarray(ours(images)), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(70, 299), (299, 70), (299, MAX_INPUT_SIDE + 1), (299,), (299, 299, 3)], ids=str)
def test_unsupported_input_size_is_rejected(size: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=rf"xception takes images .* from 71 to {MAX_INPUT_SIDE}, got \({size[0]}"):
        find_backbone("xception", "pooled", size)  # type: ignore[arg-type]


def test_unknown_output_is_rejected() -> None:
    with pytest.raises(ModelError, match="pooled or flat, got 'max'"):
        find_backbone("xception", "max")  # type: ignore[arg-type]
