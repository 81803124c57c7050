"""Loads the models of the stream: the champion, and a challenger that is scored alongside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pyspark import Broadcast
from pyspark.sql import SparkSession

from models.bundle import Bundle
from models.drift import DriftReference
from models.errors import ModelError
from models.scorer import check_golden, load_reference, load_scorer
from streaming.errors import NotFoundError
from streaming.pipeline.decisions import ModelVersion
from streaming.platform.engines import EngineChoice, Engines
from streaming.registry import CHALLENGER, CHAMPION, Registry
from streaming.storage.registry_objects import Alias

OnRefused = Callable[[int, str], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model version that passed its checks, with the broadcast that workers load it from."""

    version: ModelVersion
    backbone_sha256: str
    broadcast: "Broadcast[Bundle]"
    reference: DriftReference | None  # from images that it was not fitted on
    engine: EngineChoice


class ModelManager:
    """Follows the registry's aliases between micro-batches.

    A version that is rejected (altered, of the wrong shape, or with other results than recorded) is reported once, and
    the stream continues with the current model. If the challenger is rejected or its alias is cleared, there is none.

    Args:
        spark: the session that broadcasts bundles.
        on_refused: called with the number of a rejected version and the reason.

    Raises:
        ServiceError: there is no champion.
        ModelError: the champion is rejected.
    """

    def __init__(self, spark: SparkSession, registry: Registry, on_refused: OnRefused, engines: Engines) -> None:
        self._engines = engines
        self._spark = spark
        self._registry = registry
        self._on_refused = on_refused
        self._refused: dict[int, str] = {}
        self._loaded: dict[ModelVersion, LoadedModel] = {}
        self.champion = self._load(self._champion(registry.targets()))
        self.challenger: LoadedModel | None = None

    @property
    def refused(self) -> dict[int, str]:
        """Rejected versions that an alias points to now → reason."""
        return dict(self._refused)

    def follow(self) -> None:
        """Load the versions that the aliases point to now."""
        targets = self._registry.targets()
        champion, challenger = self._champion(targets), targets[CHALLENGER]
        self._refused = {version: why for version, why in self._refused.items() if version in {champion, challenger}}
        self.champion = self._loaded_or_current(champion, self.champion) or self.champion
        if challenger is None or challenger == self.champion.version.version:
            self.challenger = None
        else:
            self.challenger = self._loaded_or_current(challenger, self.challenger)
        self._evict_others()

    def _champion(self, targets: Mapping[Alias, int | None]) -> int:
        version = targets[CHAMPION]
        if version is None:
            place = self._registry.place
            raise NotFoundError(f"there is no champion model in {place}; train one with 'imagestream train'")
        return version

    def _loaded_or_current(self, version: int, current: LoadedModel | None) -> LoadedModel | None:
        if current is not None and current.version.version == version:
            return current
        if version in self._refused:
            return None
        try:
            return self._load(version)
        except ModelError as error:
            self._refused[version] = str(error)
            self._on_refused(version, str(error))
            return None

    def _load(self, version: int) -> LoadedModel:
        bundle = self._registry.read(version)
        engine = self._engines.choose(bundle)
        check_golden(bundle, load_scorer(bundle, engine=engine.engine, providers=engine.providers))
        reference = load_reference(bundle)
        loaded = ModelVersion(version, bundle.sha256)
        if loaded not in self._loaded:
            broadcast = self._spark.sparkContext.broadcast(bundle)
            self._loaded[loaded] = LoadedModel(loaded, bundle.backbone_sha256, broadcast, reference, engine)
        return self._loaded[loaded]

    def _evict_others(self) -> None:
        keep = {model.version for model in (self.champion, self.challenger) if model is not None}
        for version in set(self._loaded) - keep:
            self._loaded.pop(version).broadcast.unpersist()
