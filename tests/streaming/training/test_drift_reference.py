"""The drift reference of a trained model is computed on images that it was not fitted on."""

from pathlib import Path

from models.scorer import load_reference
from streaming.registry import open_registry


def test_drift_reference_is_computed_on_the_held_out_images(trained: Path) -> None:
    bundle = open_registry(trained).read(1)
    reference = load_reference(bundle)
    assert reference is not None
    assert reference.held_out
    assert reference.rows == bundle.manifest.training_data.holdout_rows
    assert reference.low_confidence < 0.15
