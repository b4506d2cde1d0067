"""Rollouts as a data stream: draws, cutting into windows, pending pieces, policy lag."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger

from callbacks.rng_state import RngState
from callbacks.step_checkpoint import StepCheckpoint
from datamodules.engines.hf import HFEngine
from datamodules.engines.scripted import ScriptedEngine
from datamodules.experience import Completion, Experience, FinishReason, Prompt, Rollouts
from datamodules.rollouts import RolloutDataModule, RolloutSource
from datamodules.tasks.base import Task
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.policy_rl.grpo import GRPO


class Lines(Task):
    """Prompts by number; every third one is of domain ``refl``."""

    def __init__(self, count: int = 12) -> None:
        self.count = count

    def records(self, split: str) -> list[int]:
        return list(range(self.count))

    def prompt(self, record: int) -> Prompt:
        domain = "refl" if record % 3 == 2 else "pref"
        return Prompt(str(record), (1, 2, record), self, domain)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        return {"reward": 0.0}


def stream(count: int = 12, rank: int = 0, world: int = 1, **options: Any) -> RolloutDataModule:
    data = RolloutDataModule(task=Lines(count), engine=ScriptedEngine(records=[]), **options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return data


def uids(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.uid for prompt in prompts]


# --- drawing prompts ------------------------------------------------------------------------------


def test_draw_is_a_function_of_seed_index_and_rank():
    data = stream(prompts_per_rollout=4, seed=3)
    first = [uids(data.draw(index)) for index in range(9)]
    fresh = stream(prompts_per_rollout=4, seed=3)
    assert [uids(fresh.draw(index)) for index in reversed(range(9))] == first[::-1]
    other = stream(prompts_per_rollout=4, seed=4)
    assert [uids(other.draw(index)) for index in range(9)] != first


def test_no_prompt_comes_twice_in_a_cycle_and_cycles_differ():
    data = stream(13, prompts_per_rollout=4)
    assert data.rollouts_per_epoch() == 3
    cycles = [sum((uids(data.draw(3 * c + i)) for i in range(3)), []) for c in range(3)]
    assert all(len(cycle) == len(set(cycle)) == 12 for cycle in cycles)
    assert cycles[0] != cycles[1] != cycles[2]


@pytest.mark.parametrize("world", [2, 4])
def test_rank_slices_are_disjoint_and_make_the_whole_draw(world):
    counts = {"pref": 4, "refl": 4}
    whole = stream(prompts_per_rollout=counts)
    ranks = [stream(rank=r, world=world, prompts_per_rollout=counts) for r in range(world)]
    for index in range(4):
        slices = [uids(data.draw(index)) for data in ranks]
        assert sorted(sum(slices, [])) == sorted(uids(whole.draw(index)))
        domains = [[prompt.domain for prompt in data.draw(index)] for data in ranks]
        assert domains == [["pref"] * (4 // world) + ["refl"] * (4 // world)] * world


def test_draw_that_ranks_cannot_divide_is_refused():
    data = stream(world=2, prompts_per_rollout={"pref": 4, "refl": 3})
    with pytest.raises(ValueError, match=r"prompts_per_rollout\.refl=3 cannot be divided by 2"):
        data.draw(0)


def test_pools_hold_their_domain_only():
    data = stream(prompts_per_rollout={"pref": 3, "refl": 2})
    assert {name: uids(pool) for name, pool in data.pools().items()} == {
        "pref": ["0", "1", "3", "4", "6", "7", "9", "10"],
        "refl": ["2", "5", "8", "11"],
    }
    assert [prompt.domain for prompt in data.draw(1)] == ["pref"] * 3 + ["refl"] * 2
    assert data.rollouts_per_epoch() == 2  # 8 // 3 and 4 // 2


def test_domain_asked_for_with_zero_is_left_out():
    data = stream(prompts_per_rollout={"pref": 3, "refl": 0})
    assert list(data.pools()) == ["pref"]
    assert all(prompt.domain == "pref" for index in range(6) for prompt in data.draw(index))


def test_more_prompts_than_there_are_give_each_once():
    data = stream(prompts_per_rollout={"refl": 100})
    assert sorted(uids(data.draw(0))) == ["11", "2", "5", "8"]
    assert data.rollouts_per_epoch() == 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"pref": 2, "rfl": 1}, r"rfl=1, but there are no such .* with prompts: pref, refl"),
        ({"pref": 0, "refl": 0}, "asks for no prompts at all"),
    ],
)
def test_pools_without_prompts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        stream(prompts_per_rollout=counts).pools()


@pytest.mark.parametrize(
    "options", [{"mini_batches": 0}, {"passes": 0}, {"micro_batches": -1}, {"shares": {"refl": 0}}]
)
def test_counts_below_one_are_refused(options):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(options))}.* must be at least 1"):
        stream(**options)


# --- cutting a rollout into windows of micro-batches ------------------------------------------------


def scored(domains: Sequence[str], index: int = 0) -> Rollouts:
    """Rollouts of unequal lengths; the reward of row i is i, so that pieces can be told apart."""
    task = Lines()
    prompts = [Prompt(str(i), (3,) * (2 + i % 3), task, d) for i, d in enumerate(domains)]
    completions = [
        [Completion((10 + i,) * (1 + i % 4), (-0.5,) * (1 + i % 4), FinishReason.STOP)]
        for i in range(len(domains))
    ]
    rollouts = Rollouts.from_groups(prompts, completions)
    rollouts.index = index
    rollouts.reward = torch.arange(float(len(domains)))
    rollouts.advantages = rollouts.reward / 10
    return rollouts


def rows(pieces: Sequence[Experience]) -> list[int]:
    return [int(value) for piece in pieces for value in piece.reward]


@pytest.mark.parametrize(
    ("passes", "mini_batches", "micro_batches"),
    [(1, 1, 1), (1, 1, 4), (1, 3, 1), (3, 1, 1), (2, 2, 2), (2, 3, 3), (1, 2, 5)],
)
def test_cut_gives_every_rollout_once_a_pass(passes, mini_batches, micro_batches):
    data = stream(passes=passes, mini_batches=mini_batches, micro_batches=micro_batches)
    pieces = data.cut(scored(["pref"] * 11))
    a_pass = mini_batches * micro_batches
    assert len(pieces) == passes * a_pass
    orders = [rows(pieces[i * a_pass : (i + 1) * a_pass]) for i in range(passes)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len(set(map(tuple, orders))) == passes  # each pass in an order of its own
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    for piece in pieces:
        assert piece.window_size == micro_batches


def test_pieces_hold_the_rows_of_the_rollout_trimmed():
    rollouts = scored(["pref"] * 9)
    for piece in stream(micro_batches=4).cut(rollouts):
        assert piece.input_ids.shape[1] == piece.attention_mask.sum(1).max()
        assert piece.mask.shape[1] == piece.mask.sum(1).max()
        for place, row in enumerate(rows([piece])):
            tokens = rollouts.prompts[row].token_ids + rollouts.completions[row].token_ids
            kept = piece.input_ids[place][piece.attention_mask[place].bool()]
            assert tuple(kept.tolist()) == tokens
            assert piece.prompt_lengths[place] == len(rollouts.prompts[row].token_ids)
            live = piece.mask[place]
            assert int(live.sum()) == len(rollouts.completions[row].token_ids)
            torch.testing.assert_close(piece.advantages[place], live * row / 10)
            torch.testing.assert_close(piece.sampler_logprobs[place], live * -0.5)


def test_cut_is_a_function_of_seed_and_rollout():
    options = {"mini_batches": 2, "micro_batches": 2}
    order = rows(stream(**options).cut(scored(["pref"] * 12, index=4)))
    assert order == rows(stream(**options).cut(scored(["pref"] * 12, index=4)))
    assert order != rows(stream(**options).cut(scored(["pref"] * 12, index=5)))
    assert order != rows(stream(seed=1, **options).cut(scored(["pref"] * 12, index=4)))


@pytest.mark.parametrize(("passes", "mini_batches"), [(1, 1), (2, 3)])
def test_unequal_shares_give_one_domain_a_micro_batch(passes, mini_batches):
    data = stream(passes=passes, mini_batches=mini_batches, shares={"pref": 2, "refl": 1})
    assert data.window == 3
    domains = ["pref"] * 13 + ["refl"] * 5
    pieces = data.cut(scored(domains))
    assert len(pieces) == passes * mini_batches * 3
    of_piece = []
    for piece in pieces:
        kinds = {piece.domain_names[i] for i in piece.domains.tolist()}
        assert kinds == {domains[row] for row in rows([piece])} and len(kinds) == 1
        of_piece += kinds
    assert of_piece == ["pref", "pref", "refl"] * (passes * mini_batches)
    for start in range(0, len(pieces), 3 * mini_batches):
        assert sorted(rows(pieces[start : start + 3 * mini_batches])) == list(range(18))
    assert {piece.window_size for piece in pieces} == {3}


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 1},
        {"micro_batches": 3, "mini_batches": 2, "passes": 2},
        {"shares": {"refl": 1, "pref": 2}, "mini_batches": 2},
    ],
)
def test_window_tokens_are_those_of_the_whole_window(options):
    data = stream(**options)
    pieces = data.cut(scored(["pref"] * 9 + ["refl"] * 4))
    for start in range(0, len(pieces), data.window):
        window = pieces[start : start + data.window]
        tokens = sum(int(piece.mask.sum()) for piece in window)
        sequences = sum(len(piece) for piece in window)
        assert all(piece.window_tokens == tokens for piece in window)
        assert all(piece.window_sequences == sequences for piece in window)
    a_pass = sum(piece.window_tokens for piece in pieces) / data.window / data.passes
    assert a_pass == sum(1 + i % 4 for i in range(13))


@pytest.mark.parametrize(
    ("domains", "options", "message"),
    [
        (["pref"] * 3, {"micro_batches": 4}, r"data\.shares: 3 rollouts cannot fill 4 micro-"),
        (["pref"] * 5, {"micro_batches": 2, "mini_batches": 3}, "5 rollouts cannot fill 6 micro-"),
        (
            ["pref"] * 9 + ["refl"],
            {"shares": {"pref": 2, "refl": 1}, "mini_batches": 2},
            r"data\.shares\.refl: 1 rollouts cannot fill 2 micro-batches; draw more",
        ),
        (["pref"] * 9, {"shares": {"pref": 2, "refl": 1}}, r"data\.shares\.refl: 0 rollouts"),
        (["pref", "refl"], {"shares": {"pref": 1}}, r"no micro-batches for refl.*data\.shares\.ref"),
    ],
)
def test_rollouts_that_fill_no_window_are_refused(domains, options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options).cut(scored(domains))


# --- in a real run ----------------------------------------------------------------------------------


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
