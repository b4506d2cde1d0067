"""The policy step on recorded rollouts, with a real Trainer: accumulation, logging, safety."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoTokenizer

from datamodules.engines.scripted import ScriptedEngine
from datamodules.experience import Experience, Rollouts
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.functional.sums import Metrics
from lightning_modules.ops import LogprobEntropy
from lightning_modules.policy_rl.grpo import GRPO

SGD = {"class_path": "torch.optim.SGD", "lr": 1.0}  # one step moves a weight by its gradient
ADAM = {"lr": 1e-2, "weight_decay": 0.1}


class Sums:
    """A reward that depends on the tokens alone."""

    def __call__(self, rollouts: Rollouts) -> dict[str, Tensor]:
        totals = [float(sum(c.token_ids) % 7) for c in rollouts.completions]
        return {"reward": torch.tensor(totals) / 3}


def stream(tiny_folder: Path, **options: Any) -> RolloutDataModule:
    """Two prompts with four recorded completions each, 1 to 8 tokens long."""
    task = PrefixAudit(num_train=2)
    data = RolloutDataModule(
        task=task,
        engine=ScriptedEngine(records=[]),
        reward=Sums(),
        prompts_per_rollout=2,
        **options,
    )
    data.bind(AutoTokenizer.from_pretrained(tiny_folder))
    generator = torch.Generator().manual_seed(0)
    records = [
        {"uid": p.uid, "token_ids": torch.randint(3, 83, (n + i,), generator=generator).tolist()}
        for i, p in enumerate(data.train_prompts())
        for n in (1, 7, 3, 5)
    ]
    data.engine = ScriptedEngine(records=records)
    return data


class Watch(Callback):
    """Weights after every optimizer step, and how the modules stood while training."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.on_train_batch_end(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if len(self.states) == trainer.global_step:
            state = module.state_dict()
            self.states.append({name: value.clone() for name, value in state.items()})


def fit(
    tiny_folder: Path,
    folder: Path,
    *,
    cls: type[GRPO] = GRPO,
    steps: int = 1,
    data: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[GRPO, list[dict[str, Tensor]]]:
    """Train and return the module and its weights before and after every step."""
    stream_data = stream(tiny_folder, **(data or {}))
    settings: dict[str, Any] = {"optimizer": SGD, "samples_per_prompt": 4, "max_new_tokens": 9}
    module = cls(backbone=str(tiny_folder), **settings | options)
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, limit_val_batches=0,
        accumulate_grad_batches=stream_data.window, use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, default_root_dir=folder, callbacks=[watch],
        logger=TensorBoardLogger(str(folder), name="board", version=""), **(flags or {}),
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=stream_data)
    finally:
        for logger in trainer.loggers:
            logger.finalize("success")
    return module, watch.states


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every tag of the event file: its points as (x, value)."""
    board = EventAccumulator(str(folder / "board"), size_guidance={"scalars": 0})
    board.Reload()
    return {
        tag: [(point.step, point.value) for point in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def change(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name] - value for name, value in before.items()}


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [8, 3])
@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_sum_const"])
def test_accumulation_changes_no_gradient(tiny_folder, tmp_path, mode, micro_batches):
    """One batch of eight against eight of one, and three of unequal sizes."""
    options = {"loss_aggregation": mode, "kl_coef": 0.5}
    _, one = fit(tiny_folder, tmp_path / "one", steps=2, **options)
    data = {"micro_batches": micro_batches}
    _, many = fit(tiny_folder, tmp_path / "many", steps=2, data=data, **options)
    for step in (1, 2):
        torch.testing.assert_close(many[step], one[step], atol=1e-6, rtol=1e-5)
        moved = change(one[step - 1], one[step])
        assert max(float(value.abs().max()) for value in moved.values()) > 1e-3


def test_logged_values_under_accumulation_are_those_of_the_batch(tiny_folder, tmp_path):
    options = {"steps": 3, "kl_coef": 0.1, "optimizer": {"lr": 1e-3}}
    fit(tiny_folder, tmp_path / "one", **options)
    module, states = fit(tiny_folder, tmp_path / "many", data={"micro_batches": 8}, **options)
    one, many = scalars(tmp_path / "one"), scalars(tmp_path / "many")
    assert one.keys() == many.keys()
    for tag in one:
        if tag in ("epoch", "hp_metric"):
            continue
        assert [step for step, _ in many[tag]] == [1, 2, 3], tag
        wanted = pytest.approx([value for _, value in one[tag]], rel=1e-3, abs=1e-5)
        assert [value for _, value in many[tag]] == wanted, tag
    # and against slow sums over the first batch
    module.policy.load_state_dict(
        {name[7:]: v for name, v in states[0].items() if name.startswith("policy.")}
    )
    rollouts, logprobs, entropies = by_hand(module, stream(tiny_folder))
    assert many["rollout/reward_mean"][0][1] == pytest.approx(float(rollouts.reward.mean()))
    tokens = sum(map(len, logprobs))
    assert many["train/entropy"][0][1] == pytest.approx(
        float(torch.cat(entropies).mean()), rel=1e-5
    )
    loss = -sum(a * len(p) for a, p in zip(rollouts.advantages, logprobs, strict=True)) / tokens
    assert many["train/loss"][0][1] == pytest.approx(float(loss), rel=1e-4)
    assert many["rollout/length_mean"][0][1] == tokens / 8
    assert many["train/kl"][0][1] < 1e-9 < 1e-7 < many["train/kl"][2][1]


# --- the loss against formulas written out --------------------------------------------------------


def by_hand(module: GRPO, data: RolloutDataModule) -> tuple[Rollouts, list[Tensor], list[Tensor]]:
    """Scored rollouts; per completion log-probs and entropies from full logits, one at a time."""
    data.engine.sync(None, 0)
    prompts = sorted(data.train_prompts(), key=lambda prompt: prompt.uid)
    rollouts = module.rollout(prompts, data.engine)
    rollouts.reward = data.reward(rollouts)["reward"]
    rollouts.advantages, _ = module.advantages(rollouts)
    logprobs, entropies = [], []
    for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        rows = module.policy.base(ids).logits[0, len(prompt.token_ids) - 1 : -1]
        rows = (rows / module.temperature).log_softmax(-1)
        logprobs.append(rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0])
        entropies.append(-(rows.exp() * rows).sum(-1).detach())
    return rollouts, logprobs, entropies


def built(tiny_folder: Path, **options: Any) -> GRPO:
    settings: dict[str, Any] = {"samples_per_prompt": 4, "max_new_tokens": 9}
    module = GRPO(backbone=str(tiny_folder), **settings | options)
    module.configure_model()
    return module


def gradients(module: GRPO, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_pass_is_reinforce_with_a_baseline(tiny_folder, temperature, normalize_std):
    """d loss = - sum_i A_i d log p(completion i) / tokens, with A written out."""
    module = built(tiny_folder, temperature=temperature, normalize_std=normalize_std)
    data = stream(tiny_folder)
    rollouts, logprobs, _ = by_hand(module, data)
    total = torch.zeros(())
    for group in (0, 1):
        rewards = [float(rollouts.reward[i]) for i in range(4 * group, 4 * group + 4)]
        mean = sum(rewards) / 4
        std = math.sqrt(sum((value - mean) ** 2 for value in rewards) / 3)
        assert std > 0.1
        for i, reward in enumerate(rewards):
            advantage = (reward - mean) / (std + 1e-6 if normalize_std else 1.0)
            total = total - advantage * logprobs[4 * group + i].sum()
    wanted = gradients(module, total / sum(map(len, logprobs)))
    assert rollouts.num_updates == 1
    got = gradients(module, module.training_step(rollouts.batch(), 0))
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_clips_and_kl_against_a_slow_loop(tiny_folder, dual_clip):
    module = built(tiny_folder, dual_clip=dual_clip, kl_coef=0.2, clip_high=0.3)
    rollouts, logprobs, _ = by_hand(module, stream(tiny_folder))
    batch = rollouts.batch()
    padded = torch.nn.utils.rnn.pad_sequence([p.detach() for p in logprobs], batch_first=True)
    generator = torch.Generator().manual_seed(4)
    batch.old_logprobs = padded - 2.5 * torch.rand(padded.shape, generator=generator)
    batch.ref_logprobs = padded + torch.randn(padded.shape, generator=generator)
    loss, kl, dual, tokens = 0.0, 0.0, 0, 0
    for i, row in enumerate(logprobs):
        advantage = float(rollouts.advantages[i])
        for t, logprob in enumerate(row.tolist()):
            ratio = math.exp(logprob - float(batch.old_logprobs[i, t]))
            value = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.3))
            if dual_clip and advantage < 0 and ratio > dual_clip:
                value, dual = -advantage * dual_clip, dual + 1
            d = float(batch.ref_logprobs[i, t]) - logprob
            loss, kl, tokens = loss + value, kl + math.exp(d) - d - 1, tokens + 1
    got = module.training_step(batch, 0).detach()
    assert float(got) == pytest.approx((loss + 0.2 * kl) / tokens, rel=1e-4)
    logged = module.reduce_window()
    assert logged["train/kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert ("train/clip_share_dual" in logged) is (dual_clip is not None)
    if dual_clip:
        assert dual and logged["train/clip_share_dual"] == pytest.approx(dual / tokens)


# --- which parameters move ------------------------------------------------------------------------


def test_policy_moves_and_the_reference_does_not(tiny_folder, tmp_path):
    module, states = fit(tiny_folder, tmp_path, steps=2, optimizer=ADAM, kl_coef=0.1, dual_clip=3.0)
    for name, value in states[0].items():
        is_frozen = name.startswith("reference.")
        assert torch.equal(states[2][name], value) is is_frozen, name
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert names == {name for name in states[0] if name.startswith("policy.")}
    assert len(states[0]) == 2 * len(names)
    assert not any(part.training for part in module.train().reference.modules())
    logged = scalars(tmp_path)
    assert [value for _, value in logged["train/clip_share_dual"]] == [0.0, 0.0]
    assert logged["train/kl"][0] == (1, 0.0) and logged["train/kl"][1][1] > 0


def test_with_lora_only_adapters_move(tiny_folder, tmp_path):
    lora = {"r": 4, "alpha": 8.0}
    module, states = fit(tiny_folder, tmp_path, steps=3, optimizer=ADAM, kl_coef=0.1, lora=lora)
    assert module.reference is None
    for name, value in states[0].items():
        assert torch.equal(states[3][name], value) is ("lora_" not in name), name
    assert sum("lora_" in name for name in states[0]) == 2 * 2 * 7  # A and B of 7 layers in 2
    kl = [value for _, value in scalars(tmp_path)["train/kl"]]
    assert kl[0] == 0 and 0 < kl[1] < kl[2]
    # the reference is the adapter switched off: the plain backbone
    rollouts, logprobs, _ = by_hand(module, stream(tiny_folder))
    _, plain, _ = by_hand(built(tiny_folder), stream(tiny_folder))
    ref = module.annotate(rollouts)["ref_logprobs"]
    for row, wanted, other in zip(ref, plain, logprobs, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted.detach(), atol=1e-5, rtol=0)
        assert (wanted - other).abs().max() > 1e-3


# --- bad gradients and clipping -------------------------------------------------------------------


class Faulty(GRPO):
    """A loss that is not finite in chosen steps (of the first micro-batch only)."""

    bad = (1,)
    value = math.nan
    spoilt = -1

    def regularizer(
        self, tokens: LogprobEntropy, batch: Experience
    ) -> tuple[Tensor | None, Metrics]:
        if self.global_step in self.bad and self.spoilt != self.global_step:
            self.spoilt = self.global_step
            return tokens.logprob * self.value, {}
        return None, {}


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_gradient_skips_the_step(tiny_folder, tmp_path, monkeypatch, value, micro_batches):
    monkeypatch.setattr(Faulty, "value", value)
    with pytest.warns(UserWarning, match="skipped optimizer step 1: the gradient is not finite"):
        module, states = fit(
            tiny_folder, tmp_path, cls=Faulty, steps=4, optimizer=ADAM,
            data={"micro_batches": micro_batches}, flags={"gradient_clip_val": 1.0},
        )  # fmt: skip
    assert len(states) == 5 and module.bad_steps == 1
    for name, before in states[1].items():
        assert torch.equal(states[2][name], before), name  # neither decay nor momentum
        assert not torch.equal(states[1][name], states[0][name])
        assert not torch.equal(states[3][name], states[2][name])
        assert states[4][name].isfinite().all()
    logged = scalars(tmp_path)
    assert logged["train/bad_steps"] == [(1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    assert [step for step, _ in logged["train/grad_norm"]] == [1, 3, 4]


def test_run_stops_at_max_bad_steps_with_its_batch_saved(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Faulty, "bad", (1, 3, 4))
    with pytest.raises(RuntimeError, match=r"2 steps .*model\.max_bad_steps=2.*bad_batch\.pt"):
        fit(tiny_folder, tmp_path, cls=Faulty, steps=9, max_bad_steps=2)
    saved = Experience(**torch.load(tmp_path / "bad_batch.pt", weights_only=True)[0][0])
    wanted, _, _ = by_hand(built(tiny_folder), stream(tiny_folder))
    pairs = zip(wanted.prompts, wanted.completions, strict=True)
    rows = {prompt.token_ids + completion.token_ids for prompt, completion in pairs}
    pairs = zip(saved.input_ids, saved.attention_mask, strict=True)
    assert {tuple(ids[mask.bool()].tolist()) for ids, mask in pairs} == rows
    assert saved.policy_version == 3 and saved.domain_names == ["pref"]


class TwoRoles(GRPO):
    """The head as a part of its own, as a critic would be."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: dict[str, list[Any]] = {"policy": [], "critic": []}
        for name, parameter in self.named_parameters():
            groups["critic" if "lm_head" in name else "policy"].append(parameter)
        return [{"params": params, "role": role} for role, params in groups.items()]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_by_role(tiny_folder, tmp_path, algorithm):
    """A bound between both norms: the larger is scaled down to it, the other left alone."""
    _, states = fit(tiny_folder, tmp_path / "free", cls=TwoRoles)
    raw = change(*states)
    roles = [[n for n in raw if ("lm_head" in n) is is_critic] for is_critic in (True, False)]
    norms = [float(torch.cat([raw[n].flatten() for n in names]).norm()) for names in roles]
    assert abs(math.log(norms[0] / norms[1])) > 0.1
    bound = sum(norms) / 2 if algorithm == "norm" else 1e-3
    flags = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    _, states = fit(tiny_folder, tmp_path / "cut", cls=TwoRoles, flags=flags)
    clipped = change(*states)
    for names, norm in zip(roles, norms, strict=True):
        for name in names:
            wanted = raw[name] * min(1.0, bound / norm)
            if algorithm == "value":
                wanted = raw[name].clamp(-bound, bound)
            torch.testing.assert_close(clipped[name], wanted, atol=1e-6, rtol=1e-3)
