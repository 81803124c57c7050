from pathlib import Path

import pytest

from models.backbone import DEFAULT_BACKBONE, ExportedBackbone, export_backbone


@pytest.fixture(scope="session")
def exports(pytestconfig: pytest.Config) -> Path:
    """Where exports are kept from run to run; their key tells when one is out of date."""
    return pytestconfig.cache.mkdir("backbones")


@pytest.fixture(scope="session")
def exported(exports: Path) -> ExportedBackbone:
    """The default backbone with its ImageNet weights."""
    return export_backbone(DEFAULT_BACKBONE, "imagenet", exports)
