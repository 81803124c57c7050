"""Chooses the inference engine on this machine: by a setting, or the fastest one whose results agree.

The measurements are cached in a file of the work folder, by everything that could change them: the backbone's hash, the
libraries' versions, the execution providers, the machine and its processor.
"""

import hashlib
import json
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.bundle import GOLDEN, Bundle, EngineName, Manifest
from models.engine_choice import Timed, compare_engines, engines_for, fastest
from models.onnx_session import resolve_providers
from models.scorer import golden_images
from streaming.settings import Settings
from streaming.storage.atomic_file import write_json

FILE = "engines.json"
FASTEST = "the fastest that agrees"
LIBRARIES = ("ai-edge-litert", "onnxruntime")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class EngineChoice:
    """The engine that runs a network.

    Attributes:
        providers: execution providers of ONNX Runtime.
        results: of the compared engines; None or empty if there was no choice.
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
        """The engine for a bundle; the first measurement on a machine takes about a second per engine.

        Raises:
            ModelError: a configured execution provider is not installed, or no engine can run the network.
        """
        if "onnx" in engines_for(bundle.manifest.backbone):
            resolve_providers(self.providers)
        known = self.known(bundle.manifest)
        if known is not None:
            return known
        entry, images = bundle.manifest.backbone, golden_images(bundle.arrays(GOLDEN))
        results = compare_engines(entry, bundle.files[entry.scored_file], images, self.providers)
        self._save(self._key(bundle.manifest), results)
        return EngineChoice(fastest(results), self.providers, results)

    def known(self, manifest: Manifest) -> EngineChoice | None:
        """The engine for a bundle if it needs no measurement: the configured, only or cached one; otherwise None.

        The setting only applies to networks that its engine can run: imported ONNX files always use ONNX Runtime.
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
        except (TypeError, KeyError, ValueError):  # written by another release
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

    def _save(self, key: str, results: dict[EngineName, Timed]) -> None:
        content = self._read() | {key: {name: asdict(timed) for name, timed in results.items()}}
        with suppress(OSError):  # without the file, the engines are timed again next time
            write_json(self._file, content)


def _cpu() -> str:
    try:
        lines = CPUINFO.read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
