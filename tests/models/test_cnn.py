from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from models.backbone import build, export_backbone
from models.cnn import ALL_BLOCKS, body_of, build_network, head_of, save_body
from models.engine import KerasEngine, LiteRTEngine
from models.errors import ModelError

if TYPE_CHECKING:
    import keras


def some_images(size: tuple[int, int], n: int = 6) -> np.ndarray:
    """Noise around a different grey in each image."""
    generator = np.random.default_rng(5)
    means = generator.uniform(40, 210, (n, 1, 1, 1))
    return np.clip(generator.normal(means, 30, (n, *size, 3)), 0, 255).astype(np.uint8)


def train(network: "keras.Model", n_classes: int) -> None:
    import keras

    size = network.input_shape[1:3]
    binary = n_classes == 2
    loss = keras.losses.BinaryCrossentropy if binary else keras.losses.SparseCategoricalCrossentropy
    # Eagerly, because two steps take less time than tracing them.
    network.compile(keras.optimizers.SGD(1e-2), loss(from_logits=True), run_eagerly=True)
    network.fit(some_images(size), np.arange(6) % n_classes, batch_size=3, epochs=1, verbose=0)


@pytest.mark.usefixtures("exports_here")
@pytest.mark.parametrize(
    ("name", "n_classes", "size", "exports"),
    [
        ("cnn_gray", 2, (28, 30), True),
        # test_backbone_contract.py shows that an export gives the same features as Keras.
        ("cnn_color", 4, (24, 24), False),
        ("mobilenet_v2", 3, (32, 32), False),
        ("pixels", 2, (6, 5), False),
    ],
)
def test_trained_network_equals_a_backbone_and_a_logistic_regression(
    name: str, n_classes: int, size: tuple[int, int], exports: bool, tmp_path: Path
) -> None:
    network = build_network(name, n_classes, input_size=size, unfreeze=ALL_BLOCKS if name == "mobilenet_v2" else 0)
    trained, fixed = ([*one] for one in (network.trainable_weights, network.non_trainable_weights))
    before = [weight.numpy() for weight in (*trained, *fixed)]
    train(network, n_classes)
    changed = [(now.numpy() != then).any() for now, then in zip((*trained, *fixed), before, strict=True)]
    assert any(changed[: len(trained)])
    assert not any(changed[len(trained) :])
    # Scale, offset, mean and variance of every normalisation.
    assert len(fixed) == (4 * 52 if name == "mobilenet_v2" else 0)
    weights = tmp_path / "trained.weights.h5"
    save_body(network, weights)

    images = some_images(size, 9)
    if exports:
        features = LiteRTEngine(export_backbone(name, str(weights), tmp_path, input_size=size).flatbuffer)(images)
    else:
        features = KerasEngine(build(name, str(weights), input_size=size))(images)
    logits = head_of(network).logits(features)
    expected = np.asarray(network(images))
    if n_classes == 2:
        assert expected.shape == (9, 1)
        assert (logits[:, 0] == 0).all()
        expected = np.concatenate([np.zeros_like(expected), expected], axis=1)
    assert logits.shape == (9, n_classes)
    np.testing.assert_allclose(logits - logits[:, :1], expected - expected[:, :1], atol=1e-4)


def test_sigmoid_of_one_logit_equals_softmax_of_two() -> None:
    network = build_network("pixels", 2, input_size=(3, 3))
    images = some_images((3, 3))
    probabilities = head_of(network).probabilities(images.reshape(6, -1).astype(np.float32) / 255)
    sigmoid = 1 / (1 + np.exp(-np.asarray(network(images))[:, 0]))
    np.testing.assert_allclose(probabilities, np.stack([1 - sigmoid, sigmoid], axis=1), rtol=1e-5)


def test_seed_determines_the_initial_weights() -> None:
    first, again, other = (
        build_network("cnn_gray", 5, input_size=(28, 28), seed=seed).get_weights() for seed in (7, 7, 8)
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for kernel, other_kernel in ((first[0], other[0]), (first[-2], other[-2])):  # of the first layer and of the head
        assert (kernel != other_kernel).any()


def test_trainable_layers_depend_on_unfreeze() -> None:
    assert len(build_network("cnn_gray", 2, input_size=(28, 28)).trainable_weights) == 2 * 5
    trainable = {
        unfreeze: {
            layer.name
            for layer in body_of(build_network("mobilenet_v2", 2, input_size=(64, 64), unfreeze=unfreeze)).layers
            if layer.trainable_weights
        }
        for unfreeze in (0, 1, 2, ALL_BLOCKS)
    }
    assert trainable[0] == set()
    assert {"block_13_depthwise", "block_16_expand", "Conv_1"} < trainable[1]  # their feature maps are 2×2
    assert "block_13_expand" not in trainable[1]  # its feature map is 4×4
    assert "block_13_expand" in trainable[2]
    assert trainable[1] < trainable[2] < trainable[ALL_BLOCKS]
    assert "Conv1" in trainable[ALL_BLOCKS]
    assert not any("BN" in name or "bn" in name for name in trainable[ALL_BLOCKS])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_classes": 1}, "from 2 to 1,000,000 classes, got 1"),
        ({"unfreeze": 6}, r"vgg16 has 5 blocks at this size, so -1 \(all\) to 5 can be unfrozen, got 6"),
        ({"unfreeze": -2}, "got -2"),
        ({"input_size": (16, 16)}, "from 32 to 640"),
    ],
    ids=str,
)
def test_invalid_network_options_are_rejected(options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_network("vgg16", **({"n_classes": 2, "input_size": (64, 64)} | options))


def test_diverged_network_is_not_saved(tmp_path: Path) -> None:
    network = build_network("cnn_gray", 2, input_size=(28, 28))
    network.set_weights([np.full_like(values, np.nan) for values in network.get_weights()])
    with pytest.raises(ModelError, match="weights of cnn_gray are NaN or infinite: training diverged"):
        save_body(network, tmp_path / "it.weights.h5")
    with pytest.raises(ModelError, match="weights of head are NaN"):
        head_of(network)
    with pytest.raises(ModelError, match=r"ends in .weights.h5, got 'it.keras'"):
        save_body(network, tmp_path / "it.keras")
    assert not list(tmp_path.iterdir())
