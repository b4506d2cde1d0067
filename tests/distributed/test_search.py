"""Search episodes on two ranks with a sharded policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.options import BackboneOptions
from tests.datamodules.search_parts import Quiz
from tests.distributed.search_worker import episodes
from tests.distributed.test_two_processes import torchrun
from tests.runs import REPO, call, environment

pytestmark = pytest.mark.slow


def test_ranks_that_run_out_of_episodes_wait_for_the_others(tmp_path: Path) -> None:
    folder, output = tmp_path / "policy", tmp_path / "found.json"
    shape = TinyOptions(
        hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16
    )
    words = Quiz().vocabulary()
    assert words is not None
    build_tiny(folder, words, shape, seed=0)
    worker = str(REPO / "tests" / "distributed" / "search_worker.py")
    options = {"env": environment(PYTHONPATH=str(REPO))}
    result = call(*torchrun(worker, str(folder), str(output)), **options)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    policy = load_causal_lm(BackboneOptions(path=str(folder))).eval()
    with torch.no_grad():
        expected = [episodes(policy, [0, 1, 2]), episodes(policy, [3])]
        last = [episodes(policy, [4]), {}]
    sizes = [len(ids) for part in expected for group in part.values() for ids, *_ in group]
    assert len(set(sizes)) > 1, "episodes end at different steps"
    for unshard in ("never", "always"):
        assert found[unshard] == expected
        assert found[f"{unshard}, one rank idle"] == last
