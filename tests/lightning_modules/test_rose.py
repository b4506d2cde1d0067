"""ROSE with real parts: flat sampling is Dr.GRPO, trees replay, options are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from transformers import AutoTokenizer

from datamodules.engines.hf import HFEngine
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.forks import Forks
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.functional.branching import candidate_entropy, divergence
from lightning_modules.policy_rl.grpo import GRPO
from lightning_modules.policy_rl.rose import ROSE

DR_GRPO = {
    "samples_per_prompt": 4,
    "max_new_tokens": 10,
    "loss_aggregation": "sequence_sum_const",
    "dual_clip": 3.0,
    "kl_coef": 0.001,
    "optimizer": {"lr": 1e-2},
}


class Evens:
    """A reward that a random policy earns about half of the time."""

    def __call__(self, rollouts: Any) -> dict[str, Tensor]:
        totals = [float(sum(c.token_ids) % 2) for c in rollouts.completions]
        return {"reward": torch.tensor(totals)}


class Kept(Logger):
    """Keeps the last value of every tag."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """Not kept."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forks")
    task = Forks(length=1)
    shape = TinyOptions(
        hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2
    )
    build_tiny(folder, task.vocabulary(), shape, 0, task.embeddings(32))
    return folder


def fit(
    folder: Path, cls: type[GRPO], steps: int = 2, micro_batches: int = 1, **options: Any
) -> tuple[GRPO, RolloutDataModule, dict[str, float]]:
    task = Forks(length=1, num_train=8)
    data = RolloutDataModule(
        task=task, engine=HFEngine(), reward=Evens(), prompts_per_rollout=4,
        micro_batches=micro_batches,
    )  # fmt: skip
    data.bind(AutoTokenizer.from_pretrained(folder))
    module = cls(backbone=str(folder), **DR_GRPO | options)
    kept = Kept()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, limit_val_batches=0, logger=kept,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, log_every_n_steps=1, accumulate_grad_batches=micro_batches,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module, data, kept.metrics


@pytest.mark.parametrize("credit", ["segment", "sequence"])
def test_epsilon_1_is_flat_sampling_with_dr_grpo(folder: Path, credit: str) -> None:
    rose, rose_data, metrics = fit(folder, ROSE, epsilon=1, credit=credit)
    flat, flat_data, expected = fit(folder, GRPO, normalize_std=False)
    ours, theirs = rose_data.last_rollouts, flat_data.last_rollouts
    assert ours is not None and theirs is not None  # noqa: PT018
    assert ours.completions == theirs.completions
    assert len(set(theirs.reward.tolist())) == 2
    advantages = theirs.advantages[:, None] * theirs.mask
    assert torch.equal(ours.batch().advantages, advantages.float())
    assert metrics["train/loss"] == expected["train/loss"]
    for name, value in flat.state_dict().items():
        assert torch.equal(value, rose.state_dict()[name]), name
    assert metrics["rollout/saved_share"] == 0
    assert metrics["rollout/frac_root"] == 1


def test_trees_of_a_real_policy(folder: Path) -> None:
    module, data, metrics = fit(folder, ROSE, epsilon=0.2, min_gap=1)
    rollouts = data.last_rollouts
    assert rollouts is not None
    info = rollouts.info
    assert info["chain"] == [0, 1, 2, 3] * 4
    branched = [i for i, parent in enumerate(info["parent"]) if parent >= 0]
    assert len(branched) > 4
    for row in branched:
        parent = rollouts.completions[row - info["chain"][row] + info["parent"][row]]
        k = info["branch_pos"][row]
        assert rollouts.completions[row].token_ids[:k] == parent.token_ids[:k]
        assert info["branch_entropy"][row] > 0
        assert info["branch_divergence"][row] > 0
    tokens = int(rollouts.mask.sum())
    reused = sum(info["branch_pos"])
    assert metrics["rollout/saved_share"] == pytest.approx(reused / tokens)
    assert metrics["rollout/new_tokens"] == pytest.approx((tokens - reused) / 4)
    assert metrics["rollout/frac_root"] == pytest.approx(1 - len(branched) / 12)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_the_branch_is_where_the_score_is_highest(folder: Path) -> None:
    """By hand, with the embedding rows that the policy has now."""
    module, data, _ = fit(folder, ROSE, epsilon=0.0, min_gap=1)
    with torch.no_grad():
        module.policy.base.get_input_embeddings().weight.normal_()
    data.engine.sync(module.policy, 9)
    prompts = data.train_prompts()
    rollouts = module.rollout(prompts, data.engine)
    table = module.policy.base.get_input_embeddings().weight.detach()
    for tree in range(len(prompts)):
        first = rollouts.completions[4 * tree]
        found = first.candidates
        assert found is not None
        score = candidate_entropy(found.logprobs) * divergence(found.logprobs, table[found.ids])
        last = len(first.token_ids) - 1 - int(first.finish_reason == "stop")
        if last > 1:
            best = 1 + int(score[1:last].argmax())
            assert rollouts.info["parent"][4 * tree + 1] == 0
            assert rollouts.info["branch_pos"][4 * tree + 1] == best


def test_micro_batches_change_nothing(folder: Path) -> None:
    one, _, _ = fit(folder, ROSE, steps=1)
    many, _, _ = fit(folder, ROSE, steps=1, micro_batches=4)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, many.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize("score", ["entropy", "cosine_code", "semantic_paper", "random"])
def test_every_branch_score_runs(folder: Path, score: str) -> None:
    _, data, metrics = fit(folder, ROSE, steps=1, branch_score=score, center_embeddings=True)
    assert data.last_rollouts is not None
    assert 0 <= metrics["rollout/frac_root"] <= 1


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"epsilon": 2}, r"model\.epsilon=2"),
        ({"branch_score": "semantic"}, r"model\.branch_score='semantic'"),
        ({"credit": "token"}, r"model\.credit='token'"),
        ({"num_candidates": 0}, r"model\.num_candidates=0"),
        ({"length_alpha": -1}, r"model\.length_alpha=-1"),
        ({"normalize_std": True}, r"model\.normalize_std=false"),
    ],
)
def test_bad_options(folder: Path, options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        ROSE(backbone=str(folder), **options)
