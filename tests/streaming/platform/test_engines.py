"""The choice of the engine: the fastest that agrees, measured once per machine, unless a setting fixes it."""

import json
import re
from pathlib import Path

import pytest

from models.bundle import GOLDEN, Bundle, read_bundle
from models.engine_choice import Timed, compare_engines, fastest
from models.errors import ModelError
from models.scorer import check_golden, golden_images, load_scorer
from streaming.platform import engines as module
from streaming.platform.doctor import check_champion
from streaming.platform.engines import Engines
from streaming.settings import Settings
from tests.conftest import command_here, environment
from tests.streaming.small_models import bundle_folder


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Bundle:
    return read_bundle(bundle_folder(trained, 1))


def settings(folder: Path, **values: str) -> Settings:
    return Settings(home=str(folder), backbones=folder, **values)


def test_fastest_engine_that_agrees_is_chosen(bundle: Bundle) -> None:
    entry, images = bundle.manifest.backbone, golden_images(bundle.arrays(GOLDEN))
    found = compare_engines(entry, bundle.files[entry.scored_file], images, seconds=0.05)
    assert set(found) == {"litert", "onnx"}
    assert all(timed.why is None and timed.images_per_s for timed in found.values())
    assert (found["litert"].difference, found["onnx"].difference or 1) < (1e-9, 1e-3)
    assert found[fastest(found)].images_per_s == max(timed.images_per_s or 0 for timed in found.values())
    for engine in found:
        check_golden(bundle, load_scorer(bundle, engine=engine))


def test_engine_that_disagrees_or_fails_is_not_chosen() -> None:
    slow = Timed(images_per_s=1.0, difference=0.0)
    assert fastest({"litert": slow, "onnx": Timed(difference=0.5, why="differs by 5e-01")}) == "litert"
    assert fastest({"litert": slow, "onnx": Timed(why="operator X has no translation")}) == "litert"
    assert fastest({"litert": slow, "onnx": Timed(2.0, 1e-6)}) == "onnx"


def test_choice_is_cached_per_machine(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compare_engines", lambda *_: {"litert": Timed(1.0, 0.0), "onnx": Timed(2.0, 0.0)})
    engines = Engines(settings(tmp_path))
    assert engines.known(bundle.manifest) is None
    chosen = engines.choose(bundle)
    assert (chosen.engine, str(chosen)) == (
        "onnx",
        "onnx, the fastest that agrees (litert 1 images/s, onnx 2 images/s; one thread)",
    )
    monkeypatch.setattr(module, "compare_engines", lambda *_: pytest.fail("timed again"))
    assert Engines(settings(tmp_path)).choose(bundle) == chosen
    monkeypatch.setattr(module, "_cpu", lambda: "another processor")
    assert Engines(settings(tmp_path)).known(bundle.manifest) is None
    (tmp_path / module.FILE).write_text(json.dumps({"x": 1})[:-1])
    assert Engines(settings(tmp_path)).known(bundle.manifest) is None


def test_setting_fixes_the_engine_or_reports_what_is_missing(bundle: Bundle, tmp_path: Path) -> None:
    assert Engines(settings(tmp_path, engine="onnx")).choose(bundle).engine == "onnx"
    with pytest.raises(ModelError, match="no execution provider 'cuda', it has cpu.*IMAGESTREAM_EXECUTION_PROVIDERS"):
        Engines(settings(tmp_path, execution_providers="cuda,cpu")).choose(bundle)
    quantised = bundle.manifest.backbone.model_copy(update={"precision": "int8"})
    integers = Bundle(bundle.manifest.model_copy(update={"backbone": quantised}), bundle.sha256, bundle.files)
    assert (
        Engines(settings(tmp_path, engine="onnx")).choose(integers).engine == "litert"
    )  # the only one that supports it


def test_engine_of_the_champion_is_shown_with_the_reason(trained: Path, tmp_path: Path) -> None:
    found = "version 1, efficientnet_lite0; engine "
    values = {"home": str(trained), "backbones": tmp_path}
    assert check_champion(Settings(**values)).found == f"{found}not measured yet: `imagestream models verify 1`"
    assert check_champion(Settings(**values, engine="onnx")).found == f"{found}onnx, fixed by the setting engine"
    variables = {"IMAGESTREAM_BACKBONES": str(tmp_path), "IMAGESTREAM_ENGINE": "auto"}
    with environment(**variables):
        _, _, shown = command_here("--home", trained, "models", "show", 1)
        assert "engine here: not measured yet: `imagestream models verify 1`" in shown
        _, verified, _ = command_here("--home", trained, "models", "verify", 1)
        _, _, shown = command_here("--home", trained, "models", "show", 1)
    (line,) = [line for line in shown.splitlines() if line.startswith("engine here: ")]
    assert re.search("(litert|onnx), the fastest that agrees .litert .* images/s, onnx .* images/s; one thread", line)
    assert line in verified
    assert check_champion(Settings(**values)).found == found + line.removeprefix("engine here: ")
    assert "none yet" in check_champion(Settings(home=str(tmp_path / "empty"))).found
