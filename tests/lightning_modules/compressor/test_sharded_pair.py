"""Two gloo processes: a sharded pair equals a whole one, a replicated one has all gradients."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lightning_modules.compressor.pair_worker import CASES
from tests.runs import REPO, call, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote, by case."""
    results = tmp_path_factory.mktemp("sharded")
    worker = str(REPO / "tests" / "lightning_modules" / "compressor" / "pair_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    options = {"env": environment(PYTHONPATH=str(REPO))}
    result = call(*launcher, *rendezvous, worker, str(folders), str(results), **options)
    assert result.returncode == 0, result.stderr
    assert "returned a view tensor" not in result.stderr, "in-place use would drop FSDP2's hook"
    return [json.loads((results / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert rank[name]["gradients"] < 1e-5 and rank[name]["export"] < 1e-5
        assert all(rank[name][one] for one in ("sizes", "decodes", "gathered", "ddp"))
