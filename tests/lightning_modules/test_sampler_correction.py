"""Truncated importance weights between the sampler and the trainer: the function and the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.experience import Experience, Rollouts
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.functional.policy_losses import MAX_LOG_RATIO, sampler_weights
from lightning_modules.functional.sums import means
from lightning_modules.policy_rl.grpo import GRPO


def by_a_loop(mine: Any, theirs: Any, mask: Any, cap: float) -> list[list[float]]:
    weights = []
    for row in range(len(mine)):
        weights.append([])
        for place in range(len(mine[row])):
            ratio = math.exp(float(mine[row][place] - theirs[row][place]))
            weights[row].append(min(ratio, cap) if mask[row][place] else 0.0)
    return weights


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 100.0])
def test_weights_against_a_loop(cap: float) -> None:
    mine, theirs = -torch.rand(3, 5).double() * 3, -torch.rand(3, 5).double() * 3
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    weights, metrics = sampler_weights(mine.requires_grad_(), theirs, mask, cap=cap)
    expected = torch.tensor(by_a_loop(mine, theirs, mask, cap), dtype=torch.float64)
    assert torch.allclose(weights, expected)
    assert not weights.requires_grad
    values = means(metrics)
    live = mask.bool()
    assert values["sampler_weight"] == pytest.approx(float(expected[live].mean()))
    clipped = (mine.detach() - theirs).exp()[live] > cap
    assert values["sampler_weight_clipped"] == pytest.approx(float(clipped.double().mean()))


def test_weights_of_strange_values() -> None:
    nan, inf = math.nan, math.inf
    mine = torch.tensor([[-1.0, nan, -inf, -1.0]])
    theirs = torch.tensor([[-1.0, -1.0, nan, -60.0]])
    mask = torch.tensor([[1, 0, 0, 1]])
    weights, metrics = sampler_weights(mine, theirs, mask, cap=1e30)
    assert weights[0, :3].tolist() == [1.0, 0.0, 0.0]
    assert float(weights[0, 3]) == pytest.approx(math.exp(MAX_LOG_RATIO))
    assert all(math.isfinite(v) for v in means(metrics).values())
    for cap in (0.0, -1.0, nan):
        with pytest.raises(ValueError, match="cap="):
            sampler_weights(mine, theirs, mask, cap=cap)
    with pytest.raises(ValueError, match="sampler_logprobs has shape"):
        sampler_weights(mine, theirs[0, None, :2], mask, cap=1.0)


def module_and_batch(
    tiny_folder: Path, shift: float, **options: Any
) -> tuple[GRPO, Experience, Rollouts]:
    """A module and real rollouts whose sampler reports log-probs that are off by ``shift``."""
    module = GRPO(backbone=str(tiny_folder), samples_per_prompt=4, max_new_tokens=6, **options)
    module.configure_model()
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    task = PrefixAudit(num_train=2)
    task.bind(AutoTokenizer.from_pretrained(tiny_folder))
    engine = HFEngine()
    engine.sync(module.policy, 0)
    prompts = [task.prompt(record) for record in task.records("train")]
    groups = engine.generate(prompts, Sampling(samples=4, max_new_tokens=6))
    rollouts = Rollouts.from_groups(prompts, groups)
    rollouts.advantages = torch.linspace(-1, 1, len(rollouts))
    batch = rollouts.batch()
    batch.sampler_logprobs = batch.sampler_logprobs - shift * batch.mask
    return module, batch, rollouts


def gradient(module: GRPO, batch: Experience) -> tuple[float, torch.Tensor]:
    """Loss, and the gradient of the head."""
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    grad = module.policy.base.get_output_embeddings().weight.grad
    return float(loss), grad.clone()


@pytest.mark.parametrize(("shift", "weight"), [(0.0, 1.0), (0.3, math.exp(0.3)), (2.0, 2.0)])
def test_the_step_is_weighted(shift: float, weight: float, tiny_folder: Path) -> None:
    module, batch, _ = module_and_batch(tiny_folder, shift)
    loss, grad = gradient(module, batch)
    module.sampler_correction = 2.0
    weighted_loss, weighted_grad = gradient(module, batch)
    assert weighted_loss == pytest.approx(weight * loss, abs=1e-5)
    assert torch.allclose(weighted_grad, weight * grad, atol=1e-5)
    values = means(module._window)
    assert values["train/sampler_weight"] == pytest.approx(weight, abs=1e-4)
    assert values["train/sampler_weight_clipped"] == float(shift == 2.0)


def test_none_changes_and_logs_nothing(tiny_folder: Path) -> None:
    module, batch, _ = module_and_batch(tiny_folder, 0.0)
    loss, grad = gradient(module, batch)
    module.sampler_correction = None
    batch.sampler_logprobs = batch.sampler_logprobs - 7.0
    again, same = gradient(module, batch)
    assert loss == again
    assert torch.equal(grad, same)
    assert not [tag for tag in module._window if "sampler_weight" in tag]


def test_several_updates_weigh_by_the_log_probs_of_the_rollout(tiny_folder: Path) -> None:
    module, batch, rollouts = module_and_batch(tiny_folder, 0.3, sampler_correction=10.0)
    rollouts.num_updates = 2
    batch.old_logprobs = module.annotate(rollouts)["old_logprobs"]
    with torch.no_grad():  # the policy moves on; the weights of the rollout stay
        module.policy.base.get_output_embeddings().weight.mul_(1.5)
    module.training_step(batch, 0)
    values = means(module._window)
    assert values["train/sampler_weight"] == pytest.approx(math.exp(0.3), abs=1e-4)


@pytest.mark.parametrize("cap", [0.0, -2.0])
def test_a_cap_must_be_positive(cap: float, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.sampler_correction=.* above 0, or null"):
        GRPO(backbone=str(tiny_folder), sampler_correction=cap)
