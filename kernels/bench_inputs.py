"""Inputs of ``bench.py`` and what their exact results are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import plain_head, plain_logits
from .regions import Region

KINDS = ("random", "trained")
#: Rows whose results are compared with float64.
NUM_SAMPLED = 256
#: Tokens that share most of the probability of a trained-like row, and its wanted entropy in nats.
NUM_PEAKS, PEAKED_ENTROPY = 8, 1.5
LORA_RANK = 16


class Size(NamedTuple):
    """Rows, width and vocabulary."""

    rows: int
    hidden: int
    vocabulary: int


@dataclass
class Inputs:
    """One head and its tokens.

    Args:
        hidden: ``(N, H)``.
        weight: ``(V, H)``.
        targets: ``(N,)``.
        upstream: Gradients ``(N,)`` of the log-prob, the entropy and the region's entropy.
        lora: ``A (r, H)`` and ``B (V, r)``.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: tuple[Tensor, Tensor, Tensor] | None = None
    lora: tuple[Tensor, Tensor] | None = None

    def side(self) -> tuple[Tensor, Tensor] | None:
        """The low-rank term ``(hidden @ A.T, B)``."""
        return None if self.lora is None else (self.hidden @ self.lora[0].T, self.lora[1])

    def leaves(self) -> list[Tensor]:
        """Tensors that can have a gradient."""
        return [self.hidden, self.weight, *(self.lora or ())]

    def rows(self, part: Tensor) -> Inputs:
        """Some of the rows, in float64, as new leaves."""
        wide = [value.detach().double() for value in self.leaves()]
        upstream = None
        if self.upstream is not None:
            first, second, third = (value[part].double() for value in self.upstream)
            upstream = (first, second, third)
        return replace(
            self,
            hidden=wide[0][part].requires_grad_(),
            weight=wide[1],
            targets=self.targets[part],
            upstream=upstream,
            lora=None if self.lora is None else (wide[2], wide[3]),
        )


@dataclass
class Exact:
    """Results in float64 for some rows, with the entropy of the inputs.

    Args:
        rows: Their numbers.
        logprob: ``(R,)``.
        entropy: ``(R,)``.
        hidden_grad: ``(R, H)``.
    """

    rows: Tensor
    logprob: Tensor
    entropy: Tensor
    hidden_grad: Tensor = field(repr=False)


def make_inputs(size: Size, kind: str, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """A head and tokens.

    Args:
        size: N, H and V.
        kind: ``random`` has nearly uniform rows. ``trained`` has rows with a few likely tokens,
            as a trained model has, and targets that are mostly among them.
        dtype: Of the floating-point inputs.
        device: Where they live.
        seed: Of everything.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    n, h, v = size
    weight = (normal(v, h) / math.sqrt(h)).to(dtype)
    hidden = normal(n, h)
    targets = torch.randint(v, (n,), generator=generator, device=device)
    if kind == "trained":
        count = min(NUM_PEAKS, v)
        peaks = torch.randint(v, (n, count), generator=generator, device=device)
        hidden = _peaked(hidden, weight, peaks)
        rank = torch.rand(n, generator=generator, device=device).log2().neg().int()
        is_peak = rank < count
        chosen = peaks.gather(1, rank.clamp(max=count - 1).long()[:, None])[:, 0]
        targets = torch.where(is_peak, chosen, targets)
    upstream = (normal(n), normal(n), normal(n))
    low = (normal(LORA_RANK, h) / math.sqrt(h), 0.1 * normal(v, LORA_RANK))
    return Inputs(
        *(hidden.to(dtype), weight, targets, upstream),
        lora=(low[0].to(dtype), low[1].to(dtype)),
    )


def _peaked(hidden: Tensor, weight: Tensor, peaks: Tensor) -> Tensor:
    """Add the weight rows of the peaks, so strongly that the entropy is as wanted."""
    shape = torch.linspace(1.0, 0.7, peaks.shape[1], device=hidden.device)
    toward = torch.zeros_like(hidden)
    for rank in range(peaks.shape[1]):
        toward += shape[rank] * weight[peaks[:, rank]].float()
    some, wide = slice(0, 64), weight.float()
    low, high = 0.0, 8.0 * math.log(weight.shape[0])
    for _ in range(30):
        strength = (low + high) / 2
        logprobs = ((hidden + strength * toward)[some] @ wide.T).log_softmax(1)
        if -(logprobs.exp() * logprobs).sum(1).mean() > PEAKED_ENTROPY:
            low = strength
        else:
            high = strength
    return hidden + strength * toward


def exact(
    inputs: Inputs,
    is_sum: bool = False,
    has_entropy_gradient: bool = False,
    region: Region | None = None,
    is_lora: bool = False,
) -> Exact:
    """Results in float64 of up to ``NUM_SAMPLED`` rows.

    Args:
        inputs: All rows.
        is_sum: Whether the loss is ``-sum(logprob)``.
        has_entropy_gradient: Whether the entropy is in the loss.
        region: Trust region whose entropy is in the loss.
        is_lora: Whether the low-rank term is in the logits.
    """
    count = inputs.hidden.shape[0]
    step = max(1, count // NUM_SAMPLED)
    rows = torch.arange(0, count, step, device=inputs.hidden.device)[:NUM_SAMPLED]
    own = inputs.rows(rows)
    side = own.side() if is_lora else None
    logits = plain_logits(own.hidden, own.weight, None, side, own.weight.shape[0])
    found = plain_head(logits, own.targets, region=region)
    assert own.upstream is not None
    if is_sum:
        loss = -found.logprob.sum()
    else:
        loss = (found.logprob * own.upstream[0]).sum()
        if has_entropy_gradient:
            loss = loss + (found.entropy * own.upstream[1]).sum()
        if found.region_entropy is not None:
            loss = loss + (found.region_entropy * own.upstream[2]).sum()
    (grad,) = torch.autograd.grad(loss, own.hidden)
    return Exact(rows, found.logprob.detach(), found.entropy.detach(), grad)
