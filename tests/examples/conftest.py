"""Runs examples as their READMEs describe, each in a separate home, on the broker and Spark session of the tests."""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import pytest
import typer

from examples.service import Service
from streaming.settings import Settings
from tests.conftest import SPARK, environment, environment_of, imagestream

Options = tuple[str | float, ...]
RunExample = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_example(broker: Settings, tmp_path_factory: pytest.TempPathFactory) -> RunExample:
    """Runs `python -m examples.NAME` in this process; returns the outcome that it writes, with its `home`.

    `small` are options by command, which are added to the example's to make its models small.
    """

    def run(
        name: str, *arguments: str | Path | int, small: Mapping[str, Options] = MappingProxyType({})
    ) -> dict[str, Any]:
        home = tmp_path_factory.mktemp(name) / "home"
        outcome = home.parent / "outcome.json"
        example = typer.Typer()
        example.command()(import_module(f"examples.{name}.__main__").main)
        SPARK.start(home.parent, broker.jars_dir)
        settings = broker.model_copy(update={"topic": f"{name}-{uuid4().hex[:8]}"})

        def in_this_process(service: Service, *words: str | Path | float) -> dict[str, Any]:
            return imagestream(service.settings, *map(str, [*words, *small.get(str(words[0]), ())]))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Service, "run", in_this_process)
            with environment(IMAGESTREAM_HOME=str(broker.home), **environment_of(settings)):
                example([*map(str, arguments), "--home", str(home), "--json", str(outcome)], standalone_mode=False)
        found: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
        return found | {"home": home}

    return run
