"""Pillow's test images and all image bombs in the stream; only in `make soak`.

Pillow's source distribution contains about 1,000 images that caused failures or that other programs wrote in unusual
ways (https://github.com/python-pillow/Pillow/tree/main/Tests/images).
"""

import io
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import PIL
import pytest
from PIL import Image

from models.decode import DEFAULT_LIMITS, BadImage, Reason, decode_marked
from streaming.settings import Settings
from tests.conftest import NewService
from tests.faults.bombs import BOMBS, small
from tests.faults.harness import Stream, check_exactly_once, send
from tests.faults.poison import Sample
from tests.forms import Record

SIZE = (64, 64)
# Pillow's name of a format → ours: the additional pictures of an MPO are ignored.
OTHER_NAMES = {"MPO": "JPEG"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("pillow")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "pillow", "-d", str(folder)]
    subprocess.run([*command, f"pillow=={PIL.__version__}"], check=True)
    (archive,) = folder.glob("*.tar.gz")
    return dict(_images_of(archive))


def _images_of(archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile() and "/Tests/images/" in member.name and (content := files.extractfile(member)):
                yield member.name.partition("/Tests/images/")[2], content.read()


def pillow_decodes(data: bytes) -> bool:
    """Whether Pillow decodes the image and its format is accepted."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            image.load()
            return OTHER_NAMES.get(image.format or "", image.format) in DEFAULT_LIMITS.formats
    except Exception:  # noqa: BLE001  Pillow raises any type
        return False


def check_through_stream(service: Settings, samples: list[Sample]) -> None:
    """Every sample has its row, and the query was never restarted."""
    sent = send(service, samples)
    with Stream(service, until_drained=True) as stream:
        stream.wait_ended()
    (end,) = stream.events("end")
    assert end["restarts"] == 0
    assert not stream.events("trouble")
    check_exactly_once(service, sent)


def test_each_pillow_test_image_has_the_expected_row(
    images: dict[str, bytes], new_service: NewService, record: Record
) -> None:
    assert len(images) > 900
    samples, counts = [], Counter[str]()
    for name, data in images.items():
        got = decode_marked(data, SIZE)
        reason = got.reason if isinstance(got, BadImage) else None
        if pillow_decodes(data):
            assert reason in {None, Reason.UNSUPPORTED_MODE}, (name, got)
        else:
            assert isinstance(got, BadImage) or got.damage, name
        counts["predicted" if reason is None else str(reason)] += 1
        samples.append(Sample(name, reason, data, name.encode()))
    check_through_stream(new_service(), samples)
    shown = ", ".join(f"{n:,} {what}" for what, n in counts.most_common())
    record("corpus: Pillow's own test images", "a row each, as Pillow judges", f"{len(images):,}: {shown}")


def test_each_bomb_and_the_next_image_have_a_row(new_service: NewService, record: Record) -> None:
    samples = []
    for one in BOMBS:
        data = one.make()
        got = decode_marked(data, SIZE)
        reason = got.reason if isinstance(got, BadImage) else None
        assert reason in one.outcomes
        samples.append(Sample(one.name, reason, data, one.name.encode()))
        samples.append(Sample(f"after {one.name}", None, small("JPEG"), None))
    check_through_stream(new_service(), samples)
    record("bombs through the stream, each before a good image", "a row each, no restart", f"{len(samples)} rows")
