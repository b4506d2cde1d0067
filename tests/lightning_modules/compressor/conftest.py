"""The two small models, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lightning_modules.compressor.small_pair import build_folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a ``compressor`` and a ``decoder``."""
    return build_folders(tmp_path_factory.mktemp("pair"))
