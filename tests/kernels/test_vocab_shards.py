"""A vocabulary in unequal shares on two gloo processes gives what one process computes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.ops import TopP, linear_logprob_entropy
from tests.kernels.shards_worker import REGIONS, STARTS
from tests.runs import REPO, call, environment


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("shards")
    worker = str(REPO / "tests" / "kernels" / "shards_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    endpoint = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command = [*launcher, *endpoint, worker, str(folder)]
    result = call(*command, env=environment(PYTHONPATH=str(REPO)))
    assert result.returncode == 0, result.stderr
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("share", STARTS)
@pytest.mark.parametrize("kind", ["plain", "ties", "dead"])
@pytest.mark.parametrize("region", REGIONS)
def test_equals_one_process(found: list[dict], share: str, kind: str, region: str) -> None:
    for rank in found:
        own = {k: v for k, v in rank["errors"].items() if k.startswith(f"{share}/{kind}/{region}/")}
        assert len(own) >= 12
        wrong = {k: v for k, v in own.items() if not v < 1e-10 and not math.isnan(v)}
        assert not wrong
        assert not any(math.isnan(v) for v in own.values())


@pytest.mark.slow
def test_a_target_outside_all_shares_is_refused(found: list[dict]) -> None:
    for rank in found:
        assert "target 6 is outside the 6 tokens" in rank["refused"]


def test_a_nucleus_over_shares_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="use TopK"):
        linear_logprob_entropy(
            *(torch.zeros(1, 4), torch.zeros(3, 4), torch.tensor([0])),
            region=TopP(0.9),
            process_group=object(),
        )
