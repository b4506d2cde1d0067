"""Shared fixtures: small real parts, guards around every test.

Everything here is real and tiny: a Qwen3 of two layers, the procedural task, the embedded engine.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _guards() -> Iterator[None]:
    """Every test leaves random states, default dtype, threads, environment and groups as found."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    dtype = torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() == dtype, "the test changed the default dtype"
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized()), (
        "the test left a process group behind"
    )
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real files beside the repository; tests that need them are skipped where there are none."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 (2 layers, width 32) with the prefix-audit vocabulary, as a folder."""
    from datamodules.tasks.prefix_audit import PrefixAudit
    from lightning_modules.backbones.tiny import TinyOptions, build_tiny

    folder = tmp_path_factory.mktemp("tiny")
    shape = TinyOptions(
        hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16
    )
    build_tiny(folder, PrefixAudit().vocabulary(), shape, seed=0)
    return folder


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for all runs of the session, so that a warm start is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def compose(warm_cache: Path) -> Callable[..., Any]:
    """Compose the real config with overrides, shrunk by experiment=smoke unless ``smoke=False``."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    def make(*overrides: str, smoke: bool = True) -> Any:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            own = [f"cache_dir={warm_cache}", "trainer.num_threads=1"]
            shrink = ["experiment=smoke"] if smoke else []
            return hydra.compose("train", overrides=[*shrink, *own, *overrides])

    return make


@pytest.fixture
def make_config(tmp_path: Path, compose: Callable[..., Any]) -> Callable[..., Any]:
    """As ``compose``, with run folders in ``tmp_path``."""

    def make(*overrides: str, smoke: bool = True) -> Any:
        return compose(f"output_dir={tmp_path}", *overrides, smoke=smoke)

    return make
