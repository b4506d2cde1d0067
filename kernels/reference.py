"""The plain path: full logits and autograd, for comparison and as the oracle of tests.

Every quantity is written as its definition says and differentiated by autograd, so nothing here is
shared with the fused back ends. ``kernel=reference`` runs a method on it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .regions import Region, TopK


class Plain(NamedTuple):
    """Rows ``(N,)`` in float32 (float64 for float64 logits); None where not asked for."""

    lse: Tensor
    logprob: Tensor
    entropy: Tensor
    mean_logprob: Tensor
    argmax: Tensor
    region_entropy: Tensor | None
    region_size: Tensor | None
    region_mass: Tensor | None


def plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    side: tuple[Tensor, Tensor] | None,
    vocab_limit: int,
) -> Tensor:
    """Logits ``(N, V')`` in the inputs' dtype, as an ordinary head gives them."""
    weight = weight[:vocab_limit]
    own = None if bias is None else bias[:vocab_limit].to(weight.dtype)
    logits = torch.nn.functional.linear(hidden, weight, own)
    if side is not None:
        logits = logits + side[0] @ side[1][:vocab_limit].T
    return logits


def plain_head(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, region: Region | None = None
) -> Plain:
    """All quantities of rows that are not ignored.

    Args:
        logits: ``(N, V)``.
        targets: ``(N,)`` ids below V.
        temperature: Divides the logits.
        region: Trust region or None.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        z = z / temperature
    logprobs = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    size = mass = own = None
    if region is not None:
        inside = select(z.detach(), region)
        size = inside.sum(-1).int()
        mass = (logprobs.exp() * inside).sum(-1)
        own = _region_entropy(z, lse, inside, region)
    return Plain(
        lse=lse,
        logprob=logprobs.gather(-1, targets[:, None])[:, 0],
        entropy=_entropy(logprobs),
        mean_logprob=logprobs.mean(-1),
        argmax=z.argmax(-1),
        region_entropy=own,
        region_size=size,
        region_mass=mass,
    )


def _entropy(logprobs: Tensor) -> Tensor:
    # an excluded token (-inf) adds nothing, to the value and to the gradient
    p = logprobs.exp()
    return -(p * torch.where(p > 0, logprobs, 0.0)).sum(-1)


def select(z: Tensor, region: Region) -> Tensor:
    """Mask ``(N, V)`` of the region, by a full sort."""
    order = z.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(z.shape[-1], device=z.device).expand_as(order)
    )
    if isinstance(region, TopK):
        return rank < region.k
    p = z.double().softmax(-1).gather(-1, order)
    kept = p.cumsum(-1) - p < region.p
    if region.max_size is not None:
        kept[:, region.max_size :] = False
    inside = torch.zeros_like(kept).scatter_(-1, order, kept)
    if region.ties == "include":
        least = torch.where(inside, z, torch.inf).amin(-1, keepdim=True)
        inside = z >= least
    return inside


def _region_entropy(z: Tensor, lse: Tensor, inside: Tensor, region: Region) -> Tensor:
    size = inside.sum(-1)
    if isinstance(region, TopK) and region.k == 1:
        return lse - z.gather(-1, z.argmax(-1, keepdim=True))[:, 0]  # one token, also among equals
    if region.preserve_mass:
        z = _Projected.apply(z, torch.where(inside, z, -torch.inf).softmax(-1))
    log_q = torch.where(inside, z, -torch.inf).log_softmax(-1)
    own = _entropy(log_q)
    if region.scale == "none":
        return own
    scale = math.log(z.shape[-1]) / size.double().log()
    return own * torch.where(size > 1, scale, 0.0).to(own.dtype)


class _Projected(torch.autograd.Function):
    """Identity on the logits; its backward takes away what would move the region's mass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor) -> Tensor:
        """Hand ``z`` through."""
        ctx.save_for_backward(q)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Remove the component of the gradient along ``q``."""
        (q,) = ctx.saved_tensors
        along = (q * grad).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True)
        return grad - along * q, None
