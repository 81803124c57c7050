"""The settings of a process: read from the environment once, at the edge, then passed down and never changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from streaming.errors import ServiceError

HOME = Path(".imagestream")

TOPIC = r"^[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,248}$"  # as Kafka has it, but for a dot in front: it names a folder, too
MASTER = r"^(local(-cluster)?(\[[0-9*, ]+\])?|yarn|(spark|k8s)://.+)$"
MEMORY = r"^[1-9][0-9]*[kmgtKMGT]$"


class Settings(BaseSettings):
    """Every setting, each from `IMAGESTREAM_<NAME>` unless given; derived places are computed here and nowhere else."""

    model_config = SettingsConfigDict(env_prefix="IMAGESTREAM_", frozen=True, extra="ignore", populate_by_name=True)

    home: Path = Field(HOME, description="where tables, checkpoints, models, jars and the broker's data live")
    jars: Path | None = Field(None, description="where the jars are; default: HOME/jars")
    backbones: Path | None = Field(None, description="where exported backbones are kept; default: HOME/backbones")
    bootstrap_servers: str | None = Field(None, description="Kafka brokers, host:port,…; default: the home's broker")
    topic: str = Field("images", pattern=TOPIC, description="the Kafka topic that images are published to")
    master: str = Field("local[*,4]", pattern=MASTER, description="the Spark master; local[cores,tries]")
    driver_memory: str = Field("2g", pattern=MEMORY, description="memory of Spark's JVM in local mode, e.g. 2g")
    mlflow_tracking_uri: str | None = Field(
        None, validation_alias="MLFLOW_TRACKING_URI", description="where runs of training are told, too; MLflow's own"
    )

    @property
    def tables_dir(self) -> Path:
        return self.home / "tables"

    @property
    def checkpoints_dir(self) -> Path:
        return self.home / "checkpoints"

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    @property
    def broker_dir(self) -> Path:
        return self.home / "broker"

    @property
    def jars_dir(self) -> Path:
        return self.jars or self.home / "jars"

    @property
    def backbones_dir(self) -> Path:
        return self.backbones or self.home / "backbones"


def read_settings(home: Path | None = None) -> Settings:
    """Settings from the environment, with `home` from the command line on top; the home becomes absolute.

    Raises:
        ServiceError: a variable has a value that its setting does not take.
    """
    settings = _checked({} if home is None else {"home": home}, "IMAGESTREAM_{}")
    home = settings.home.expanduser().absolute()
    if set("[]") & set(str(home)):
        raise ServiceError(f"the home {home} has a square bracket in its path, which deltalake does not open: move it")
    return settings.model_copy(update={"home": home})


def with_options(settings: Settings, **options: str | None) -> Settings:
    """Settings with those options of a command on top that were given.

    Raises:
        ServiceError: an option has a value that its setting does not take.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return _checked(settings.model_dump() | given, "--{}")


def _checked(values: Mapping[str, Any], shown_as: str) -> Settings:
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"])
        name = name.upper() if "_" in shown_as else name.replace("_", "-")
        raise ServiceError(f"{shown_as.format(name)}: {first['msg']}, got {first['input']!r}") from error
