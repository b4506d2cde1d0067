"""What critiques of one answer are compared by: states of the policy, or its confidence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.experience import Experience, Rollouts
from lightning_modules.functional.judging import tail_confidence
from lightning_modules.policy_rl.annotating import pieces_without_grad

CONFIDENCES = ("confidence_tail", "confidence_lowest")
TAIL_TOKENS = 64  # of ``confidence_tail`` [code: of the text before the verdict; here the last]


def mean_states(module: Any, rollouts: Rollouts) -> Tensor:
    """Mean last hidden state of the policy over each completion's tokens, ``(N, H)``.

    The tokens of the verdict are among them; they are equal where critiques are compared. Every
    rank reads all of its rows, so that sharded policies are gathered equally often.

    Args:
        module: A ``PolicyModule``.
        rollouts: Whose completions.
    """

    def compute(piece: Experience) -> Tensor:
        hidden = module.completion_states(piece).float()
        row = piece.mask.nonzero()[:, 0]
        total = hidden.new_zeros(len(piece), hidden.shape[1]).index_add(0, row, hidden)
        return total / piece.mask.sum(1, keepdim=True).clamp(min=1)

    return torch.cat(pieces_without_grad(module, rollouts, module.policy, compute))


def confidence_scores(rollouts: Rollouts, signal: str) -> Tensor:
    """Mean log-prob (nats) of the last 64 tokens, or of the lowest tenth, ``(N,)`` [code].

    Args:
        rollouts: Whose completions.
        signal: ``confidence_tail`` or ``confidence_lowest``.
    """
    values = []
    for completion in rollouts.completions:
        logprobs = torch.tensor(completion.logprobs)
        if signal == "confidence_tail":
            values.append(logprobs[-TAIL_TOKENS:].mean())
        else:
            live = torch.ones_like(logprobs, dtype=torch.bool)
            values.append(tail_confidence(logprobs, live, 0.1))
    return torch.stack(values)


def alike(scores: Tensor, rollouts: Rollouts, subgroups: Tensor) -> Tensor:
    """Equal completions of a subgroup get one score, whatever batch they were embedded in.

    Args:
        scores: ``(N,)``.
        rollouts: Whose completions.
        subgroups: ``(N,)`` integers.
    """
    same: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for row, (group, one) in enumerate(zip(subgroups.tolist(), rollouts.completions, strict=True)):
        same.setdefault((group, one.token_ids), []).append(row)
    scores = scores.clone()
    for rows in same.values():
        scores[rows] = scores[rows].mean()
    return scores
