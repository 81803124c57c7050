"""The stream on a real broker, with real Spark, into real Delta tables."""

import hashlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from kafka import KafkaProducer
from PIL import Image
from pyspark.sql import SparkSession
from sklearn.datasets import load_sample_image

from producer import publish
from streaming.images.dataset import digit_images, write_images
from streaming.images.labels import labelled_features
from streaming.pipeline.decisions import Decision, Decisions
from streaming.predict import load
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.tables import Table
from tests.conftest import NewService, environment, environment_of, imagestream
from tests.faults.harness import Drained, rows, stream_during, versions
from tests.models import onnx_graphs as graphs
from tests.streaming.history import decision_of
from tests.streaming.small_models import bundle_folder

GOOD, MORE = 60, 20
LOAD, RATE = 120, 20  # images, published while the model is swapped, and images per second
BAD = {
    "empty.png": (b"", "empty"),
    "notes.txt": (b"this is text", "not_an_image"),
    "cut.jpg": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "truncated"),
}


def publish_digits(settings: Settings, folder: Path, count: int, skip: int) -> None:
    write_images(folder, digit_images(count, skip))
    assert imagestream(settings, "publish", folder, "--label-from", "parent")["sent"] == count


def publish_all(settings: Settings, folder: Path) -> None:
    """Publish 60 digits and three files of invalid images."""
    publish_digits(settings, folder / "digits", GOOD, skip=300)
    (folder / "bad").mkdir()
    for name, (data, _) in BAD.items():
        (folder / "bad" / name).write_bytes(data)
    imagestream(settings, "publish", folder / "bad")


def assert_profile_adds_up(profile: dict[str, Any]) -> None:
    """The measured times and the remainder equal the core time after the first micro-batch."""
    spent = profile["core_seconds"]
    assert {"fetch", "decode", "backbone", "projection", "classifier", "serialise", "write", "commit"} <= set(spent)
    assert all(seconds >= 0 for seconds in spent.values())
    assert sum(spent.values()) == pytest.approx(profile["wall_s"] * profile["cores"])
    assert spent["backbone"] > spent["projection"]
    assert 0 < profile["images"] < MORE


@pytest.fixture(scope="module")
def drained(new_service: NewService, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A service that has scored 60 digits and three invalid images; tests may add messages, but not change rows."""
    settings = new_service()
    publish_all(settings, tmp_path_factory.mktemp("published"))
    summary = imagestream(settings, "stream", "--until-drained")
    assert (summary["input"], summary["predicted"], sum(summary["quarantined"].values())) == (GOOD + 3, GOOD, 3)
    return settings


def test_each_message_gets_exactly_one_row(drained: Settings, tmp_path: Path) -> None:
    before = rows(drained, "SELECT count(*) AS n FROM predictions")[0]["n"]
    publish_digits(drained, tmp_path / "more", MORE, skip=400)

    more = imagestream(drained, "stream", "--until-drained", "--images-per-batch", "8", "--profile")

    assert (more["input"], more["predicted"]) == (MORE, MORE)
    assert_profile_adds_up(more["profile"])
    found = rows(drained, 'SELECT topic, partition, "offset" FROM predictions')
    assert len({tuple(row.values()) for row in found}) == len(found) == before + MORE
    for batch in rows(drained, "SELECT input_rows, predicted_rows, quarantined_rows FROM batches"):
        assert batch["input_rows"] == batch["predicted_rows"] + batch["quarantined_rows"]


def test_rows_record_their_source_and_model(drained: Settings) -> None:
    bundle = open_registry(drained.home).read(1)
    batches = {row["batch_id"]: row for row in rows(drained, "SELECT * FROM batches")}
    found = rows(drained, "SELECT * FROM predictions")
    assert len(found) >= GOOD
    for row in found:
        source = Path(row["source"])
        assert row["image_id"] == hashlib.sha256(source.read_bytes()).hexdigest()
        assert row["label_true"] == source.parent.name
        assert (row["model_version"], row["bundle_sha256"]) == (1, bundle.sha256)
        assert row["query_id"] == batches[row["batch_id"]]["query_id"]
        assert row["top_k"][0] == {"label": row["label"], "probability": row["confidence"]}
        assert row["published_at"] <= row["scored_at"]
        assert row["date"] == row["scored_at"].date()
    correct = sum(row["label"] == row["label_true"] for row in found)
    assert correct > len(found) / 2  # by chance: a tenth

    features = rows(drained, "SELECT image_id, features, backbone_sha256 FROM features WHERE topic IS NOT NULL")
    assert {row["image_id"] for row in features} == {row["image_id"] for row in found}
    assert {len(row["features"]) for row in features} == {bundle.manifest.backbone.n_features}
    assert {row["backbone_sha256"] for row in features} == {bundle.backbone_sha256}


def test_predict_equals_the_stream_bit_for_bit(drained: Settings) -> None:
    found = rows(drained, "SELECT source, image_id, label, confidence, top_k, damaged, model_version FROM predictions")
    bad = rows(drained, "SELECT source, image_id, stage, reason FROM quarantine")
    with environment(**environment_of(drained)):
        model = load(home=drained.home, threads=2)
    answers = {one.source: one.as_dict() for one in model.predict([row["source"] for row in found + bad], top=3)}
    for row in found + bad:
        assert {name: answers[row["source"]][name] for name in row} == row


def test_batches_record_drift_from_the_training_images(drained: Settings) -> None:
    found = rows(drained, "SELECT batch_id, predicted_rows, drift FROM batches ORDER BY batch_id")
    (first, *_) = [dict(row["drift"]) for row in found if row["predicted_rows"]]
    assert first["rows"] == GOOD
    assert 0 <= first["psi_mean"] <= first["psi_max"]
    assert first["mean_shift"] < 1  # digits from the same distribution
    assert 0 <= first["low_confidence"] <= 1
    assert first["window_rows"] == GOOD  # the first window is tested immediately
    assert first["p_value"] > first["p_limit"]
    assert first["alarm"] == 0


def test_non_images_are_quarantined_with_bytes_and_reason(drained: Settings) -> None:
    found = {Path(row["source"]).name: row for row in rows(drained, "SELECT * FROM quarantine")}
    assert {name: (row["value"], row["reason"]) for name, row in found.items()} == BAD
    for row in found.values():
        assert row["value_sha256"] == hashlib.sha256(row["value"]).hexdigest()
        assert row["model_version"] == 1
        assert row["replayed_at"] is None


def test_start_without_new_messages_changes_nothing(drained: Settings) -> None:
    before = versions(drained)
    again = imagestream(drained, "stream", "--until-drained")
    assert (again["input"], again["batches"]) == (0, 0)
    assert versions(drained) == before


def test_photographs_of_12_to_50_megapixels_are_predicted(drained: Settings, tmp_path: Path) -> None:
    sizes = {
        "12": (4032, 3024),
        "24.5": (5712, 4284),
        "48": (8064, 6048),
        "50": (8192, 6144),
    }  # of telephone cameras
    folder = tmp_path / "0"
    folder.mkdir()
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    for name, size in sizes.items():
        photograph.resize(size, Image.Resampling.NEAREST).save(folder / f"{name} megapixels.jpg", quality=85)
    published = imagestream(drained, "publish", folder, "--label-from", "parent")
    assert published["sent"] == len(sizes)
    publish_digits(drained, tmp_path / "digits", len(sizes), skip=500)

    summary = imagestream(drained, "stream", "--until-drained")

    assert (summary["input"], summary["predicted"], summary["quarantined"]) == (8, 8, {})
    found = rows(drained, "SELECT source, label, damaged FROM predictions WHERE source LIKE '%megapixels.jpg'")
    assert {Path(row["source"]).name for row in found} == {f"{name} megapixels.jpg" for name in sizes}
    assert not any(row["damaged"] for row in found)
    assert len({row["label"] for row in found}) == 1  # the same picture


def test_decided_batch_is_finished_without_broker_and_model(service: Settings, tmp_path: Path) -> None:
    publish_all(service, tmp_path)
    imagestream(service, "stream", "--until-drained")
    newest = DeltaTable(service.place.table("batches")).version()
    log = Path(service.place.tables) / "batches" / "_delta_log"
    (log / f"{newest:020}.json").unlink()  # as after a crash before the commit to `batches`
    shutil.rmtree(service.work_dir / "models")
    no_broker = service.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})

    stderr = imagestream(no_broker, "stream", "--until-drained", code=1)["stderr"]

    assert "no Kafka broker answers" in stderr
    batches = rows(service, "SELECT batch_id, model_version, input_rows FROM batches")
    assert batches == [{"batch_id": 1, "model_version": 1, "input_rows": GOOD + len(BAD)}]
    assert rows(service, "SELECT count(*) AS n FROM predictions") == [{"n": GOOD}]
    assert rows(service, "SELECT count(*) AS n FROM quarantine") == [{"n": len(BAD)}]
    assert imagestream(service, "audit")["clean"]


def test_stream_continues_without_its_streams_folder(service: Settings, tmp_path: Path) -> None:
    publish_all(service, tmp_path)
    imagestream(service, "stream", "--until-drained", "--images-per-batch", 40)
    newest = DeltaTable(service.place.table("batches")).version()
    log = Path(service.place.tables) / "batches" / "_delta_log"
    (log / f"{newest:020}.json").unlink()  # the last batch was not completed
    shutil.rmtree(service.work_dir / "streams")

    resumed = imagestream(service, "stream", "--until-drained")

    assert 0 < resumed["input"] < GOOD + len(BAD)
    found = rows(service, 'SELECT topic, partition, "offset", query_id FROM predictions')
    assert len({(row["partition"], row["offset"]) for row in found}) == len(found) == GOOD
    assert len({row["query_id"] for row in found}) == 2
    assert rows(service, "SELECT count(*) AS n FROM quarantine") == [{"n": len(BAD)}]
    assert imagestream(service, "audit")["clean"]


class Rival:
    """A concurrent driver that decides `losses` batches just before the tested driver does."""

    def __init__(self, settings: Settings, losses: int) -> None:
        self._settings = settings
        self._decide = Decisions.decide
        self.left = losses

    def __call__(self, decisions: Decisions, ours: Decision) -> bool:
        if self.left:
            self.left -= 1
            ranges = {one.partition: (one.start, one.start + 1) for one in ours.ranges}
            rival = decision_of(self._settings, ours.number, ranges, stream_id=ours.stream)
            assert self._decide(decisions, replace(rival, topics=ours.topics))
        return self._decide(decisions, ours)


def test_driver_applies_winning_decisions_and_stops_after_three_losses(
    service: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after three losses, and continues after two."""
    publish_digits(service, tmp_path / "digits", GOOD, skip=300)
    for losses in (3, 2):
        rival = Rival(service, losses)

        def decide(decisions: Decisions, ours: Decision, rival: Rival = rival) -> bool:
            return rival(decisions, ours)

        with monkeypatch.context() as patch:
            patch.setattr(Decisions, "decide", decide)
            ended = imagestream(service, "stream", "--until-drained", code=int(losses == 3))
        assert rival.left == 0
        if losses == 3:
            assert "another stream is running on" in ended["stderr"]
    assert rows(service, "SELECT count(*) AS n FROM predictions") == [{"n": GOOD}]
    report = imagestream(service, "audit")
    assert (report["clean"], report["batches"]) == (True, 3 + 2 + 1)


def test_labelled_images_under_two_keys_are_all_in_training(
    service: Settings, spark: SparkSession, tmp_path: Path
) -> None:
    digits = list(digit_images(GOOD, 300))
    producer = KafkaProducer(bootstrap_servers=service.bootstrap_servers)
    for number, (_, label, data) in enumerate(digits):
        headers = [("label", label.encode())] if number % 2 else []
        producer.send(service.topic, data, b"camera %d" % (number % 2), headers).get(300)
    producer.close()
    imagestream(service, "stream", "--until-drained")
    found = rows(service, "SELECT image_id, key FROM predictions")
    assert len({row["image_id"] for row in found}) == GOOD
    assert {row["key"] for row in found} == {b"camera 0", b"camera 1"}
    labels = tmp_path / "labels.csv"
    known = "".join(f"{hashlib.sha256(data).hexdigest()},{label}\n" for _, label, data in digits[::2])
    labels.write_text(f"image_id,label\n{known}")
    imagestream(service, "label", labels)
    features = Table(service.place.tables, "features")
    backbone = open_registry(service.home).read(1).backbone_sha256
    labelled = labelled_features(spark, features, backbone, group_by="key").select("image_id", "label", "group_id")
    expected = [
        (hashlib.sha256(data).hexdigest(), label, f"camera {n % 2}") for n, (_, label, data) in enumerate(digits)
    ]
    found = {tuple(row) for row in labelled.where("group_id LIKE 'camera%'").collect()}  # without the training images
    assert found == {*expected}


@pytest.mark.usefixtures("spark")  # a new session would create its sockets' folder in `scratch`
def test_spark_checkpoint_is_removed(service: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    publish_digits(service, tmp_path / "digits", 3, skip=300)
    assert imagestream(service, "stream", "--until-drained")["input"] == 3
    assert not list(scratch.glob("imagestream-*"))
    assert not (service.work_dir / "checkpoints").exists()


def test_challenger_is_scored_in_shadow_only(service: Settings, tmp_path: Path) -> None:
    registry = open_registry(service.home)
    second = registry.register(
        lambda directory: _copy_with_other_metrics(bundle_folder(service.work_dir, 1), directory)
    )
    imagestream(service, "models", "promote", second, "--alias", "challenger")
    publish_all(service, tmp_path)
    imagestream(service, "stream", "--until-drained")
    assert rows(service, "SELECT DISTINCT model_version AS v FROM predictions") == [{"v": 1}]
    shadow = rows(service, "SELECT * FROM shadow")
    assert len(shadow) == GOOD
    assert {row["model_version"] for row in shadow} == {second}
    # The challenger has the same weights under another version, and so the same answers.
    assert all(
        (row["label"], row["confidence"]) == (row["champion_label"], row["champion_confidence"]) for row in shadow
    )


def test_champion_is_replaced_by_an_imported_model_under_load(service: Settings, tmp_path: Path) -> None:
    early = write_images(tmp_path / "images" / "early", digit_images(LOAD - MORE))
    late = write_images(tmp_path / "images" / "late", digit_images(MORE, skip=LOAD - MORE))
    network = graphs.save(graphs.classifier(), tmp_path / "network.onnx")
    (tmp_path / "names").write_text("\n".join(f"digit {n}" for n in range(10)))
    registry, servers = open_registry(service.home), str(service.bootstrap_servers)
    made: dict[str, Any] = {}

    def swap(stream: Drained) -> None:
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(publish, [early], rate=RATE, bootstrap_servers=servers, topic=service.topic)
            stream.wait_for(lambda: stream.rows > 0)
            arguments = ("import", network, "--classes", tmp_path / "names", "--alias", "champion")
            made.update(imagestream(service, "models", *arguments))
            assert load.result().complete
        imagestream(service, "publish", late)  # scored by the new model even on a slow machine
        stream.wait_for(lambda: stream.rows >= LOAD)

        first = bundle_folder(service.work_dir, 1)
        third = registry.register(lambda directory: _copy_with_other_metrics(first, directory))
        registry.promote(third, by="test", why="test")
        (bundle_folder(service.work_dir, third) / "classifier.npz").write_bytes(b"broken")
        publish_digits(service, tmp_path / "images" / "third", MORE, skip=LOAD)
        stream.wait_for(lambda: stream.rows >= LOAD + MORE)

    stream = stream_during(service, swap)
    assert (stream.restarts, stream.troubles) == (0, [])
    found = rows(service, 'SELECT * FROM predictions ORDER BY partition, "offset"')
    assert len({(row["partition"], row["offset"]) for row in found}) == len(found) == LOAD + MORE
    assert {row["image_id"] for row in found} == {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "images").rglob("*.png")
    }
    bundles = {1: registry.read(1).sha256, 2: made["bundle_sha256"]}
    batches = {row["batch_id"]: row["model_version"] for row in rows(service, "SELECT * FROM batches")}
    assert set(batches.values()) == {1, 2}
    for row in found:
        version = row["model_version"]
        assert (version, row["bundle_sha256"]) == (batches[row["batch_id"]], bundles[version])
        assert row["label"].startswith("digit ") == (version == 2)
    for earlier, later in pairwise(found):
        assert earlier["partition"] < later["partition"] or earlier["model_version"] <= later["model_version"]
    (third,) = stream.refused
    (refused,) = rows(service, "SELECT DISTINCT refused FROM batches WHERE refused IS NOT NULL")
    assert f"version {third}: " in refused["refused"]
    assert "classifier.npz has SHA-256" in refused["refused"]


def _copy_with_other_metrics(source: Path, target: Path) -> None:
    """Copy a bundle with a changed manifest, which gives it another SHA-256."""
    shutil.copytree(source, target)
    manifest = target / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"holdout_rows": ', '"holdout_rows":  ', 1))
    assert manifest.read_text() != text
