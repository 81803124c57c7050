"""The Python interface of imagestream, and the entry point of the command line.

    import imagestream

    model = imagestream.load()
    for answer in model.predict("photos/"):
        print(answer.source, answer.label, answer.confidence, answer.reason)

Every name is imported when it is first used: `import imagestream` loads nothing else. See docs/python.md.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from models.errors import ModelError
    from producer.errors import PublishError
    from producer.publish import Progress, PublishSummary
    from streaming.answers import predictions, quarantine
    from streaming.answers import sql as query
    from streaming.errors import (
        ConfigurationError,
        ConflictError,
        DamagedError,
        DataError,
        NotFoundError,
        ServiceError,
        UnavailableError,
        UncheckedError,
        UsageError,
    )
    from streaming.extras import MissingExtraError
    from streaming.follow import Answer, PositionError, follow
    from streaming.model_versions import (
        RegisteredModel,
        clear_challenger,
        delete_version,
        export_version,
        import_model,
        model_versions,
        promote,
        rollback,
    )
    from streaming.predict import ClassProbability, Model, Prediction, PredictionList, load

    __version__: str

__all__ = [
    "Answer", "ClassProbability", "ConfigurationError", "ConflictError", "DamagedError", "DataError",
    "MissingExtraError", "Model", "ModelError", "NotFoundError", "PositionError", "Prediction", "PredictionList",
    "Progress", "PublishError", "PublishSummary", "RegisteredModel", "ServiceError", "UnavailableError",
    "UncheckedError", "UsageError", "__version__", "clear_challenger", "delete_version", "export_version", "follow",
    "import_model", "load", "model_versions", "predictions", "promote", "publish", "quarantine", "query", "rollback",
]  # fmt: skip

PACKAGES = ("models", "producer", "streaming")
MARKER = 'DISTRIBUTION = "imagestream"'  # a line of each package's __init__.py

_MODULES = {
    "models.errors": ("ModelError",),
    "producer.errors": ("PublishError",),
    "producer.publish": ("Progress", "PublishSummary"),
    "streaming.answers": ("predictions", "quarantine"),
    "streaming.errors": (
        *("ConfigurationError", "ConflictError", "DamagedError", "DataError", "NotFoundError"),
        *("ServiceError", "UnavailableError", "UncheckedError", "UsageError"),
    ),
    "streaming.extras": ("MissingExtraError",),
    "streaming.follow": ("Answer", "PositionError", "follow"),
    "streaming.model_versions": (
        "RegisteredModel", "clear_challenger", "delete_version", "export_version", "import_model", "model_versions",
        "promote", "rollback",
    ),
    "streaming.predict": ("ClassProbability", "Model", "Prediction", "PredictionList", "load"),
}  # fmt: skip
_HOMES = {name: (module, name) for module, names in _MODULES.items() for name in names} | {
    "query": ("streaming.answers", "sql")
}


def publish(
    paths: "Iterable[str | os.PathLike[str]]",
    *,
    topic: str | None = None,
    bootstrap_servers: str | None = None,
    home: "str | Path | None" = None,
    **options: Any,
) -> "PublishSummary":
    """Publish image files to Kafka, each as one acknowledged message.

    Args:
        paths: files, folders and patterns.
        topic: default: that of the settings.
        bootstrap_servers: addresses of the brokers, `host:port,…`; default: those of the settings, or the local broker.
        home: the home with the settings; default: that of the command line.
        options: options of `producer.publish.publish`, such as `label_from="parent"`.

    Raises:
        ServiceError: a setting is invalid, or the home has no broker.
        PublishError: a path, the topic or the broker cannot be used; nothing was sent.
    """
    _check_packages()
    from producer.publish import publish as send
    from streaming.platform.broker import bootstrap_servers as servers_of
    from streaming.platform.kafka_security import client_arguments
    from streaming.settings import read_settings, with_options

    settings = with_options(read_settings(home), topic=topic, bootstrap_servers=bootstrap_servers)
    given: dict[str, Any] = {"client": client_arguments(settings), "limits": settings.image_limits} | options
    return send(paths, bootstrap_servers=servers_of(settings), topic=settings.topic, **given)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("imagestream")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_packages()
    from streaming.extras import extras_named

    module, attribute = _HOMES[name]
    with extras_named():
        return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)


def main() -> None:
    """Run the command line."""
    if taken := _taken():
        sys.exit(f"error: {taken}")
    root = str(_root())
    if any(map(_hidden_by, PACKAGES)) and sys.path[0] != root:
        sys.path.insert(0, root)
    from streaming.cli import main as run

    run()


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


def _taken() -> str | None:
    """An error if another distribution has overwritten a package of imagestream; checked before importing it."""
    root = _root()
    for name in PACKAGES:
        file = root / name / "__init__.py"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if not any(line.startswith(MARKER) for line in text.splitlines()):
            return (
                f"the package {name!r} in {root} is another distribution's{_owners(name)}: install imagestream into a "
                "separate environment"
            )
    return None


def _owners(name: str) -> str:
    """The other distributions that installed a package, according to their metadata."""
    from importlib.metadata import packages_distributions

    owners = sorted({*packages_distributions().get(name, [])} - {"imagestream"})
    return f" ({', '.join(owners)})" if owners else ", such as mosaicml-streaming's 'streaming'"


def _hidden_by(name: str) -> str | None:
    """The file that would be imported in place of a package of imagestream; None if there is none."""
    loaded = sys.modules.get(name)
    found = PathFinder.find_spec(name) if loaded is None else loaded.__spec__
    place = None if found is None else found.origin
    ours = _root() / name / "__init__.py"
    return None if place is not None and Path(place).resolve() == ours else place or f"a package {name!r} elsewhere"


def _check_packages() -> None:
    """Raise ImportError if other packages would be imported in place of those of imagestream."""
    if taken := _taken():
        raise ImportError(taken)
    for name in PACKAGES:
        if place := _hidden_by(name):
            raise ImportError(
                f"{place} shadows imagestream's package {name!r}: rename it, or put {_root()} before it on "
                "the import path"
            )
