"""CoCoA's losses on two gloo processes with uneven rows are those of the joined batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from datamodules.tasks.shapes_pairs import ShapesPairs
from lightning_modules.backbones.tiny_vl import TinyVLOptions, build_tiny_vl
from lightning_modules.functional.sums import means, merge
from tests.distributed.cocoa_worker import CASES, found
from tests.runs import REPO, call, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL of one layer."""
    folder = tmp_path_factory.mktemp("vl")
    shape = TinyVLOptions(num_layers=1, patch_size=8, merge_size=1, init_std=0.1)
    build_tiny_vl(folder, ShapesPairs().vocabulary(), shape, seed=0)
    return folder


@pytest.fixture(scope="module")
def ranks(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found in all cases; a hang ends by the time-out."""
    output = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    worker = str(REPO / "tests" / "distributed" / "cocoa_worker.py")
    options = {"env": environment(PYTHONPATH=str(REPO)), "timeout": 240}
    result = call(*launcher, worker, str(backbone), str(output), **options)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("name", CASES)
def test_uneven_ranks_are_one_process(name: str, ranks: Path, backbone: Path) -> None:
    both = [torch.load(ranks / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    expected = found(name, backbone)
    assert sorted(both[0]["rows"] + both[1]["rows"]) == expected["rows"]
    assert len(both[0]["rows"]) != len(both[1]["rows"]) or "without" in name
    largest = max(float(x.abs().max()) for x in expected["gradients"].values())
    assert largest > 1e-2
    for rank in both:
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for key, value in expected["gradients"].items():
            torch.testing.assert_close(
                rank["gradients"][key], value, atol=1e-5 * largest, rtol=1e-4, msg=key
            )
    joined = means(merge(both[0]["metrics"], both[1]["metrics"]))
    alone = means(expected["metrics"])
    for tag in ("train/loss", *(tag for tag in alone if tag.endswith(("/loss", "_loss")))):
        assert joined[tag] == pytest.approx(alone[tag], rel=1e-5), tag
    # either rank by itself has another loss: the joined mean is not theirs by chance
    if name != "contrastive":
        tag = f"train/{CASES[name][0]}/loss"
        own = [means(rank["metrics"])[tag] for rank in both]
        assert abs(own[0] - own[1]) > 1e-3
