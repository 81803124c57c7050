"""The object store: atomic creation despite races and lost responses; invalid keys and URIs."""

import io
import os
import pickle
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore.store as obstore_store
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streaming.errors import ServiceError
from streaming.storage import store_base as store_module
from streaming.storage.bucket_store import SHARED_VARIABLES, BucketStore, shared_variables
from streaming.storage.local_store import LocalStore
from streaming.storage.store import Store, open_store
from streaming.storage.store_base import check_key
from streaming.storage.store_errors import StoreAwayError
from tests.object_store import BUCKET, ObjectStoreServer
from tests.streaming.racers import run_at_once

CHECKOUT = Path(__file__).parents[3]


def in_memory() -> Store:
    return BucketStore("s3://bucket/home", obstore_store.MemoryStore())


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "home")
    if request.param == "memory":
        return in_memory()
    server: ObjectStoreServer = request.getfixturevalue("object_store")
    return open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}", server.options)


def keys(store: Store, prefix: str = "") -> list[str]:
    return sorted(one.key for one in store.list(prefix))


def test_stored_objects_are_found(store: Store) -> None:
    assert store.get("a/b/c") is None
    assert keys(store) == keys(store, "a") == store.folders() == []
    assert store.create("a/b/c", b"one")
    store.put("a/d", b"two")
    store.put("a/d", b"three")
    store.put("ab", b"")
    assert (store.get("a/b/c"), store.get("a/d"), store.get("ab"), store.get("a")) == (b"one", b"three", b"", None)
    assert keys(store) == ["a/b/c", "a/d", "ab"]
    assert keys(store, "a") == ["a/b/c", "a/d"]
    assert {one.key: one.bytes for one in store.list()} == {"a/b/c": 3, "a/d": 5, "ab": 0}
    assert [store.head("a/d", n) for n in (1, 5, 9)] == [b"t", b"three", b"three"]
    assert [store.size(key) for key in ("a/d", "ab", "a", "b")] == [5, 0, None, None]
    assert [store.head(key, 1) for key in ("ab", "a", "b")] == [b"", None, None]
    assert all(one.modified.tzinfo is not None for one in store.list())
    assert (store.folders(), store.folders("a")) == (["a"], ["b"])
    store.delete(["a/d", "never/there"])
    assert keys(store) == ["a/b/c", "ab"]


def test_second_create_changes_nothing(store: Store) -> None:
    assert store.create("one", b"first")
    assert not store.create("one", b"second")
    assert store.create("one", b"first")  # a retry, as after a lost response
    assert store.get("one") == b"first"


def test_undisputed_create_reads_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get", None)
        assert store.create("one", b"first")
    assert store.get("one") == b"first"


def test_one_of_several_threads_creates_a_key(store: Store) -> None:
    for number in range(5):
        barrier, won = threading.Barrier(8), []

        def create(writer: int, key: str, barrier: threading.Barrier, won: list[int]) -> None:
            barrier.wait()
            if store.create(key, b"%d" % writer):
                won.append(writer)

        threads = [threading.Thread(target=create, args=(n, f"race/{number}", barrier, won)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [store.get(f"race/{number}")] == [b"%d" % writer for writer in won]


RACER = """
import sys
from streaming.storage.store import open_store
store = open_store(sys.argv[1])
sys.stdout.write("ready\\n"); sys.stdout.flush()
sys.stdin.readline()
print(*(k for k in range(200) if store.create(f"race/{k}", sys.argv[2].encode())))
"""


def test_one_of_several_processes_creates_a_key(tmp_path: Path) -> None:
    outputs = run_at_once(RACER, [(tmp_path, number) for number in range(3)])
    won = {str(number): keys.split() for number, keys in enumerate(outputs)}
    assert sorted(int(key) for of_one in won.values() for key in of_one) == list(range(200))
    stored = {one.key: open_store(tmp_path).get(one.key) for one in open_store(tmp_path).list("race")}
    assert stored == {f"race/{key}": number.encode() for number, of_one in won.items() for key in of_one}


class Unreliable(LocalStore):
    """A local store with faults before or after its puts."""

    def __init__(self, root: Path, *faults: Callable[[Callable[[], bool]], bool]) -> None:
        super().__init__(root)
        self.faults = list(faults)

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        def put() -> bool:
            return super(Unreliable, self)._put_if_absent(key, data)

        return self.faults.pop(0)(put) if self.faults else put()


def response_lost(put: Callable[[], bool]) -> bool:
    put()
    raise StoreAwayError("connection closed")


def request_lost(put: Callable[[], bool]) -> bool:
    raise StoreAwayError("timeout")


def stored_and_conflict(put: Callable[[], bool]) -> bool:
    put()
    return False


def conflict_without_object(put: Callable[[], bool]) -> bool:
    return False


FAULTS = [response_lost, request_lost, stored_and_conflict, conflict_without_object]


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PAUSE_S", (0.0, 0.0))


@pytest.mark.parametrize("fault", FAULTS)
def test_lost_response_is_resolved_by_reading_back(no_pause: None, tmp_path: Path, fault: Any) -> None:
    store = Unreliable(tmp_path, fault, fault)
    assert store.create("one", b"ours")
    assert store.get("one") == b"ours"


@pytest.mark.parametrize("fault", FAULTS)
def test_lost_response_does_not_hide_an_earlier_create(no_pause: None, tmp_path: Path, fault: Any) -> None:
    assert LocalStore(tmp_path).create("one", b"theirs")
    assert not Unreliable(tmp_path, fault).create("one", b"ours")
    assert LocalStore(tmp_path).get("one") == b"theirs"


def test_late_put_of_another_writer_wins_over_the_retry(no_pause: None, tmp_path: Path) -> None:
    def other_put_arrives(put: Callable[[], bool]) -> bool:
        LocalStore(tmp_path).create("one", b"theirs")
        raise StoreAwayError("timeout")

    assert not Unreliable(tmp_path, request_lost, other_put_arrives).create("one", b"ours")


def test_store_that_never_responds_is_unavailable(
    no_pause: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store_module, "CREATE_TIMEOUT_S", 0.0)
    with pytest.raises(StoreAwayError, match=r"did not store one within 0 s \(timeout\)"):
        Unreliable(tmp_path, *[request_lost] * 1000).create("one", b"ours")


@pytest.mark.parametrize(("choose", "share"), [(min, 0.5), (max, 1)])
def test_pauses_between_attempts_double_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, choose: Callable[..., float], share: float
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(store_module, "sleep", pauses.append)
    monkeypatch.setattr(store_module, "random", SimpleNamespace(uniform=choose))
    assert Unreliable(tmp_path, *[request_lost] * 8).create("one", b"ours")
    assert pauses == pytest.approx([share * pause for pause in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0)])


def test_store_that_does_not_respond_is_asked_for_a_minute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = iter([100.0, 100.1, 160.0, 160.1])
    monkeypatch.setattr(store_module, "sleep", lambda _: None)
    monkeypatch.setattr(store_module, "monotonic", lambda: next(times))
    store = Unreliable(tmp_path, *[request_lost] * 9)
    with pytest.raises(StoreAwayError, match="did not store one within 60 s"):
        store.create("one", b"ours")
    assert len(store.faults) == 6  # the attempt at 60 s is not the last one


def test_files_of_a_killed_writer_are_ignored(tmp_path: Path) -> None:
    killed = """
import os, signal, sys
from streaming.storage.store import open_store
os.link = os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
store = open_store(sys.argv[1])
getattr(store, sys.argv[2])("log/1", b"half")
"""
    for verb in ("create", "put"):
        ended = subprocess.run([sys.executable, "-c", killed, str(tmp_path), verb], cwd=CHECKOUT, check=False)
        assert ended.returncode == -9
    assert len(list((tmp_path / "log").iterdir())) == 2  # each left a temporary file
    store = open_store(tmp_path)
    assert (keys(store), store.get("log/1"), store.folders("log")) == ([], None, [])
    assert store.create("log/1", b"whole")
    assert keys(store) == ["log/1"]


HOSTILE = [
    *("", "/", "/etc/passwd", "..", "../up", "a/../b", "a//b", "a/", "/a", ".", "./a", "a/.hidden", "a\\b", "a\0b"),
    *("a\nb", "~/../x", "a/" * 500 + "b", "\ud800", "é" * 500),
]


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_key_is_refused(store: Store, tmp_path: Path, key: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: store.get(key),
        lambda: store.create(key, b""),
        lambda: store.put(key, b""),
        lambda: store.delete([key]),
        lambda: store.open_output(key),
        lambda: store.fetch(key, tmp_path / "to"),
    ]
    if key:  # the empty prefix is valid
        calls += [lambda: list(store.list(key)), lambda: store.folders(key)]
    for call in calls:
        with pytest.raises(ServiceError, match="expected a key such as") as refused:
            call()
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_key_has_at_most_900_bytes_and_is_shown_in_part() -> None:
    assert check_key("a" * 900) == "a" * 900
    for key in ("a" * 901, "é" * 451):
        with pytest.raises(ServiceError) as refused:
            check_key(key)
        assert str(refused.value) == f"expected a key such as tables/batches/part-1.parquet, got {key[:100]!r}"


def test_store_is_shown_with_its_place(tmp_path: Path) -> None:
    assert repr(open_store(tmp_path)) == f"LocalStore('{tmp_path}')"


@pytest.mark.parametrize(
    "uri", ["hdfs://node/home", "ftp://host/home", "file:///home", "http://host/x", "s3a://bucket/x", "S4://x", "x://"]
)
def test_unsupported_scheme_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(ServiceError, match=r"^expected a path or a URI that begins with s3://, gs://, az://, got \S+$"):
        open_store(uri)


WITH_A_USER = "s3://user:secret@bucket/x"  # pragma: allowlist secret


@pytest.mark.parametrize("uri", ["s3://", "s3:///home", "gs://-/x", "az://a b/c", WITH_A_USER])
def test_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(ServiceError, match="^expected .*://BUCKET/PREFIX, got ") as refused:
        open_store(uri)
    assert "secret" not in str(refused.value)


def test_prefix_outside_the_bucket_is_refused() -> None:
    with pytest.raises(ServiceError, match="expected a key such as"):
        open_store("s3://bucket/a/../b")


def test_output_is_writable_by_arrow(store: Store, tmp_path: Path) -> None:
    rows = pa.table({"a": list(range(100_000))})
    with store.open_output("t/part-1.parquet") as output:
        pq.write_table(rows, output)
        position = output.tell()
    assert output.closed
    (one,) = store.list("t")
    assert (one.key, one.bytes) == ("t/part-1.parquet", position)
    stored = store.get("t/part-1.parquet")
    assert stored is not None
    assert pq.read_table(io.BytesIO(stored)).equals(rows)
    store.fetch("t/part-1.parquet", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == stored


def test_failed_output_is_discarded(store: Store) -> None:
    def write() -> None:
        with store.open_output("t/part-1") as output:
            output.write(b"x" * 100_000)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert keys(store) == []


def test_output_never_overwrites(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("t/part-1", b"whole")
    with pytest.raises(ServiceError, match="File exists"):
        store.open_output("t/part-1")
    assert store.get("t/part-1") == b"whole"


def test_fetching_a_missing_key_leaves_no_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="nothing does not exist"):
        store.fetch("nothing", tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_unwritable_target_of_a_fetch_is_reported_with_its_path(store: Store, tmp_path: Path) -> None:
    store.put("a", b"one")
    folder = tmp_path / "folder"
    folder.mkdir()
    for target, why in ((tmp_path / "missing" / "file", "No such file or directory"), (folder, "Is a directory")):
        with pytest.raises(ServiceError, match=f"^cannot write {re.escape(str(target))}: {why}$"):
            store.fetch("a", target)


def test_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(ServiceError, match=r"state\.json should be a regular file"):
        open_store(tmp_path).get("state.json")


def test_unwritable_store_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = open_store(tmp_path / "file")
    with pytest.raises(StoreAwayError, match="cannot write .*: File exists"):
        store.put("a", b"")


def test_access_is_checked(store: Store) -> None:
    store.check_access()
    assert keys(store) == []


def test_store_that_returns_nothing_is_detected(tmp_path: Path) -> None:
    class Forgetful(LocalStore):
        def get(self, key: str) -> bytes | None:
            return None

    with pytest.raises(ServiceError, match="does not return what was written to it"):
        Forgetful(tmp_path).check_access()
    assert keys(open_store(tmp_path)) == []


def test_conditional_puts_are_checked(store: Store) -> None:
    store.check_conditional()
    assert keys(store) == []


def test_overwriting_store_is_detected(tmp_path: Path) -> None:
    class Overwriting(LocalStore):
        def _put_if_absent(self, key: str, data: bytes) -> bool:
            self.put(key, data)
            return True

    with pytest.raises(ServiceError, match="does not support conditional puts: of 8 writers .* but 9 did"):
        Overwriting(tmp_path).check_conditional()
    assert keys(open_store(tmp_path)) == []


def test_store_that_once_creates_an_existing_object_is_detected(tmp_path: Path) -> None:
    class Late(LocalStore):
        def _put_if_absent(self, key: str, data: bytes) -> bool:
            if data == b"late" and key.endswith("-3"):
                self.put(key, data)
                return True
            return super()._put_if_absent(key, data)

    with pytest.raises(ServiceError, match="of 8 writers of one new object exactly one must succeed, but 2 did"):
        Late(tmp_path).check_conditional()


def test_executors_share_regions_and_servers_but_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SHARED_VARIABLES, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert shared_variables() == {}
    for name in ("AWS_REGION", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.setenv(name, "value")
    assert shared_variables() == {"AWS_REGION": "value"}


def test_bucket_is_never_pickled() -> None:
    with pytest.raises(TypeError, match="holds credentials"):
        pickle.dumps(in_memory())


def test_local_store_does_not_import_obstore() -> None:
    code = """
import sys
from streaming.storage.store import open_store
open_store("x").get("y")
sys.exit("obstore" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=False).returncode == 0


def test_unresponsive_bucket_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CREATE_TIMEOUT_S", 0.0)
    options = {"endpoint": "http://127.0.0.1:9", "access_key_id": "key", "secret_access_key": uuid.uuid4().hex}
    store = open_store("s3://bucket/home", {**options, "region": "none"})
    with pytest.raises(StoreAwayError, match=r"^s3://bucket/home d\w+ not .*"):
        store.create("one", b"x")


def test_unknown_bucket_option_is_refused() -> None:
    with pytest.raises(ServiceError, match="^s3://bucket cannot be opened: "):
        open_store("s3://bucket", {"no_such_option": "1"})
