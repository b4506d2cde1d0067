"""Tokens that an environment wrote: context for what follows, and nothing trains on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.sample_table import SampleTable, _histograms, _records
from datamodules.experience import Completion, Experience, FinishReason, Prompt, Rollouts, span
from datamodules.tasks.prefix_audit import PrefixAudit
from datamodules.word_tokenizer import word_tokenizer
from lightning_modules.backbones.causal_lm import (
    CausalLM,
    Completions,
    completion_logprobs,
    load_causal_lm,
)
from lightning_modules.functional.advantages import generalized_advantages
from lightning_modules.options import BackboneOptions, LoraOptions
from lightning_modules.policy_rl.grpo import GRPO
from lightning_modules.policy_rl.ppo import PPO
from tests.lightning_modules.test_policy_step import SGD, fit, scalars

#: Of eight completions: which of their tokens were observed.
MARKS = ["00110", "0", "0010010", "0011", "01111", "1100", "000", "00110111000"]


def completions(marks: list[str] = MARKS, wild: float = 0.0) -> list[Completion]:
    """Random tokens; ``wild`` stands at observed places, where no log-prob means anything."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for row in marks:
        ids = torch.randint(3, 83, (len(row),), generator=generator).tolist()
        logprobs = tuple(wild if mark == "1" else -1.0 - int(mark) for mark in row)
        observed = tuple(mark == "1" for mark in row)
        made.append(Completion(tuple(ids), logprobs, FinishReason.STOP, observed=observed))
    return made


def rollouts(marks: list[str] = MARKS, wild: float = 0.0) -> Rollouts:
    """Two prompts of four completions each."""
    task = PrefixAudit()
    prompts = [Prompt("a", (5, 6, 7), task), Prompt("b", (8, 9, 10, 11), task)]
    made = completions(marks, wild)
    return Rollouts.from_groups(prompts, [made[:4], made[4:]])


def table(marks: list[str]) -> Tensor:
    """``(N, T)`` True on what the policy wrote."""
    width = max(map(len, marks))
    return torch.tensor([[m == "0" for m in row.ljust(width, "1")] for row in marks])


def gapped(found: Rollouts) -> dict[str, Tensor]:
    """What a forward pass over the rollouts takes."""
    batch = found.batch()
    return {
        "input_ids": batch.input_ids,
        "prompt_lengths": batch.prompt_lengths,
        "mask": batch.mask,
        "groups": batch.groups,
    }


# --- masks ----------------------------------------------------------------------------------------


def test_masks_leave_observed_tokens_out() -> None:
    found = rollouts()
    assert torch.equal(found.trained_mask, table(MARKS))
    assert found.mask.sum(1).tolist() == [len(row) for row in MARKS]
    assert [one.num_written for one in found.completions] == [row.count("0") for row in MARKS]
    found.leave_out(torch.arange(8) == 2)
    assert torch.equal(found.trained_mask, table([*MARKS[:2], "1" * 7, *MARKS[3:]]))
    found.advantages = torch.ones(8)
    batch = found.batch()
    assert torch.equal(batch.advantages, batch.mask.float())
    assert batch.attention_mask.sum(1).tolist() == [
        len(p.token_ids) + len(c.token_ids)
        for p, c in zip(found.prompts, found.completions, strict=True)
    ]


def test_marks_of_another_length_are_refused() -> None:
    found = rollouts()
    found.completions[1] = replace(found.completions[1], observed=(False, True))
    with pytest.raises(ValueError, match="prompt 'a': 2 marks of observed tokens for 1 tokens"):
        found.batch()


def test_rows_are_cut_behind_their_last_trained_token() -> None:
    assert span(table(MARKS)).tolist() == [5, 1, 7, 2, 1, 4, 3, 11]
    assert span(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [0, 0]
    full = rollouts().batch()
    full.extra = {"values": torch.randn(8, 11)}
    for rows in ([0, 3], [4], [2, 6], [7, 1]):
        part = full.select(torch.tensor(rows))
        width = max(span(table([MARKS[row] for row in rows])).tolist())
        assert part.mask.shape[1] == part.extra["values"].shape[1] == width
        assert torch.equal(part.mask, full.mask[rows, :width])
        assert part.input_ids.shape[1] == int(full.attention_mask[rows].sum(1).max())


# --- the forward pass -----------------------------------------------------------------------------


def results(policy: CausalLM, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    policy.zero_grad()
    found = completion_logprobs(policy, **batch, entropy_grad=True)
    (found.logprob.sum() + 0.5 * found.entropy.sum()).backward()
    return found, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)])
def test_a_shared_prompt_gives_the_same_around_gaps(
    tiny_folder: Path, lora: LoraOptions | None
) -> None:
    policy = load_causal_lm(BackboneOptions(str(tiny_folder)), lora)
    batch = gapped(rollouts([*MARKS, *MARKS[::-1], *MARKS, *MARKS]))  # several buckets
    whole, wanted = results(policy, {**batch, "groups": None})
    shared, got = results(policy, batch)
    torch.testing.assert_close(shared.logprob, whole.logprob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.entropy, whole.entropy, atol=1e-5, rtol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-4)
    assert not shared.logprob[~batch["mask"]].any()


@pytest.mark.parametrize("share", [True, False])
def test_observed_tokens_are_read_and_never_predicted(tiny_folder: Path, share: bool) -> None:
    policy = load_causal_lm(BackboneOptions(str(tiny_folder)))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    batch = gapped(rollouts())
    groups = batch["groups"] if share else None
    full = torch.arange(11)[None] < torch.tensor([len(row) for row in MARKS])[:, None]
    with torch.no_grad():
        some = completion_logprobs(policy, **{**batch, "groups": groups})
        every = completion_logprobs(policy, **{**batch, "groups": groups, "mask": full})
        wanted = torch.where(batch["mask"], every.logprob, 0.0)
        torch.testing.assert_close(some.logprob, wanted, atol=1e-5, rtol=1e-5)
        other = batch["input_ids"].clone()
        other[0, 3 + 2] = 3 + (other[0, 3 + 2] - 2) % 80  # an observed token of the first row
        changed = completion_logprobs(policy, **{**batch, "groups": groups, "input_ids": other})
    moved = (changed.logprob - some.logprob).abs() > 1e-4
    assert moved[0].tolist() == [False] * 4 + [True] + [False] * 6, "only what follows it"
    assert not moved[1:].any()


# --- the loss -------------------------------------------------------------------------------------


class Parts:
    """A reward of the tokens alone."""

    def __call__(self, found: Rollouts) -> dict[str, Tensor]:
        return {"reward": torch.tensor([float(sum(c.token_ids) % 7) for c in found.completions])}


def annotated(module: GRPO, wild: float = 0.0) -> Experience:
    """A batch as the datamodule makes it."""
    found = rollouts(wild=wild)
    found.num_updates = 2
    found.reward = Parts()(found)["reward"]
    found.parts = {"reward": found.reward}
    with torch.no_grad():
        found.annotations(module.annotate(found))
    found.advantages, _ = module.advantages(found)
    return found.batch()


def built(tiny_folder: Path, cls: type[GRPO], **options: Any) -> GRPO:
    module = cls(backbone=str(tiny_folder), kl_coef=0.1, samples_per_prompt=4, **options)
    torch.manual_seed(0)
    module.build()
    return module


SETTINGS: dict[str, tuple[type[GRPO], dict[str, Any]]] = {
    "grpo": (GRPO, {}),
    "corrected": (GRPO, {"sampler_correction": 2.0, "loss_aggregation": "sequence_mean"}),
    "ppo": (PPO, {"gamma": 0.9, "gae_lambda": 0.8}),
    "head": (PPO, {"critic": "head"}),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("share", [True, False])
def test_log_probs_at_observed_places_change_nothing(
    tiny_folder: Path, name: str, share: bool
) -> None:
    cls, options = SETTINGS[name]
    module = built(tiny_folder, cls, share_prompts=share, **options)
    losses, gradients = [], []
    for wild in (0.0, float("nan")):
        batch = annotated(module, wild)
        if wild:
            for value in (batch.old_logprobs, batch.ref_logprobs, *batch.extra.values()):
                assert value is not None
                value[~batch.mask] = wild
        module.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert losses[0] == losses[1] != 0.0
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_gradient_reaches_observed_targets(tiny_folder: Path, name: str) -> None:
    """Of every log-prob, entropy and value of all completion tokens, as if none were masked."""
    cls, options = SETTINGS[name]
    module = built(tiny_folder, cls, **options)
    batch = annotated(module)
    full = replace(batch, mask=rollouts().mask)
    tokens = completion_logprobs(
        module.policy, full.input_ids, full.prompt_lengths, full.mask, entropy_grad=True
    )
    tokens.logprob.retain_grad()
    losses = [module.policy_loss(tokens, batch)[0], module.regularizer(tokens, batch)[0]]
    sum(loss.sum() for loss in losses).backward()
    hit = tokens.logprob.grad != 0
    assert not hit[~batch.mask].any()
    assert hit[batch.mask].float().mean() > 0.7  # the group's zero advantages aside
    if isinstance(module, PPO):
        assert batch.extra["returns"][batch.mask].any()
        assert not batch.extra["returns"][~batch.mask].any()
        assert not batch.extra["values"][~batch.mask].any()


def test_head_rows_of_words_that_were_only_observed_get_no_target(tiny_folder: Path) -> None:
    """A target pulls its row of the head along the state; without one there is the softmax only."""
    policy = load_causal_lm(BackboneOptions(str(tiny_folder)))
    found = rollouts()
    seen, word = found.completions[0], 70
    ids = tuple(word if mark else 5 for mark in seen.observed or ())
    found.completions[0] = replace(seen, token_ids=ids)
    batch = {name: value[:1] for name, value in gapped(found).items()}
    assert not policy.config.tie_word_embeddings
    for mask in (batch["mask"], found.mask[:1]):
        inside = {**batch, "mask": mask, "groups": None}
        where = Completions(batch["prompt_lengths"], mask, None)
        hidden = policy(batch["input_ids"], completions=where, output="hidden").detach()
        head = policy.base.get_output_embeddings().weight
        of_softmax = -((hidden @ head.detach().T).softmax(-1)[:, word, None] * hidden).sum(0)
        policy.zero_grad()
        completion_logprobs(policy, **inside, with_entropy=False).logprob.sum().backward()
        rest = head.grad[word] - of_softmax
        assert (float(rest.abs().max()) < 1e-5) is (mask is batch["mask"])


# --- advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.5, 0.0)])
def test_gae_of_a_text_with_gaps_is_that_of_the_text_without_them(gamma: float, lam: float) -> None:
    mask = table(MARKS)
    rewards, values = torch.randn(mask.shape), torch.randn(mask.shape)
    rewards[~mask], values[~mask] = float("nan"), float("inf")
    got, returns = generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    for row, live in enumerate(mask):
        one = torch.ones(1, int(live.sum()), dtype=torch.bool)
        wanted, goal = generalized_advantages(
            rewards[row, live][None], values[row, live][None], one, gamma=gamma, gae_lambda=lam
        )
        torch.testing.assert_close(got[row, live], wanted[0])
        torch.testing.assert_close(returns[row, live], goal[0])
    assert not got[~mask].any() and not returns[~mask].any()


def test_the_reward_stands_on_the_last_token_of_the_policy(tiny_folder: Path) -> None:
    module = built(tiny_folder, PPO, whiten_advantages=False, gamma=0.5)
    found = rollouts()
    found.reward = torch.arange(1.0, 9.0)
    found.extra["values"] = torch.zeros(8, 11)
    advantages, metrics = module.advantages(found)
    for row, marks in enumerate(MARKS):
        places = [place for place, mark in enumerate(marks) if mark == "0"]
        wanted = [float(found.reward[row]) * 0.5**n for n in reversed(range(len(places)))]
        assert advantages[row, places].tolist() == pytest.approx(wanted)
    assert not advantages[~table(MARKS)].any()
    assert float(metrics["rollout/value"][1]) == table(MARKS).sum()


def test_whitening_is_over_the_policys_tokens(tiny_folder: Path) -> None:
    module = built(tiny_folder, PPO)
    found = rollouts()
    found.reward = torch.arange(1.0, 9.0)
    found.extra["values"] = torch.randn(8, 11)
    advantages, _ = module.advantages(found)
    mine = advantages[table(MARKS)]
    assert float(mine.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(mine.std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)


# --- what is logged -------------------------------------------------------------------------------


def test_metrics_count_what_the_policy_wrote(tiny_folder: Path) -> None:
    module = built(tiny_folder, GRPO)
    found = rollouts()
    found.reward = Parts()(found)["reward"]
    metrics = module.rollout_metrics(found)
    written = [row.count("0") for row in MARKS]
    assert metrics["rollout/length"].mean == pytest.approx(sum(written) / 8)
    assert metrics["rollout/observed"].total == sum(map(len, MARKS)) - sum(written)
    plain = rollouts()
    plain.completions = [replace(one, observed=None) for one in plain.completions]
    plain.reward = found.reward
    metrics = module.rollout_metrics(plain)
    assert not [name for name in metrics if "observed" in name]
    assert metrics["rollout/length"].total == sum(map(len, MARKS))


def test_the_sample_table_tells_them_apart(tmp_path: Path) -> None:
    found = rollouts()
    found.prompts[0].task.bind(word_tokenizer(PrefixAudit().vocabulary()))
    found.reward = Parts()(found)["reward"]
    found.parts, found.advantages = {"reward": found.reward}, found.reward.clone()
    found.completions[1] = replace(found.completions[1], observed=None)
    records = _records(found, 1)
    assert [record.get("observed") for record in records[:3]] == [[2, 3], None, [2, 5]]
    histograms = _histograms(found)
    assert histograms["length_histogram"].tolist() == [row.count("0") for row in MARKS]
    assert histograms["token_surprise_histogram"].tolist() == [1.0] * int(table(MARKS).sum())
    board = SampleTable(path=str(tmp_path / "samples.jsonl"))
    board._append(records)
    read = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert read[7]["observed"] == [2, 3, 5, 6, 7]


# --- a real run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [GRPO, PPO])
def test_training_steps_with_gaps_do_not_depend_on_sharing_or_cutting(
    cls: type[GRPO], tiny_folder: Path, tmp_path: Path
) -> None:
    class Marked(cls):  # type: ignore[misc, valid-type]
        def rollout(self, prompts: Any, engine: Any) -> Rollouts:
            found = super().rollout(prompts, engine)
            found.completions = [
                replace(one, observed=tuple(n % 3 == 1 for n in range(len(one.token_ids))))
                for one in found.completions
            ]
            return found

    options = {"cls": Marked, "steps": 2, "optimizer": SGD | {"lr": 0.1}, "kl_coef": 0.1}
    _, one = fit(tiny_folder, tmp_path / "a", **options)
    _, whole = fit(tiny_folder, tmp_path / "b", share_prompts=False, **options)
    _, parts = fit(tiny_folder, tmp_path / "c", data={"micro_batches": 4}, **options)
    _, plain = fit(tiny_folder, tmp_path / "d", **(options | {"cls": cls}))
    for name, value in one[-1].items():
        torch.testing.assert_close(whole[-1][name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(parts[-1][name], value, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(plain[-1][k], v, atol=1e-4) for k, v in one[-1].items())
    points = scalars(tmp_path / "a")
    assert points["rollout/observed_max"][0][1] == 3, "of eight tokens"
    assert points["rollout/length_max"][0][1] == 5
