"""A service with its home in a bucket: all commands, other readers of its tables, and secrecy of its key."""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from pyspark.sql import SparkSession

from streaming.dashboard.reader import Reader
from streaming.gateway.lookup import Lookup
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.store import open_store
from tests.conftest import command_here, environment, environment_of, imagestream
from tests.faults.harness import check_exactly_once, check_one_attempt, drain, rows, scored, send
from tests.faults.poison import samples
from tests.forms import Record
from tests.object_store import SECRET, ObjectStoreServer
from tests.store_proxy import Fault, Request, StoreProxy, at_random

GOOD, BAD, PER_BATCH = 30, 6, 12


@contextmanager
def proxied_store(server: ObjectStoreServer, spark: SparkSession) -> Iterator[StoreProxy]:
    """A proxy in front of the store, for this process and the workers of its Spark session.

    Not for `maintain`: one call of deltalake holds the GIL while it waits for the store, so the proxy cannot respond.
    """
    with StoreProxy(server.port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(proxy.port).items():
            patch.setenv(name, value)
            patch.setitem(spark.sparkContext.environment, name, value)
        yield proxy


class Outage:
    """Random faults, and one outage when the stream checks for a new model: consecutive requests are cut."""

    def __init__(self, rng: Random, requests: int) -> None:
        self.left = requests
        self._at_random = at_random(rng)
        self._followed = 0

    def __call__(self, request: Request) -> Fault | None:
        self._followed += "/models/aliases/0" in request.path
        if self._followed > 3 and self.left > 0:
            self.left -= 1
            return Fault.CUT
        return self._at_random(request)


def test_service_works_in_a_bucket_with_faults_and_an_outage(
    bucket_service: Settings,
    object_store: ObjectStoreServer,
    rng: Random,
    spark: SparkSession,
    tmp_path: Path,
    record: Record,
) -> None:
    service = bucket_service
    sent = send(service, samples(rng, good=GOOD, bad=BAD))
    outage = Outage(rng, 8)
    with proxied_store(object_store, spark) as proxy:
        proxy.faults = outage
        behind = service.model_copy(update={"work": tmp_path / "behind"})  # a separate store object for this home
        drained = drain(behind, images_per_batch=PER_BATCH)
    assert outage.left == 0
    assert any("does not answer" in trouble for trouble in drained.troubles), drained.troubles
    assert sum(batch.input_rows for batch in drained.batches) == GOOD + BAD
    assert len(drained.batches) > 1
    check_exactly_once(service, sent)
    check_one_attempt(service)
    harmed, total = proxy.harmed.total(), len(proxy.requests)
    record("bucket: stream, requests harmed", "10 % of PUTs, 3 % of GETs", f"{harmed} of {total:,}")
    record("bucket: stream, lost and repeated", "0, 0", "0, 0")

    (predicted,) = rows(service, "SELECT image_id, label FROM predictions LIMIT 1")
    lookup = Lookup(service.place)
    assert lookup.find(predicted["image_id"]).rows["predictions"][0]["label"] == predicted["label"]
    lookup.close()
    reader = Reader(service.place)
    reader.version("predictions")
    assert reader.rows("SELECT count(*) AS n FROM predictions") == [{"n": GOOD}]

    _check_readers(service, object_store, spark, tmp_path / "copy")
    _check_commands(service, predicted["image_id"], tmp_path)
    check_exactly_once(service, sent)
    _check_secret(service, tmp_path)


def _check_readers(service: Settings, server: ObjectStoreServer, spark: SparkSession, copy: Path) -> None:
    """DuckDB and deltalake read the bucket in the other checks; Spark reads a copy, as it has no S3 client."""
    place = service.place.table("predictions")
    options = {**server.environment(), "AWS_ALLOW_HTTP": "true"}
    import polars

    assert polars.read_delta(place, storage_options=options)["label"].len() == GOOD
    for stored in service.place.store.list("tables/predictions"):
        (copy / stored.key).parent.mkdir(parents=True, exist_ok=True)
        service.place.store.fetch(stored.key, copy / stored.key)
    assert spark.read.format("delta").load(str(copy / "tables/predictions")).count() == GOOD


def _check_commands(service: Settings, image_id: str, folder: Path) -> None:
    assert imagestream(service, "query", "SELECT label FROM predictions")["rows"] == GOOD
    assert imagestream(service, "audit")["clean"] is True
    assert imagestream(service, "status", code=1)["broker_up"] is True  # no stream is running
    assert imagestream(service, "replay")["complete"] is True
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image_id", "label"], [image_id, "3"]])
    imagestream(service, "label", folder / "labels.csv")
    version = imagestream(service, "retrain")["version"]  # with the features of the training run
    assert open_registry(service.home).versions() == [1, version]
    imagestream(service, "rescore", "--model", version)
    assert rows(service, "SELECT count(*) AS n FROM rescored") == [{"n": GOOD}]
    imagestream(service, "report")
    maintained = imagestream(service, "maintain")
    assert {table["name"]: table["files_after"] for table in maintained["tables"]}["quarantine"] == 1
    assert scored(service) == GOOD + BAD


def _check_secret(service: Settings, folder: Path) -> None:
    """No local file, no object and no output contains the secret key."""
    with environment(**environment_of(service)):
        _, out, err = command_here("--home", service.home, "config", "show")
    assert "s3://" in out + err
    assert SECRET not in out + err
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        assert SECRET.encode() not in path.read_bytes(), path
    store = open_store(service.home)
    for stored in store.list():
        assert SECRET.encode() not in (store.get(stored.key) or b""), stored.key
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
