"""Agentic-R on two gloo processes with uneven rows is Agentic-R on the joined batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.functional.sums import means, merge
from tests.distributed.agentic_worker import CASES, found, validated
from tests.lightning_modules.agentic_parts import folder_of
from tests.runs import REPO, call, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer."""
    return folder_of(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def ranks(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found in all cases; a hang ends by the time-out."""
    output = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    worker = str(REPO / "tests" / "distributed" / "agentic_worker.py")
    options = {"env": environment(PYTHONPATH=str(REPO)), "timeout": 240}
    result = call(*launcher, worker, str(backbone), str(output), **options)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("name", CASES)
def test_uneven_ranks_are_one_process(name: str, ranks: Path, backbone: Path) -> None:
    both = [torch.load(ranks / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    expected = found(name, backbone)
    assert max(float(x.abs().max()) for x in expected["gradients"].values()) > 1e-3
    for rank in both:
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for key, value in expected["gradients"].items():
            torch.testing.assert_close(rank["gradients"][key], value, atol=1e-6, rtol=0, msg=key)
    joined = means(merge(both[0]["metrics"], both[1]["metrics"]))
    alone = means(expected["metrics"])
    assert joined.keys() == alone.keys()
    for tag in alone.keys() - {"train/items"}:  # of a rank
        assert joined[tag] == pytest.approx(alone[tag], abs=1e-6), tag
    assert abs(both[0]["loss"] - expected["loss"]) > 1e-4, "a rank alone has another loss"


def test_the_mask_reaches_over_ranks(ranks: Path) -> None:
    """The same rows on the same ranks, siblings apart: the mask must make the difference."""
    metrics = [
        means(torch.load(ranks / f"{name}.0.pt", weights_only=True)["metrics"])
        for name in ("siblings_apart", "unmasked")
    ]
    assert metrics[0]["train/masked_false_negatives"] > metrics[1]["train/masked_false_negatives"]
    assert metrics[1]["train/masked_false_negatives"] == 0.0


def test_ranks_search_as_one(ranks: Path, backbone: Path) -> None:
    alone = validated(backbone)
    both = [torch.load(ranks / f"validate.{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert both[0] == both[1] and both[0].keys() == alone.keys()
    assert both[0] == pytest.approx(alone, rel=1e-6)
    assert "val/multi/support_recall" in alone
