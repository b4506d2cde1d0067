"""Two gloo processes have the loss and the gradients of one process with the joined batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.embedding.gathering import gather_info, gather_rows, gather_with_grad
from lightning_modules.functional.contrastive import PairInfo
from lightning_modules.functional.sums import means, merge
from tests.distributed.contrastive_worker import CASES, found
from tests.runs import REPO, call, environment

pytestmark = pytest.mark.slow
WORKER = str(REPO / "tests" / "distributed" / "contrastive_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found in all cases; a hang ends by the time-out."""
    output = tmp_path_factory.mktemp("contrastive")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    options = {"env": environment(PYTHONPATH=str(REPO)), "timeout": 240}
    result = call(*launcher, WORKER, str(output), *CASES, **options)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(name: str, folder: Path) -> None:
    case = CASES[name]
    ranks = [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    plain = case._replace(keep=None, inside=False)
    expected = found(plain)
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"], expected["gradients"], atol=1e-12, rtol=1e-9)
    assert max(float(x.abs().max()) for x in expected["gradients"]) > 1e-3
    if case.way == "own":
        assert ranks[0]["num_rows"] + ranks[1]["num_rows"] == expected["num_rows"]
        both = means(merge(ranks[0]["metrics"], ranks[1]["metrics"]))
    else:
        both = means(ranks[0]["metrics"])
    assert both == pytest.approx(means(expected["metrics"]))


def test_the_rows_of_the_other_rank_matter(folder: Path) -> None:
    """Each rank for itself would give another gradient: the cases above can fail."""
    joined = found(CASES["equal"])["gradients"]
    ranks = [torch.load(folder / f"equal.{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["metrics"]["negatives"] == ranks[1]["metrics"]["negatives"] == (92.0, 4.0)
    other = found(CASES["unequal"])["gradients"]
    assert max(float((a - b).abs().max()) for a, b in zip(joined, other, strict=True)) > 1e-3


def test_odds_and_ends(folder: Path) -> None:
    for rank in (0, 1):
        others = torch.load(folder / f"others.{rank}.pt", weights_only=True)
        widths, dtypes, fields = others["refused"]
        assert "different widths" in widths and "different widths or dtypes" in dtypes
        assert "query_ids" in fields
        torch.testing.assert_close(others["half"], torch.full((1 + rank, 2), 5.0))
        assert others["ids"].tolist() == [[0, 1, 2]]
        assert others["flags"].tolist() == [True, False, False]


def test_without_a_group_nothing_happens() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    (same,), rows = gather_with_grad(x)
    assert same is x and rows == slice(0, 2)
    info = PairInfo(query_ids=torch.ones(2).long())
    assert gather_info(info) is info and gather_rows(info.query_ids) is info.query_ids
    with pytest.raises(ValueError, match="share rows"):
        gather_with_grad(x, torch.ones(3, 3))
    with pytest.raises(ValueError, match="share rows and dtype"):
        gather_with_grad(x, torch.ones(2, 3).double())
