"""Rollouts inside a real run of GRPO: policy lag, absent domains, shares, an exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger

from callbacks.rng_state import RngState
from callbacks.step_checkpoint import StepCheckpoint
from datamodules.engines.hf import HFEngine
from datamodules.experience import Prompt, Rollouts
from datamodules.rollouts import RolloutDataModule, RolloutSource
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.policy_rl.grpo import GRPO


class Points(Logger):
    """Keeps what is logged: one ``(step, values)`` a call."""

    name, version = "points", 0

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.points.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def of(self, tag: str) -> dict[int, float]:
        return {step: values[tag] for step, values in self.points if tag in values}


class SmallIds:
    """Share of small token ids: any completion of a random model earns something."""

    def __call__(self, rollouts: Rollouts) -> dict[str, torch.Tensor]:
        shares = [
            sum(token < 40 for token in c.token_ids) / len(c.token_ids)
            for c in rollouts.completions
        ]
        return {"reward": torch.tensor(shares)}


class BothKinds(RolloutDataModule):
    """Six preference and two reflection prompts of real pairs."""

    def train_prompts(self) -> list[Prompt]:
        task: Any = self.task
        pairs = task.records("train")
        golds = [task.gold_analysis(pair) for pair in pairs]
        reflections = [
            task.reflection_prompt(pairs[i], (golds[i], golds[i + 1]), label=1) for i in (0, 1)
        ]
        return [task.prompt(pair) for pair in pairs] + reflections


def fit(
    tiny_folder: Path, folder: Path, steps: int, *, resume: bool = False, **options: Any
) -> tuple[Trainer, GRPO, RolloutDataModule]:
    task = PrefixAudit(num_train=6)
    data = BothKinds(task=task, engine=HFEngine(), reward=SmallIds(), **options)
    data.prepare(str(tiny_folder), folder)
    module = GRPO(
        backbone=str(tiny_folder), samples_per_prompt=2, max_new_tokens=6, optimizer={"lr": 1e-2}
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=Points(),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=data.window,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=[RngState(), StepCheckpoint(folder=str(folder), every_seconds=None)],
    )
    path = str(folder / "last.ckpt") if resume else None
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return trainer, module, data


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_policy_lag_counts_the_steps_since_the_rollout(tiny_folder, tmp_path, micro_batches):
    trainer, _, data = fit(
        tiny_folder, tmp_path, 10, prompts_per_rollout=4, passes=2, mini_batches=2,
        micro_batches=micro_batches,
    )  # fmt: skip
    lags = trainer.logger.of("train/policy_lag")
    assert lags == {step: float((step - 1) % 4) for step in range(1, 11)}
    # one rollout serves four steps, and is logged with the first of them
    assert list(trainer.logger.of("rollout/reward_mean")) == [1, 5, 9]
    assert data.last_rollouts.index == 2 and data.last_rollouts.policy_version == 8


def test_policy_lag_is_always_zero_with_one_update_a_rollout(tiny_folder, tmp_path):
    trainer, module, data = fit(tiny_folder, tmp_path, 5, prompts_per_rollout=3)
    assert trainer.logger.of("train/policy_lag") == dict.fromkeys(range(1, 6), 0.0)
    assert data.last_rollouts.policy_version == 4
    # the policy is the sampler, so its log-probs are those that the engine reported
    gaps = trainer.logger.of("train/sampler_logprob_gap")
    assert len(gaps) == 5 and max(gaps.values()) < 1e-5


def test_absent_domain_logs_nothing(tiny_folder, tmp_path):
    trainer, _, data = fit(tiny_folder, tmp_path, 6, prompts_per_rollout=2)
    drawn = [{prompt.domain for prompt in data.draw(index)} for index in range(6)]
    assert {"pref", "refl"} in drawn and {"pref"} in drawn
    for step, values in trainer.logger.points:
        names = {name for name in values if name.startswith("rollout/")}
        present = {d for d in ("pref", "refl") if any(f"/{d}" in name for name in names)}
        assert present == drawn[step - 1], f"step {step}"
        assert all(f"rollout/reward/{domain}_mean" in names for domain in present)
    steps = [step for step, _ in trainer.logger.points]
    assert steps == list(range(1, 7))


def test_shares_train_one_domain_a_micro_batch(tiny_folder, tmp_path):
    trainer, _, data = fit(
        tiny_folder, tmp_path, 4, prompts_per_rollout={"pref": 2, "refl": 1},
        shares={"pref": 2, "refl": 1},
    )  # fmt: skip
    assert trainer.accumulate_grad_batches == 3
    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 12
    assert trainer.logger.of("train/policy_lag") == dict.fromkeys(range(1, 5), 0.0)
    assert len(trainer.train_dataloader) == 2 * 3  # the smaller pool: two reflections, one a draw


def test_limit_that_cuts_a_window_is_refused(tiny_folder, tmp_path):
    task = PrefixAudit(num_train=6)
    data = BothKinds(task=task, engine=HFEngine(), prompts_per_rollout=4, micro_batches=2)
    data.prepare(str(tiny_folder), tmp_path)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, accumulate_grad_batches=2,
        limit_train_batches=3, limit_val_batches=0, max_steps=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="leaves 3 of 4.*limit_train_batches=2"):
        trainer.fit(GRPO(backbone=str(tiny_folder)), datamodule=data)


OPTIONS = {"prompts_per_rollout": 4, "passes": 2, "mini_batches": 2, "micro_batches": 2}


def test_pending_pieces_survive_a_checkpoint(tiny_folder, tmp_path):
    trainer, _, data = fit(tiny_folder, tmp_path, 3, **OPTIONS)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = saved["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    source = RolloutSource(data)
    source.load_state_dict(state["source"])
    live = trainer.train_dataloader.source
    assert source.next_rollout == live.next_rollout == 1
    assert len(source.pending) == len(live.pending) == 2  # of 8 micro-batches 6 are trained
    for mine, theirs in zip(source.pending, live.pending, strict=True):
        wanted = theirs.state()
        for name, value in mine.state().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, wanted[name]), name
            else:
                assert value == wanted[name], name
        assert mine.old_logprobs is not None and mine.policy_version == 0


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8])
def test_resumed_run_equals_an_unbroken_one(tiny_folder, tmp_path, stop):
    """Stopped with pending pieces (1, 3, 6), between rollouts (4) and at an epoch's end (8)."""
    whole, wanted, _ = fit(tiny_folder, tmp_path / "whole", 10, **OPTIONS)
    first, _, _ = fit(tiny_folder, tmp_path / "cut", stop, **OPTIONS)
    second, module, data = fit(tiny_folder, tmp_path / "cut", 10, resume=True, **OPTIONS)
    points = [*first.logger.points, *second.logger.points]
    assert [step for step, _ in points] == list(range(1, 11))
    assert points == whole.logger.points
    before = GRPO(backbone=str(tiny_folder))
    before.configure_model()
    for (name, got), value, start in zip(
        module.state_dict().items(),
        wanted.state_dict().values(),
        before.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(got, value) and not torch.equal(got, start), name
