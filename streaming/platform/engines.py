"""The engine that answers on this machine: fixed by a setting, or the fastest one that agrees, found once and kept.

The results are in a file of the work folder, by what could change them: the features' hash, the libraries' versions,
the execution providers, the machine and its processor.
"""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.bundle import GOLDEN, Bundle, EngineName, Manifest
from models.engine_choice import Timed, compare_engines, engines_for, fastest
from models.onnx_session import resolve_providers
from models.scorer import golden_images
from streaming.settings import Settings

FILE = "engines.json"
FASTEST = "the fastest that agrees"
LIBRARIES = ("ai-edge-litert", "onnxruntime")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class EngineChoice:
    """What runs a network.

    Attributes:
        providers: of ONNX Runtime.
        results: of the engines that were compared; empty where there was nothing to choose.
        why: it was chosen.
    """

    engine: EngineName
    providers: tuple[str, ...] = ("cpu",)
    results: dict[EngineName, Timed] | None = None
    why: str = FASTEST

    def __str__(self) -> str:
        if not self.results:
            return f"{self.engine}, {self.why}"
        others = [
            f"{name} {timed.why}" if timed.why else f"{name} {timed.images_per_s:,.0f} images/s"
            for name, timed in self.results.items()
        ]
        return f"{self.engine}, {self.why} ({', '.join(others)}; one thread)"


class Engines:
    """Chooses engines on this machine."""

    def __init__(self, settings: Settings) -> None:
        self._wanted = settings.engine
        self.providers = tuple(settings.execution_providers.split(","))
        self._file = settings.backbones_dir / FILE

    def choose(self, bundle: Bundle) -> EngineChoice:
        """The engine for a bundle; the first time on a machine takes a second for each engine.

        Raises:
            ModelError: the provider that was set is not installed, or the manifest's engine cannot run it.
        """
        if "onnx" in engines_for(bundle.manifest.backbone):
            resolve_providers(self.providers)
        known = self.known(bundle.manifest)
        if known is not None:
            return known
        entry, images = bundle.manifest.backbone, golden_images(bundle.arrays(GOLDEN))
        results = compare_engines(entry, bundle.files[entry.scored_file], images, self.providers)
        self._keep(self._key(bundle.manifest), results)
        return EngineChoice(fastest(results), self.providers, results)

    def known(self, manifest: Manifest) -> EngineChoice | None:
        """The engine for a bundle if that needs no timing: set, or the only one, or found before; else None.

        The setting counts for what that engine can run: an imported ONNX file runs on ONNX Runtime in any case.
        """
        engines = engines_for(manifest.backbone)
        if len(engines) == 1:
            return EngineChoice(engines[0], self.providers, why="the only one that runs its network")
        if self._wanted != "auto":
            return EngineChoice(self._wanted, self.providers, why="fixed by the setting engine")
        kept = self._read().get(self._key(manifest))
        try:
            results = {name: Timed(**kept[name]) for name in engines} if kept else {}
            return EngineChoice(fastest(results), self.providers, results) if results else None
        except (TypeError, KeyError, ValueError):  # another release wrote it
            return None

    def _key(self, manifest: Manifest) -> str:
        facts = [
            manifest.backbone_sha256,
            self.providers,
            [version(name) for name in LIBRARIES],
            platform.node(),
            _cpu(),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _keep(self, key: str, results: dict[EngineName, Timed]) -> None:
        content = self._read() | {key: {name: asdict(timed) for name, timed in results.items()}}
        unfinished = self._file.with_name(f".{FILE}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
            unfinished.replace(self._file)
        except OSError:  # a folder that cannot be written: they are timed again next time
            unfinished.unlink(missing_ok=True)


def _cpu() -> str:
    try:
        lines = CPUINFO.read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
