"""PPO whitens over the trained tokens of all ranks, however the rollouts are shared among them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.advantages_worker import CASES, SIZES, found, rollouts_of
from tests.runs import REPO, call, environment

pytestmark = pytest.mark.slow
WORKER = str(REPO / "tests" / "distributed" / "advantages_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found in all cases; a hang ends by the time-out."""
    output = tmp_path_factory.mktemp("advantages")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    options = {"env": environment(PYTHONPATH=str(REPO)), "timeout": 120}
    result = call(*launcher, WORKER, str(output), *CASES, **options)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_whiten_as_one(case: str, folder: Path) -> None:
    shares, left_out = CASES[case]
    whole = rollouts_of(tuple(range(len(SIZES))), left_out)
    wanted, metrics = found(whole)
    ranks = [torch.load(folder / f"{case}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    for (got, own), rows in zip(ranks, shares, strict=True):
        torch.testing.assert_close(got, wanted[list(rows), : got.shape[1]], atol=1e-5, rtol=1e-5)
        assert own["rollout/explained_variance"] == pytest.approx(
            metrics["rollout/explained_variance"], abs=1e-6
        )
    trained = torch.cat([got[rollouts_of(rows, left_out).trained_mask]
                         for (got, _), rows in zip(ranks, shares, strict=True)])  # fmt: skip
    assert len(trained) == sum(n for row, n in enumerate(SIZES) if row not in left_out)
    if len(trained):
        assert float(trained.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(trained.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    local = ranks[0][0][rollouts_of(shares[0], left_out).trained_mask]
    if case in ("all", "some_left_out"):
        assert abs(float(local.mean())) > 0.01, "each rank for itself would do as well"
    assert sum(own["rollout/value"][1] for _, own in ranks) == len(trained)
