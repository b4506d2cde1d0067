"""What the fused head must return, from its definitions, on full float64 logits.

Nothing of ``kernels/`` is used. Regions are found by Python loops over sorted rows; gradients are
autograd's, of the definitions as they are written, with the region held constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def members(row: list[float], region: Any) -> list[int]:
    """Ids of the region of one row of scaled logits, by its definition.

    Args:
        row: Scaled logits.
        region: ``TopK`` or ``TopP``.
    """
    order = sorted(range(len(row)), key=lambda j: (-row[j], j))
    if hasattr(region, "k"):
        return sorted(order[: region.k])
    top = row[order[0]]
    total = math.fsum(math.exp(z - top) for z in row)
    kept: list[int] = []
    before = 0.0  # mass of the tokens before this one
    for j in order:
        if before >= region.p or len(kept) == region.max_size:
            break
        kept.append(j)
        before += math.exp(row[j] - top) / total
    if region.ties == "include":
        least = row[kept[-1]]
        kept = [j for j in range(len(row)) if row[j] >= least]
    return sorted(kept)


def mask(z: Tensor, region: Any) -> Tensor:
    """Boolean ``(N, V)`` mask of the region of every row."""
    inside = torch.zeros(z.shape, dtype=torch.bool)
    for i, row in enumerate(z.detach().double().tolist()):
        inside[i, members(row, region)] = True
    return inside


def shannon(p: Tensor) -> Tensor:
    """``-sum p log p``, where a term with ``p = 0`` is 0."""
    safe = torch.where(p > 0, p, 1.0)
    return -(p * safe.log()).sum(-1)


def softmax(z: Tensor) -> Tensor:
    """``exp(z) / sum exp(z)``, from exponentials."""
    e = (z - z.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def log_sum_exp(z: Tensor) -> Tensor:
    """``log sum exp(z)``."""
    top = z.detach().amax(-1)
    return (z - top[:, None]).exp().sum(-1).log() + top


def region_entropy(z: Tensor, inside: Tensor, region: Any) -> Tensor:
    """The scaled entropy of the region, its members given."""
    if getattr(region, "k", None) == 1:
        top = torch.tensor([row.index(max(row)) for row in z.tolist()], dtype=torch.int64)
        return log_sum_exp(z) - z.gather(1, top[:, None])[:, 0]
    q = softmax(z.masked_fill(~inside, -math.inf))
    if region.preserve_mass:
        q = softmax(_keep_mass(z, q.detach()).masked_fill(~inside, -math.inf))
    size = inside.sum(-1)
    factor = torch.ones_like(z[:, 0])
    if region.scale == "log_vocab":
        sizes = size.clamp(min=2).to(z.dtype)
        factor = torch.where(size > 1, math.log(z.shape[1]) / sizes.log(), 0.0)
    return factor.detach() * shannon(q)


def _keep_mass(z: Tensor, q: Tensor) -> Tensor:
    """``z``, the gradient of which loses its component along ``q``."""
    result = z.clone()
    if result.requires_grad:
        result.register_hook(
            lambda grad: grad - (grad * q).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True) * q
        )
    return result


def quantities(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    region: Any = None,
    ignore_index: int = -100,
    vocab_limit: int | None = None,
    inside: Tensor | None = None,
) -> dict[str, Tensor]:
    """Values by the names of the public functions' fields, shaped like ``targets``.

    Args:
        logits: ``(..., V)``, unscaled; their dtype is computed in.
        targets: ``(...)``.
        temperature: Divides the logits.
        region: ``TopK``, ``TopP`` or None.
        ignore_index: Target of rows that are zero.
        vocab_limit: Columns at and beyond it do not exist.
        inside: Mask of the region of the rows that are kept; None finds it.
    """
    shape, flat = targets.shape, targets.reshape(-1)
    kept = (flat != ignore_index).nonzero()[:, 0]
    z = logits.reshape(len(flat), logits.shape[-1])[kept, :vocab_limit] / temperature
    p, lse = softmax(z), log_sum_exp(z)
    own = flat[kept]
    found = {
        "logprob": z.gather(1, own[:, None])[:, 0] - lse,
        "entropy": shannon(p),
        "lse": lse,
        "mean_logprob": z.mean(-1) - lse,
        "argmax": torch.tensor([row.index(max(row)) for row in z.tolist()], dtype=torch.int64),
    }
    if region is not None:
        inside = mask(z, region) if inside is None else inside
        found["region_entropy"] = region_entropy(z, inside, region)
        found["region_size"] = inside.sum(-1)
        found["region_mass"] = (p * inside).sum(-1)
    return {
        name: torch.zeros(len(flat), dtype=value.dtype).index_copy(0, kept, value).view(shape)
        for name, value in found.items()
    }


def token_losses(
    found: dict[str, Tensor], label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Cross-entropy of every token, from ``quantities``."""
    return (
        -(1 - label_smoothing) * found["logprob"]
        - label_smoothing * found["mean_logprob"]
        + z_loss * found["lse"] ** 2
    )
