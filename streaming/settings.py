"""The settings of a process: read from the environment once, at the edge, then passed down and never changed."""

from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from streaming.errors import ServiceError

HOME = Path(".imagestream")

TOPIC = r"^[a-zA-Z0-9._-]{1,249}$"  # as Kafka has it
MASTER = r"^(local(-cluster)?(\[[0-9*, ]+\])?|yarn|(spark|k8s)://.+)$"
MEMORY = r"^[1-9][0-9]*[kmgtKMGT]$"


class Settings(BaseSettings):
    """Every setting, each from `IMAGESTREAM_<NAME>` unless given; derived places are computed here and nowhere else."""

    model_config = SettingsConfigDict(env_prefix="IMAGESTREAM_", frozen=True, extra="ignore")

    home: Path = Field(HOME, description="where tables, checkpoints, models, jars and the broker's data live")
    jars: Path | None = Field(None, description="where the jars are; default: HOME/jars")
    bootstrap_servers: str | None = Field(None, description="Kafka brokers, host:port,…; default: the home's broker")
    topic: str = Field("images", pattern=TOPIC, description="the Kafka topic that images are published to")
    master: str = Field("local[*]", pattern=MASTER, description="the Spark master")
    driver_memory: str = Field("2g", pattern=MEMORY, description="memory of Spark's JVM in local mode, e.g. 2g")

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


def read_settings(home: Path | None = None) -> Settings:
    """Settings from the environment, with `home` from the command line on top; the home becomes absolute.

    Raises:
        ServiceError: a variable has a value that its setting does not take.
    """
    try:
        settings = Settings() if home is None else Settings(home=home)
    except ValidationError as error:
        first = error.errors()[0]
        name = "IMAGESTREAM_" + "_".join(str(part) for part in first["loc"]).upper()
        raise ServiceError(f"{name}: {first['msg']}, got {first['input']!r}") from error
    return settings.model_copy(update={"home": settings.home.expanduser().absolute()})
