"""A prompt read once gives what reading every sequence whole gives, gradients included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.backbones.causal_lm import CausalLM, completion_logprobs, load_causal_lm
from lightning_modules.backbones.shared_prompts import length_buckets
from lightning_modules.options import BackboneOptions, LoraOptions


def make_batch(prompts: list[int], samples: int, longest: int) -> dict[str, Tensor]:
    """Random groups: ``samples`` completions of 1 to ``longest`` tokens for each prompt length."""
    groups = torch.arange(len(prompts)).repeat_interleave(samples)
    lengths = torch.randint(1, longest + 1, (len(groups),))
    lengths[0] = longest
    starts = torch.tensor(prompts)[groups]
    ids = torch.zeros(len(groups), int((starts + lengths).max()), dtype=torch.long)
    texts = [torch.randint(3, 80, (size,)) for size in prompts]
    for row, (group, start, length) in enumerate(zip(groups, starts, lengths, strict=True)):
        ids[row, :start] = texts[int(group)]
        ids[row, start : start + length] = torch.randint(3, 80, (int(length),))
    order = torch.randperm(len(groups))  # members of a group need not stand together
    mask = torch.arange(longest)[None] < lengths[:, None]
    values = {"input_ids": ids, "prompt_lengths": starts, "mask": mask, "groups": groups}
    return {name: value[order] for name, value in values.items()}


def results(
    policy: CausalLM, batch: dict[str, Tensor], share: bool
) -> tuple[Any, dict[str, Tensor]]:
    policy.zero_grad()
    values = batch if share else {**batch, "groups": None}
    found = completion_logprobs(policy, **values, entropy_grad=True, temperature=0.8)
    (found.logprob.sum() + 0.5 * found.entropy.sum()).backward()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return found, gradients


@pytest.mark.parametrize("prompts", [[5, 5, 5], [1, 1], [2, 9, 4, 7]])
@pytest.mark.parametrize("longest", [1, 2, 13])
@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)])
def test_shared_equals_whole(
    tiny_folder: Path, prompts: list[int], longest: int, lora: LoraOptions | None
) -> None:
    policy = load_causal_lm(BackboneOptions(str(tiny_folder)), lora)
    if lora is not None:  # B is zero at the start, which would hide a fault
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch(prompts, samples=10, longest=longest)
    whole, whole_gradients = results(policy, batch, share=False)
    shared, shared_gradients = results(policy, batch, share=True)
    torch.testing.assert_close(shared.logprob, whole.logprob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.entropy, whole.entropy, atol=1e-5, rtol=1e-5)
    assert whole_gradients.keys() == shared_gradients.keys()
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, atol=1e-4, rtol=1e-4)


def test_sharing_feeds_fewer_tokens(tiny_folder: Path) -> None:
    policy = load_causal_lm(BackboneOptions(str(tiny_folder)))
    fed: list[int] = []
    policy.base.base_model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: fed.append(inputs[0].numel())
    )
    batch = make_batch([20, 20], samples=8, longest=4)
    with torch.no_grad():
        completion_logprobs(policy, **{**batch, "groups": None})
        whole = sum(fed)
        fed.clear()
        completion_logprobs(policy, **batch)
    assert whole == batch["input_ids"].numel()
    assert sum(fed) <= 2 * 20 + 16 * 3  # each prompt once, no completion's last token


def test_activation_checkpointing_reads_sequences_whole(tiny_folder: Path) -> None:
    plain = load_causal_lm(BackboneOptions(str(tiny_folder)))
    saving = load_causal_lm(BackboneOptions(str(tiny_folder), gradient_checkpointing=True))
    assert plain.can_share_prompts
    assert not saving.can_share_prompts
    batch = make_batch([4, 6], samples=4, longest=5)
    expected, gradients = results(plain, batch, share=True)
    found, saved = results(saving, batch, share=True)
    torch.testing.assert_close(found.logprob, expected.logprob, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(saved[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 7, 8, 16, 63])
def test_buckets_hold_every_row_once(count: int) -> None:
    lengths = torch.randint(1, 50, (count,))
    buckets = length_buckets(lengths)
    assert sorted(torch.cat(buckets).tolist()) == list(range(count))
    assert all(len(rows) >= min(8, count) for rows in buckets)
    ends = [(int(lengths[rows].min()), int(lengths[rows].max())) for rows in buckets]
    assert all(left[1] <= right[0] for left, right in zip(ends, ends[1:], strict=False))


def test_equal_lengths_stay_together() -> None:
    assert len(length_buckets(torch.full((64,), 9))) == 1
