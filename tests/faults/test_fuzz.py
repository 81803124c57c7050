"""Fuzzing of every parser: decoding, scoring a partition, manifests, arrays and decisions."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import seed as hypothesis_seed
from hypothesis import settings as budget
from hypothesis import strategies as st

from models.arrays import read_npz, write_npz
from models.bundle import MANIFEST, Bundle, Manifest, parse_manifest, read_bundle
from models.decode import BadImage, Reason, Stage, decode
from models.errors import ModelError
from streaming.errors import ServiceError
from streaming.pipeline.decisions import Decision, ModelVersion
from streaming.pipeline.score import OUTPUT, REPORT, PartitionReport, ScoreTask, score_partition
from streaming.platform.engines import EngineChoice
from streaming.settings import Settings
from tests.faults.poison import BAD, GOOD, generator
from tests.forms import Form, Record
from tests.streaming.history import decision_of
from tests.streaming.small_models import bundle_folder

SIZE = (64, 64)
SEEDS = st.deferred(  # drawn from when a test runs: making them takes seconds
    lambda: st.sampled_from([kind.make(generator(0)) or b"" for kind in (*GOOD, *BAD) if not kind.heavy])
)


def _mutated(data: bytes, changes: list[tuple[str, float, int, bytes]], other: bytes) -> bytes:
    for kind, where, amount, new in changes:
        at = int(where * len(data))
        match kind:
            case "set":
                data = data[:at] + new + data[at + len(new) :]
            case "cut":
                data = data[:at] + data[at + amount :]
            case "insert":
                data = data[:at] + new + data[at:]
            case "repeat":
                data = data[:at] + data[at : at + amount] * amount + data[at + amount :]
            case _:
                data = data[:at] + other[int(where * len(other)) :]
    return data


# A fuzzer's change: kind, relative position, length, bytes.
CHANGE = st.tuples(
    st.sampled_from(["set", "cut", "insert", "repeat", "splice"]),
    st.floats(0, 1),
    st.integers(1, 64),
    st.binary(min_size=1, max_size=16),
)
MUTATED = st.builds(
    _mutated,
    SEEDS,
    st.lists(CHANGE, max_size=8),
    SEEDS,
)
ANY_BYTES = st.one_of(st.binary(max_size=300), MUTATED)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def fuzz(form: Form[int], seed: int) -> Any:
    """Decorator of a Hypothesis test that sets the run's seed and the number of examples in the short form."""

    def of(short: int) -> Any:
        examples = form(short * 100, short)
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        options = budget(max_examples=examples, deadline=None, database=None, suppress_health_check=checks)
        return lambda test: hypothesis_seed(seed)(options(test))

    return of


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Bundle:
    return read_bundle(bundle_folder(trained, 1))


def test_decoding_never_raises(fuzz: Any, form: Form[int], record: Record) -> None:
    seconds = [0.0]

    @fuzz(1_500)
    @given(ANY_BYTES)
    def check(data: bytes) -> None:
        clock = time.thread_time()
        got = decode(data, SIZE)
        seconds.append(time.thread_time() - clock)
        if isinstance(got, BadImage):
            assert (got.stage in Stage, got.reason in Reason, bool(got.detail)) == (True, True, True)
            assert "\n" not in got.detail
        else:
            assert (got.shape, got.dtype) == ((*SIZE, 3), np.uint8)

    check()
    record("fuzz: decode, examples and the slowest", "no error, ≤ 1 s", f"{len(seconds) - 1:,}, {max(seconds):.3f} s")


def test_scoring_never_raises_or_loses_a_row(fuzz: Any, bundle: Bundle, tmp_path: Path) -> None:
    header = st.fixed_dictionaries(
        {
            "key": st.none() | st.sampled_from(["label", "ce_source", "ce_id", ""]) | st.text(max_size=5),
            "value": st.none() | st.binary(max_size=40),
        }
    )
    message = st.fixed_dictionaries(
        {
            "key": st.none() | st.binary(max_size=400),
            "value": st.none() | ANY_BYTES,
            "headers": st.none() | st.lists(header, max_size=4),
        }
    )
    champion, engine = ModelVersion(1, bundle.sha256), EngineChoice("litert")
    task = ScoreTask(champion, None, engine, None, "q", 0, {}, str(tmp_path), str(tmp_path))

    @fuzz(40)
    @given(st.lists(message, min_size=1, max_size=6))
    def check(messages: list[dict[str, Any]]) -> None:
        out = pa.Table.from_batches(
            score_partition(iter([_spark_batch(messages)]), lambda: bundle, lambda: None, task), OUTPUT
        )
        reports = out.column(REPORT.name).drop_null().to_pylist()
        (report,) = [PartitionReport.from_json(text) for text in reports]
        predicted = out.num_rows - len(reports)
        assert predicted + sum(report.quarantined.values()) == report.input_rows == len(messages)
        assert (report.quarantine_file.rows if report.quarantine_file else 0) == sum(report.quarantined.values())
        assert (report.features_file.rows if report.features_file else 0) == predicted

    check()


def _spark_batch(messages: list[dict[str, Any]]) -> pa.RecordBatch:
    header = pa.struct([("key", pa.string()), ("value", pa.binary())])
    columns = {
        "key": pa.array([one["key"] for one in messages], pa.binary()),
        "value": pa.array([one["value"] for one in messages], pa.binary()),
        "topic": pa.array(["t"] * len(messages), pa.string()),
        "partition": pa.array([0] * len(messages), pa.int32()),
        "offset": pa.array(range(len(messages)), pa.int64()),
        "timestamp": pa.array([0] * len(messages), pa.timestamp("us", tz="UTC")),
        "headers": pa.array([one["headers"] for one in messages], pa.list_(header)),
    }
    return pa.RecordBatch.from_pydict(columns)


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))


def _replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = _replaced(content[path[0]], path[1:], value)
    return copy


def test_damaged_manifest_raises_only_model_error(fuzz: Any, trained: Path) -> None:
    text = (bundle_folder(trained, 1) / MANIFEST).read_bytes()
    content = json.loads(text)
    paths = list(_paths(content))

    @fuzz(300)
    @given(st.sampled_from(paths), JSON, st.lists(CHANGE, max_size=3))
    def check(path: tuple[Any, ...], value: Any, changes: list[tuple[str, float, int, bytes]]) -> None:
        changed = json.dumps(_replaced(content, path, value)).encode()
        try:
            manifest = parse_manifest(_mutated(changed, changes, text))
        except ModelError as error:
            assert str(error)  # noqa: PT017  both outcomes are correct
        else:
            assert isinstance(manifest, Manifest)
            manifest.check_dimensions()

    check()


def test_damaged_arrays_raise_only_model_error(fuzz: Any) -> None:
    valid = write_npz({"weights": np.eye(5, dtype=np.float32), "bias": np.zeros(5)})

    @fuzz(300)
    @given(st.lists(CHANGE, min_size=1, max_size=4))
    def check(changes: list[tuple[str, float, int, bytes]]) -> None:
        try:
            arrays = read_npz(_mutated(valid, changes, valid), "weights.npz")
        except ModelError as error:
            assert str(error).startswith("weights.npz ")  # noqa: PT017
        else:
            assert all(isinstance(array, np.ndarray) and not array.dtype.hasobject for array in arrays.values())

    check()


def test_damaged_decision_raises_only_service_error(fuzz: Any, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    text = decision_of(settings, 7, {0: (10, 14), 1: (0, 2)}, bad={11}, left_out={0: (8, 10)}).to_json()

    @fuzz(200)
    @given(st.lists(CHANGE, min_size=1, max_size=3))
    def check(changes: list[tuple[str, float, int, bytes]]) -> None:
        try:
            decision = Decision.from_json(_mutated(text, changes, text), "7.json")
        except ServiceError as error:
            assert "the decision 7.json " in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert Decision.from_json(decision.to_json(), "again") == decision

    check()
