"""Which engine answers: the fastest of those that agree, found once on a machine, unless a setting says which."""

import json
from pathlib import Path

import pytest

from models.bundle import Bundle, read_bundle
from models.engine_choice import Timed, compare_engines, fastest
from models.errors import ModelError
from models.scorer import check_golden, load_scorer
from streaming.pipeline import engines as module
from streaming.pipeline.engines import Engines
from streaming.settings import Settings
from tests.streaming.small_models import bundle_folder


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Bundle:
    return read_bundle(bundle_folder(trained, 1))


def settings(folder: Path, **values: str) -> Settings:
    return Settings(home=str(folder), backbones=folder, **values)


def test_every_engine_that_agrees_is_timed_and_the_fastest_is_chosen(bundle: Bundle) -> None:
    found = compare_engines(bundle, seconds=0.05)
    assert set(found) == {"litert", "onnx"}
    assert all(timed.why is None and timed.images_per_s for timed in found.values())
    assert (found["litert"].difference, found["onnx"].difference or 1) < (1e-9, 1e-3)
    assert found[fastest(found)].images_per_s == max(timed.images_per_s or 0 for timed in found.values())
    for engine in found:
        check_golden(bundle, load_scorer(bundle, engine=engine))


def test_an_engine_that_disagrees_or_cannot_run_it_is_not_chosen() -> None:
    slow = Timed(images_per_s=1.0, difference=0.0)
    assert fastest({"litert": slow, "onnx": Timed(difference=0.5, why="differs by 5e-01")}) == "litert"
    assert fastest({"litert": slow, "onnx": Timed(why="operator X has no translation")}) == "litert"
    assert fastest({"litert": slow, "onnx": Timed(2.0, 1e-6)}) == "onnx"


def test_the_choice_is_kept_for_the_machine(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compare_engines", lambda *_: {"litert": Timed(1.0, 0.0), "onnx": Timed(2.0, 0.0)})
    engines = Engines(settings(tmp_path))
    assert engines.known(bundle) is None
    chosen = engines.choose(bundle)
    assert (chosen.engine, str(chosen)) == ("onnx", "onnx (litert 1 images/s, onnx 2 images/s; one thread)")
    monkeypatch.setattr(module, "compare_engines", lambda *_: pytest.fail("timed again"))
    assert Engines(settings(tmp_path)).choose(bundle) == chosen
    monkeypatch.setattr(module, "_cpu", lambda: "another processor")
    assert Engines(settings(tmp_path)).known(bundle) is None
    (tmp_path / module.FILE).write_text(json.dumps({"x": 1})[:-1])
    assert Engines(settings(tmp_path)).known(bundle) is None


def test_a_setting_fixes_the_engine_or_says_what_is_missing(bundle: Bundle, tmp_path: Path) -> None:
    assert Engines(settings(tmp_path, engine="onnx")).choose(bundle).engine == "onnx"
    with pytest.raises(ModelError, match="no execution provider 'cuda', it has cpu.*IMAGESTREAM_EXECUTION_PROVIDERS"):
        Engines(settings(tmp_path, execution_providers="cuda,cpu")).choose(bundle)
    quantised = bundle.manifest.backbone.model_copy(update={"precision": "int8"})
    integers = Bundle(bundle.manifest.model_copy(update={"backbone": quantised}), bundle.sha256, bundle.files)
    assert Engines(settings(tmp_path, engine="onnx")).choose(integers).engine == "litert"  # the only one that can
