"""A network in a worker: the weights that are transferred, and the training step."""

import numpy as np
import pytest

from models.cnn import build_network
from streaming.distributed.history import Counts
from streaming.distributed.network import NetworkParts, TrainableNetwork, compute_in_bfloat16
from streaming.distributed.options import TrainerOptions

SIDE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), np.uint8)
LABELS = np.arange(8, dtype=np.int64) % 2
EQUAL_WEIGHTS = np.ones(8, np.float32)


@pytest.fixture(scope="module")
def parts() -> NetworkParts:
    import keras

    model = build_network("cnn_gray", 2, input_size=(SIDE, SIDE))
    return NetworkParts.of(model, keras.optimizers.Adam(0.01))


def make(parts: NetworkParts) -> TrainableNetwork:
    return TrainableNetwork(parts, TrainerOptions())


def test_restored_state_continues_identically(parts: NetworkParts) -> None:
    one, other = make(parts), make(parts)
    for _ in range(3):
        one.step(IMAGES, LABELS, EQUAL_WEIGHTS)
    other.weights, other.optimizer, other.learning_rate = one.weights, one.optimizer, one.learning_rate
    assert (other.weights == one.weights).all()
    assert (other.optimizer == one.optimizer).all()
    assert one.optimizer[0] == 3  # steps
    for network in (one, other):
        network.step(IMAGES, LABELS, EQUAL_WEIGHTS)
    assert (other.weights == one.weights).all()


def test_applying_a_gradient_equals_a_step(parts: NetworkParts) -> None:
    one, other = make(parts), make(parts)
    logits = one.step(IMAGES, LABELS, EQUAL_WEIGHTS)
    gradient, same = other.gradient(IMAGES, LABELS, EQUAL_WEIGHTS)
    other.apply(gradient)
    assert logits == pytest.approx(same, abs=1e-6)
    assert np.abs(one.weights - other.weights).max() < 1e-6
    assert np.abs(one.weights - make(parts).weights).max() > 1e-3


def test_gradient_is_the_weighted_mean_over_the_images(parts: NetworkParts) -> None:
    network = make(parts)
    whole, _ = network.gradient(IMAGES, LABELS, EQUAL_WEIGHTS)
    halves = [network.gradient(IMAGES[at], LABELS[at], EQUAL_WEIGHTS[:4])[0] for at in (slice(0, 4), slice(4, 8))]
    assert np.abs(whole - (halves[0] + halves[1]) / 2).max() < 1e-5
    only_ones, _ = network.gradient(IMAGES, LABELS, (LABELS == 1).astype(np.float32))
    ones, _ = network.gradient(IMAGES[LABELS == 1], LABELS[LABELS == 1], EQUAL_WEIGHTS[:4])
    assert np.abs(only_ones - ones / 2).max() < 1e-5


def test_only_trainable_weights_are_transferred() -> None:
    import keras

    model = build_network("efficientnet_lite0", 3, weights="random", input_size=(SIDE, SIDE))
    network = TrainableNetwork(NetworkParts.of(model, keras.optimizers.SGD()), TrainerOptions())
    assert len(network.weights) == 1280 * 3 + 3  # the head
    before = model.get_weights()
    network.step(IMAGES, LABELS, EQUAL_WEIGHTS)
    after = network.model.get_weights()
    changed = [not np.array_equal(one, other) for one, other in zip(before, after, strict=True)]
    assert sum(changed) == 2


def test_bfloat16_keeps_weights_and_logits_in_float32(parts: NetworkParts) -> None:
    exact, rounded = make(parts), make(parts)
    compute_in_bfloat16(rounded.model)
    answers = rounded.logits(IMAGES)
    assert answers.dtype == np.float32
    assert rounded.weights.dtype == np.float32
    assert answers == pytest.approx(exact.logits(IMAGES), rel=0.05, abs=0.05)
    assert (answers != exact.logits(IMAGES)).any()
    rounded.step(IMAGES, LABELS, EQUAL_WEIGHTS)
    assert np.isfinite(rounded.weights).all()


@pytest.mark.parametrize("columns", [1, 3])
def test_counts_match_the_logits(columns: int) -> None:
    logits = np.random.default_rng(1).normal(size=(20, columns)).astype(np.float32) * 3
    truth = np.random.default_rng(2).integers(0, max(2, columns), 20)
    found = Counts.of(logits, truth)
    z = np.concatenate([np.zeros((20, 1)), logits], axis=1) if columns == 1 else logits.astype(float)
    probabilities = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert found.log_loss == pytest.approx(-np.log(probabilities[np.arange(20), truth]).mean(), rel=1e-6)
    assert found.accuracy == pytest.approx((probabilities.argmax(axis=1) == truth).mean())
    sure = Counts.of(np.array([[-1e4]], np.float32), np.array([1]))
    assert sure.log_loss == pytest.approx(1e4)
    assert sure.clipped_loss == pytest.approx(-np.log(1e-7), rel=1e-3)
