"""The settings of a process: read once at startup, then passed explicitly and never changed.

A command's option takes precedence over the environment, the environment over the configuration file, and the file over
the default. Only this module reads the environment.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from models.bad_image import Limits
from streaming.config_file import DEFAULT_FILE, nearest, read_config_file
from streaming.durations import parse_duration, show_duration
from streaming.errors import ServiceError, UsageError
from streaming.sizes import parse_size
from streaming.storage.home import Home
from streaming.storage.home_path import invalid_reason
from streaming.storage.store import check_place, is_uri
from streaming.user_cache import cached

HOME = ".imagestream"
PREFIX = "IMAGESTREAM_"

TOPIC = r"^[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,248}$"  # Kafka's rule without a leading dot: it is also a folder name
MASTER = r"^(local(-cluster)?(\[[0-9*, ]+\])?|yarn|(spark|k8s)://.+)$"
MEMORY = r"^[1-9][0-9]*[kmgtKMGT]$"
PROVIDERS = r"^[a-z]{1,20}(,[a-z]{1,20}){0,7}$"
REGISTRY = r"^https?://(\[[0-9a-fA-F:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{1,5})?(/[^\s?#@]*)?$"
USERNAME = r"^[^\s,=\"\\]{1,200}$"  # needs no escaping in Kafka's configuration


def _seconds(value: Any) -> Any:
    """Parse a duration in seconds; values other than text are left to pydantic."""
    return _duration(value, "s") if isinstance(value, str) else value


def _retention(value: Any) -> Any:
    """Normalise a retention; a plain number is in hours."""
    return show_duration(_duration(value, "h"))


def _duration(value: Any, plain: str) -> float:
    try:
        return parse_duration(value, plain=plain)
    except UsageError as error:
        raise ValueError(str(error)) from error  # as pydantic requires


Duration = Annotated[float, BeforeValidator(_seconds)]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Variables(EnvSettingsSource):
    """The environment variables of the settings.

    Variables of Kubernetes services are ignored: a service called imagestream-gateway sets IMAGESTREAM_GATEWAY_PORT to
    tcp://10.0.0.1:80.
    """

    def __call__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__call__().items() if not re.match("(tcp|udp)://", str(value))}


class Settings(BaseSettings):
    """All settings, read from `IMAGESTREAM_<NAME>` unless given, and the paths derived from them."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", populate_by_name=True)

    home: str = Field(HOME, description="home of tables, streams and models: a folder, or an s3://, gs:// or az:// URI")
    work: Path | None = Field(
        None, description="local folder for logs, caches and the broker's data; default: the home if it is local"
    )
    jars: Path | None = Field(
        None,
        description="folder of the jars; default: WORK/jars if it exists, else one per user in ~/.cache/imagestream",
    )
    backbones: Path | None = Field(None, description="folder of exported backbones; default: as for jars")
    bootstrap_servers: str | None = Field(None, description="Kafka brokers, host:port,…; default: the home's broker")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="Kafka security protocol: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
    )
    kafka_sasl_mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism: SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN"
    )
    kafka_username: str | None = Field(None, pattern=USERNAME, description="user name for SASL")
    kafka_password_file: Path | None = Field(None, description="file containing the password for SASL")
    kafka_ca_file: Path | None = Field(
        None,
        description="PEM file of the certificate authorities that brokers' certificates are verified with; default: "
        "the system's",
    )
    kafka_certificate_file: Path | None = Field(
        None, description="PEM file of the client certificate, if brokers require one"
    )
    kafka_key_file: Path | None = Field(None, description="PEM file (PKCS#8) of the client certificate's key")
    topic: str = Field("images", pattern=TOPIC, description="Kafka topic that images are published to")
    answers_topic: str | None = Field(
        None, pattern=TOPIC, description="Kafka topic that the stream sends its predictions to; default: none"
    )
    answers: Literal["predictions", "quarantine", "both"] = Field(
        "predictions", description="rows sent to the answers topic: predictions, quarantine or both"
    )
    answers_format: Literal["json", "avro"] = Field(
        "json", description="format of the values in the answers topic: json or avro"
    )
    answers_bootstrap_servers: str | None = Field(
        None, description="Kafka brokers of the answers topic, host:port,…; default: those of the images"
    )
    isolation: Literal["read_committed", "read_uncommitted"] = Field(
        "read_committed",
        description="Kafka isolation level: read_committed, which skips aborted transactions, or read_uncommitted",
    )
    schema_registry: str | None = Field(
        None,
        pattern=REGISTRY,
        description="URL of the schema registry (Confluent API) used by `--payload avro:FIELD` and Avro answers",
    )
    master: str = Field(
        "local[*,4]", pattern=MASTER, description="Spark master; in local mode local[CORES,TASK_ATTEMPTS]"
    )
    driver_memory: str = Field("2g", pattern=MEMORY, description="memory of Spark's JVM in local mode, e.g. 2g")
    engine: Literal["auto", "litert", "onnx"] = Field(
        "auto", description="inference engine of the CNN: litert, onnx, or auto (the fastest that reproduces the model)"
    )
    execution_providers: str = Field(
        "cpu",
        pattern=PROVIDERS,
        description="execution providers of ONNX Runtime in order of preference: cpu, cuda, tensorrt, openvino, …",
    )
    dashboard_token_file: Path | None = Field(
        None, description="file containing the dashboard's access token; default: none, on loopback only"
    )
    gateway_api_key_file: Path | None = Field(
        None, description="file containing the gateway's API keys, one per line; default: none, on loopback only"
    )
    images_per_batch: int = Field(2_000, ge=1, description="maximum number of images in a micro-batch")
    megabytes_per_batch: int = Field(512, ge=1, description="maximum size of a micro-batch in MiB")
    metrics_host: str = Field(
        "127.0.0.1", min_length=1, description="address on which the stream serves metrics and health"
    )
    metrics_port: Port | None = Field(
        None, description="port of the stream's metrics (Prometheus) and health; 0: any free port; default: none"
    )
    log_format: Literal["text", "json"] = Field("text", description="format of the log: text or json")
    broker_port: Port | None = Field(
        None, ge=1, description="port of the embedded broker; default: the previous port, 9092, or any free port"
    )
    dashboard_port: Port = Field(8501, description="port of the dashboard; 0: any free port")
    gateway_port: Port = Field(8080, description="port of the gateway; 0: any free port")
    gateway_requests_per_minute: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="maximum number of gateway requests per client address and minute; 0: no limit",
    )
    gateway_key_requests_per_minute: int = Field(
        0, ge=0, le=1_000_000, description="maximum number of gateway requests per API key and minute; 0: no limit"
    )
    gateway_total_requests_per_minute: int = Field(
        0, ge=0, le=1_000_000, description="maximum number of gateway requests of all clients per minute; 0: no limit"
    )
    retention: Annotated[str, BeforeValidator(_retention)] = Field(
        "7d", description="time for which maintenance keeps unused files; at least 24h"
    )
    max_pixels: int = Field(
        64_000_000, ge=1, le=1_000_000_000, description="maximum number of pixels (width times height) of an image"
    )
    decode_timeout: Duration = Field(
        10.0, gt=0, le=3600, description="maximum CPU time for decoding one image, e.g. 10s"
    )
    decode_memory: str = Field("1g", pattern=MEMORY, description="maximum memory for decoding one image, e.g. 1g")
    strict_images: bool = Field(
        False, description="quarantine damaged images that could still be decoded: true or false"
    )
    mlflow_tracking_uri: str | None = Field(
        None,
        validation_alias="MLFLOW_TRACKING_URI",
        description="URL of the MLflow server to which training runs are reported",
    )
    config: Path | None = Field(None, description="configuration file; default: imagestream.toml, if it exists")

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # the other sources are not used
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Variables(settings_cls)

    @field_validator("home", mode="before")
    @classmethod
    def _path_as_text(cls, home: Any) -> Any:
        return os.fspath(home) if isinstance(home, Path) else home

    @property
    def place(self) -> Home:
        """The home and its layout."""
        return _home(str(self.home), self.work_dir)

    @property
    def work_dir(self) -> Path:
        return self.work or Path(self.home)

    @property
    def broker_dir(self) -> Path:
        return self.work_dir / "broker"

    @property
    def jars_dir(self) -> Path:
        return self.jars or cached("jars", self.work_dir)

    @property
    def image_limits(self) -> Limits:
        """Limits on decoding an image."""
        return Limits(
            max_pixels=self.max_pixels,
            timeout_s=self.decode_timeout,
            memory_bytes=parse_size(self.decode_memory),
            strict=self.strict_images,
        )

    @property
    def retention_hours(self) -> int:
        """The retention in hours, rounded up."""
        return math.ceil(parse_duration(self.retention) / 3_600)

    @property
    def backbones_dir(self) -> Path:
        return self.backbones or cached("backbones", self.work_dir)


@cache
def _home(uri: str, work: Path) -> Home:
    return Home(uri, work)  # cached: it keeps its store open


@dataclass(frozen=True)
class Configuration:
    """The settings and where their values come from.

    Attributes:
        origins: setting name → origin of its value, for settings that are not at their default.
        warnings: a line for each unknown variable IMAGESTREAM_….
    """

    settings: Settings
    origins: Mapping[str, str]
    warnings: Sequence[str] = ()


def read_settings(home: str | Path | None = None, config: Path | None = None, **given: Any) -> Settings:
    """Return the settings; arguments and errors as for `read_configuration`."""
    return read_configuration(home, config, **given).settings


def read_configuration(home: str | Path | None = None, config: str | Path | None = None, **given: Any) -> Configuration:
    """Read the settings from the command line, the environment and the configuration file.

    Args:
        home: the value of `--home`; a path becomes absolute.
        config: the value of `--config`; default: IMAGESTREAM_CONFIG, else `imagestream.toml` in the working directory.
        given: the options of other settings, by name.

    Raises:
        ServiceError: a value is invalid for its setting, or the file is not as `read_config_file` expects it.
    """
    given |= {"home": home, "config": config}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    variables = _from_environment()
    file, written = _from_file(options.get("config", variables.get("config")))
    # The environment takes precedence over the file; pydantic reads it for settings that are not passed.
    from_file = {name: value for name, value in written.items() if name not in variables}
    if file is not None:
        options["config"] = file
    origins = (
        {name: f"{file}: {name}" for name in from_file}
        | {name: variable_of(name) for name in variables}
        | {name: option_of(name) for name in options}
    )
    if config is None and file is not None:
        origins["config"] = variable_of("config") if "config" in variables else "the working directory"
    settings = _checked(from_file | options, origins)
    return Configuration(settings.model_copy(update=_places(settings, origins)), origins, unknown_variables())


def _places(settings: Settings, origins: Mapping[str, str]) -> dict[str, Any]:
    """Return the home as an absolute path or a URI, and every other path as an absolute path.

    Child processes run in other working directories, where a relative path would be a different one.
    """
    try:
        home = check_place(settings.home) if is_uri(settings.home) else _real(Path(settings.home))
    except ServiceError as error:
        raise UsageError(f"{origins.get('home', 'home')}: {error}") from error
    if not is_uri(home) and (why := invalid_reason(home)):
        raise UsageError(f"the home {home!r} {why}: choose another with --home DIR or IMAGESTREAM_HOME")
    given = {name: getattr(settings, name) for name in Settings.model_fields if is_place(name) and name != "home"}
    places = {name: None if path is None else _absolute(path) for name, path in given.items()}
    if is_uri(home) and settings.work is None:
        places["work"] = _work_of(home)
    return {"home": home, **places}


def _work_of(uri: str) -> Path:
    """Return the default work folder of a home in a bucket."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return _absolute(Path(state)) / "imagestream" / hashlib.sha256(uri.encode()).hexdigest()[:16]


def _real(home: Path) -> str:
    """Resolve links, as deltalake does, so that every path to a home gives the same name."""
    return os.path.realpath(_absolute(home))


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # no home directory
        raise UsageError(f"{path} cannot be resolved ({error}): set HOME, or IMAGESTREAM_WORK to a folder") from error


def with_options(settings: Settings, **options: str | None) -> Settings:
    """Return the settings overridden by the options that are not None.

    Raises:
        UsageError: an option is invalid for its setting.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return _checked(settings.model_dump() | given, {name: option_of(name) for name in given})


def variable_of(name: str) -> str:
    """Return the name of a setting's environment variable."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"{PREFIX}{name.upper()}"


def option_of(name: str) -> str:
    """Return the name of a setting's option."""
    return f"--{name.replace('_', '-')}"


def unknown_variables() -> list[str]:
    """Return a warning for each variable IMAGESTREAM_… that is not a setting, such as a misspelt one."""
    known = {variable_of(name) for name in Settings.model_fields}
    found = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known and not _is_link(name))
    return [f"{name} is not a setting, {nearest(name, known)}" for name in found]


def _is_link(name: str) -> bool:
    """Return whether Kubernetes set the variable for a service whose name begins with `imagestream`."""
    return re.fullmatch(r".*_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP)(_\w+)?)?)", name) is not None


def is_place(name: str) -> bool:
    """Return whether a setting is or may be a path."""
    if name == "home":
        return True
    annotation = Settings.model_fields[name].annotation
    return Path in (annotation, *get_args(annotation))


def cloud_variables() -> frozenset[str]:
    """Return the names of the cloud providers' variables that are set; obstore and deltalake read them."""
    clouds = ("AWS_", "AZURE_", "GOOGLE_")
    return frozenset(name for name, value in os.environ.items() if name.startswith(clouds) and value)


def _from_environment() -> dict[str, Any]:
    names = {variable_of(name): name for name in Settings.model_fields}
    return {names.get(key, key): value for key, value in _Variables(Settings)().items()}


def _from_file(chosen: str | Path | None) -> tuple[Path | None, dict[str, Any]]:
    """Return the configuration file, if there is one, and its values."""
    file = Path(chosen).expanduser() if chosen else DEFAULT_FILE  # an empty variable counts as unset
    if not chosen and not file.is_file():
        return None, {}
    names = Settings.model_fields.keys() - {"config"}  # a file cannot include another
    return file.absolute(), read_config_file(file, names, {name for name in names if is_place(name)})


def _checked(values: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        name = next((name for name in Settings.model_fields if key in {name, variable_of(name)}), key)
        origin = origins.get(name, variable_of(name) if name in Settings.model_fields else name)
        why = first["msg"].removeprefix("Value error, ")
        got = "" if ", got " in why else f", got {first['input']!r}"
        raise UsageError(f"{origin}: {why}{got}") from error
