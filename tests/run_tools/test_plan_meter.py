"""The meter behind ``mode=plan``: known allocations, the fused head, and measured memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.engines.hf import HFEngine
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.options import KernelOptions
from lightning_modules.policy_rl.grpo import GRPO
from run_tools import plan as planning
from run_tools.plan_meter import Meter, head_bytes, take_data_away
from tests.benchmarks.plan_memory import Case, compare, config_of


def test_the_meter_sees_what_comes_and_goes() -> None:
    with Meter() as meter:
        first = torch.empty(1000)
        second = first + 1
        del first
        view = second[10:]
        third = torch.empty(100)
    assert meter.peak().total == 8000
    assert meter.peak(without="temporaries").total == 0
    assert view.shape == (990,)
    assert third.numel() == 100
    middle = meter.mark()
    with meter:
        fourth = second * 2
    assert meter.peak(middle).total == 8400
    assert fourth.numel() == 1000


def test_a_model_without_data_runs(tiny_folder: Path) -> None:
    module = GRPO(backbone=str(tiny_folder))
    module.configure_model()
    ids = torch.ones(2, 8, dtype=torch.long)
    expected = module.policy(ids).logits.shape
    take_data_away(module, torch.bfloat16)
    with Meter() as meter, torch.no_grad():
        found = module.policy(ids).logits
    assert found.shape == expected
    assert found.dtype == torch.bfloat16
    assert meter.flops > 0
    assert not any(p.numel() and not hasattr(p, "fake_mode") for p in module.parameters())


@pytest.mark.parametrize("is_cuda", [False, True])
def test_the_head_asks_the_kernels(is_cuda: bool) -> None:
    hidden, weight = torch.empty(4096, 64, dtype=torch.bfloat16), torch.empty(32000, 64)
    small, large = (
        head_bytes(hidden, weight, KernelOptions(workspace_mb=mb), is_cuda, [True, True])
        for mb in (1, 64)
    )
    sums = 4096 * 64 * 4
    one, none = (
        head_bytes(hidden, weight, KernelOptions(workspace_mb=1), True, [need, False])
        for need in (True, False)
    )
    assert one - none == sums
    assert sums < small < large < 4096 * 32000 * 2
    assert head_bytes(hidden[:0], weight, KernelOptions(), is_cuda, [True, True]) == 0


MEASURED = {
    "activations": Case(width=64, layers=2, vocabulary=500, prompt=16, new=24, prompts=2),
    "cache": Case(
        width=64, layers=2, vocabulary=500, prompt=8, new=48, prompts=16, samples=16, varied=True
    ),
    "head": Case(width=64, layers=2, vocabulary=8000, prompt=8, new=8, prompts=1, samples=2),
    "window": Case(
        width=64, layers=2, vocabulary=8000, prompt=8, new=8, prompts=1, samples=2, micro_batches=2
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_plan_is_within_15_percent_of_what_is_measured(name: str) -> None:
    """Each case has another part that weighs most."""
    for part, (planned, measured) in compare(MEASURED[name], with_run=False).items():
        assert planned == pytest.approx(measured, rel=0.15), part


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "prompt"), [(8, None), (3, 400)])
def test_deep_models_are_drawn_out(
    samples: int,
    prompt: int | None,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    shape = json.loads((tiny_folder / "config.json").read_text())
    shape |= {"num_hidden_layers": 9, "layer_types": ["full_attention"] * 9}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_folder / name).read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape))
    peaks = []
    for depths in ((4, 2), (9, 1)):
        monkeypatch.setattr(planning, "DEPTHS", depths)
        task = PrefixAudit(length=2, num_train=8)
        data = RolloutDataModule(task=task, engine=HFEngine(), prompts_per_rollout=2)
        options: dict[str, Any] = {"kl_coef": 0.1, "share_prompts": False}
        module = GRPO(backbone=str(tmp_path), samples_per_prompt=samples, **options)
        config = config_of()
        config["plan"]["prompt_tokens"] = prompt
        found = planning.plan(module, data, config)
        one = found.columns[0]
        peaks.append([*one.phases.by_name.values(), one.flops])
    for drawn, full in zip(*peaks, strict=True):
        assert sum(drawn.values()) == pytest.approx(sum(full.values()), rel=0.02)
