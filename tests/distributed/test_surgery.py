"""Gradient surgery in two gloo processes is that of one process, and refuses ranks that differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.surgery_worker import train, whole
from tests.runs import REPO, assert_same_weights, call, environment

pytestmark = pytest.mark.slow
WORKER = str(REPO / "tests" / "distributed" / "surgery_worker.py")


SAME = ("ddp", "ddp_views", "fsdp", "ddp_lora", "fsdp_lora")
REFUSED = ("ddp_misaligned", "fsdp_misaligned", "ddp_mixed", "fsdp_mixed")
BAD = ("ddp_bad", "fsdp_bad")


@pytest.fixture(scope="module")
def found(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two processes found in all ways; a hang ends by the time-out."""
    output = tmp_path_factory.mktemp("surgery")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    options = {"env": environment(PYTHONPATH=str(REPO)), "timeout": 240}
    result = call(
        *launcher, WORKER, str(tiny_folder), str(output), *SAME, *BAD, *REFUSED, **options
    )
    assert result.returncode == 0, result.stderr
    return output


def ranks_of(found: Path, way: str) -> list[dict[str, Any]]:
    """What each rank wrote."""
    return [json.loads((found / f"{way}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("way", SAME)
def test_two_processes_equal_one(way: str, found: Path, tiny_folder: Path) -> None:
    ranks = ranks_of(found, way)
    alone, surgery = train(str(tiny_folder), "lora" if "lora" in way else "one", 0, 1)
    expected = whole(alone)
    assert_same_weights(torch.load(found / f"{way}.pt", weights_only=True), expected, atol=1e-5)
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert surgery.weights is not None
    torch.testing.assert_close(
        torch.tensor(ranks[0]["weights"], dtype=torch.float64), surgery.weights, atol=1e-4, rtol=0
    )
    assert (surgery.weights != 1).any(1).double().mean() > 0.2, "hardly a unit had a conflict"
    for tag, value in alone.results.items():
        if tag.startswith("surgery/") and tag.split("/")[1] not in ("ms", "buffers_mib"):
            assert ranks[0]["logged"][tag] == pytest.approx(value, abs=2e-4, rel=1e-3), tag
    naive, _ = train(str(tiny_folder), "none_lora" if "lora" in way else "none", 0, 1)
    gap = max(float((value - whole(naive)[name]).abs().max()) for name, value in expected.items())
    assert gap > 1e-3, "surgery changed nothing"


@pytest.mark.parametrize("way", REFUSED)
def test_ranks_that_differ_are_refused_everywhere(way: str, found: Path) -> None:
    fragment = "number 2 of this window" if "mixed" in way else "rank 1: ['math', 'if'"
    for rank in ranks_of(found, way):
        assert fragment in rank["error"] and "data.shares" in rank["error"]


@pytest.mark.parametrize("way", BAD)
def test_a_bad_gradient_of_one_rank_skips_the_step_on_all(way: str, found: Path) -> None:
    ranks = ranks_of(found, way)
    assert [rank["bad"] for rank in ranks] == [1, 1]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    weights = torch.load(found / f"{way}.pt", weights_only=True)
    good = torch.load(found / f"{way[:-4]}.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())
    assert any(not torch.equal(value, good[name]) for name, value in weights.items())
