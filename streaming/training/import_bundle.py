"""Import of a model version exported by `imagestream models export`, from this or another home."""

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
    """The result of an import; `is_new` if the bundle was not registered yet."""

    version: int
    sha256: str
    is_new: bool
    alias: Alias | None


def import_bundle(registry: Registry, file: Path, *, by: str, alias: Alias | None) -> ImportedBundle:
    """Register the version in a zip; the first model of a home becomes the champion.

    Args:
        file: the zip.
        by: name recorded in the alias's history.
        alias: alias to assign; None for none unless it is the first model.

    Raises:
        ModelError: the zip or the bundle is invalid, or does not reproduce its golden predictions.
    """
    with TemporaryDirectory(prefix="imagestream-") as scratch:
        folder = Path(scratch) / "bundle"
        bundle = read_bundle(ZipFiles(file), folder)
        check_golden(bundle, load_scorer(bundle))
        version, is_new = registry.keep(folder, bundle.sha256)
    alias = promote_import(registry, version, alias, by=by)
    return ImportedBundle(version, bundle.sha256, is_new, alias)


def promote_import(registry: Registry, version: int, alias: Alias | None, *, by: str) -> Alias | None:
    """Assign an alias to an imported version and return it; the first model of a home becomes the champion."""
    if alias is None and registry.target(CHAMPION) is None:
        alias = CHAMPION
    if alias is not None:
        registry.promote(version, alias=alias, by=by, why="imported")
    return alias
