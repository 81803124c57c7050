"""A model version that `imagestream models export` wrote, registered again, here or in another home."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from models.bundle import read_bundle
from models.bundle_zip import ZipFiles
from models.scorer import check_golden, load_scorer
from streaming.registry import CHAMPION, Registry
from streaming.storage.registry_objects import Alias


@dataclass(frozen=True)
class ImportedBundle:
    """What became of it.

    Attributes:
        is_new: whether no version had this very bundle.
        alias: what points at it since.
    """

    version: int
    sha256: str
    is_new: bool
    alias: Alias | None


def import_bundle(registry: Registry, file: Path, *, by: str, alias: Alias | None) -> ImportedBundle:
    """Register the version in a zip; the first model of a home becomes the champion.

    Raises:
        ModelError: the zip or the bundle is refused, or it does not compute its golden predictions here.
    """
    with TemporaryDirectory(prefix="imagestream-") as scratch:
        folder = Path(scratch) / "bundle"
        bundle = read_bundle(ZipFiles(file), folder)
        check_golden(bundle, load_scorer(bundle))
        version = registry.find(bundle.sha256)
        is_new = version is None
        if version is None:
            version = registry.register(lambda directory: shutil.move(folder, directory))
    if alias is None and registry.target(CHAMPION) is None:
        alias = CHAMPION
    if alias is not None:
        registry.promote(version, alias=alias, by=by, why="imported")
    return ImportedBundle(version, bundle.sha256, is_new, alias)
