"""The locked jars: installation, verification and repair, with Ivy and its cache."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from streaming.errors import ServiceError
from streaming.platform.jars import broker_classpath, damaged_jars, install_jars, locked_jars, spark_jars
from streaming.platform.java import find_java

NO_NETWORK = "-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=9 -Dhttp.proxyHost=127.0.0.1 -Dhttp.proxyPort=9"


@pytest.fixture
def own_jars(jars_dir: Path, tmp_path: Path) -> Path:
    """A copy of the checkout's jars and of Ivy's cache that tests may damage; hard links, so that it is cheap."""
    if not (jars_dir / "ivy").is_dir():
        pytest.skip("the jars were copied manually, without Ivy's cache")
    return Path(shutil.copytree(jars_dir, tmp_path / "jars", copy_function=os.link))


def damage(jar: Path) -> None:
    content = jar.read_bytes()
    jar.unlink()  # the link, not the checkout's jar
    jar.write_bytes(content[: len(content) // 2])


def test_every_locked_jar_has_its_hash(jars_dir: Path) -> None:
    assert damaged_jars(jars_dir) == {}


def test_spark_jars_and_those_of_pyspark_are_disjoint(jars_dir: Path) -> None:
    import pyspark

    def module(jar: Path) -> str:
        return jar.name.rsplit("-", 1)[0]

    shipped = {module(jar) for jar in (Path(pyspark.__file__).parent / "jars").glob("*.jar")}
    assert not shipped & {module(jar) for jar in spark_jars(jars_dir)}


def test_damaged_jars_are_fetched_again_by_one_of_two_installations(own_jars: Path, tmp_path: Path) -> None:
    truncated, missing = own_jars / "spark" / "commons-pool2-2.13.1.jar", own_jars / "broker" / "slf4j-api-1.7.36.jar"
    damage(truncated)
    missing.unlink()
    altered = own_jars / "spark" / "delta-storage-4.4.0.jar"  # of the same size: detected by its hash
    size = altered.stat().st_size
    altered.unlink()
    altered.write_bytes(b"x" * size)
    found = {"spark/commons-pool2-2.13.1.jar", "broker/slf4j-api-1.7.36.jar"}
    assert set(damaged_jars(own_jars, verify=False)) == found
    assert "SHA-256" in damaged_jars(own_jars)["spark/delta-storage-4.4.0.jar"]
    java = find_java(tmp_path)
    messages: list[str] = []

    def install() -> None:
        install_jars(own_jars, java, lambda *progress: messages.append(progress[2]), verify=True)

    threads = [threading.Thread(target=install) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert damaged_jars(own_jars) == {}
    assert "fetching 3 jars" in messages[0]
    assert "replaced by 4.0.0" in messages[1]
    assert sum("fetching" in text for text in messages) == 1
    assert not list(own_jars.glob(".incoming-*"))


def test_jar_damaged_in_ivys_cache_is_downloaded_again(own_jars: Path, tmp_path: Path) -> None:
    for jar in own_jars.rglob("commons-pool2-2.13.1.jar"):
        damage(jar)
    install_jars(own_jars, find_java(tmp_path))
    assert damaged_jars(own_jars) == {}


def test_installing_complete_jars_needs_no_java(jars_dir: Path) -> None:
    install_jars(jars_dir, Path("/nonexistent/java"))


def test_failed_download_names_the_artifact_and_both_fixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", NO_NETWORK)
    with pytest.raises(
        ServiceError, match=r"could not fetch \S+#\S+;\S+: check the network .* or copy the jars"
    ) as error:
        install_jars(tmp_path / "jars", find_java(tmp_path))
    assert str(tmp_path / "jars") in str(error.value)
    assert not list((tmp_path / "jars").glob(".incoming-*"))


def test_missing_jars_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"spark/\S+\.jar: No such file.*imagestream setup"):
        spark_jars(tmp_path)
    with pytest.raises(ServiceError, match="broker/"):
        broker_classpath(tmp_path)


def test_lock_lists_each_jar_once() -> None:
    names = [jar.name for jar in locked_jars()]
    assert len(names) == len(set(names)) > 40
