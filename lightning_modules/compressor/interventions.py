"""Losses and penalties of the pair as pure functions: which tokens count, rank, entropy.

Memory vectors are stacked as ``(S, d)``, real ones only (``Memory.stacked``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(
    target_mask: Tensor,
    slot_mask: Tensor | None = None,
    *,
    slot_weight: float = 1.0,
    skip: int = 0,
) -> Tensor:
    """How much every label counts in the loss: 0, 1, or ``slot_weight`` where a fact is stated.

    Args:
        target_mask: ``(B, t)`` True on labels.
        slot_mask: ``(B, t)`` True on tokens of facts; None for none.
        slot_weight: Of these (card, section 6).
        skip: First labels of every row that do not count: a continuation cannot know them
            [code: ICAE, ``leave_tokens_for_lm``].

    Returns:
        ``(B, t)`` float32.

    Example:
        >>> token_weights(torch.tensor([[True, True, False]]), skip=1)
        tensor([[0., 1., 0.]])
    """
    live = target_mask.bool()
    weights = (live & (live.cumsum(1) > skip)).float()
    if slot_mask is None:
        return weights
    return torch.where(slot_mask.bool(), weights * slot_weight, weights)


def reconstruction_loss(
    losses: Tensor, weights: Tensor, normalizer: Tensor | float | None = None
) -> Tensor:
    """Weighted mean of the losses of labels (card, section 2, step 3).

    Args:
        losses: ``(B, t)`` cross-entropies.
        weights: ``(B, t)``; a label of weight 0 never enters, not even as ``0 * nan``.
        normalizer: Replaces the sum of the weights (a global one under accumulation).

    Returns:
        A scalar; 0 with zero gradient where nothing counts.
    """
    total = torch.where(weights != 0, losses, 0.0).mul(weights).sum()
    count = torch.as_tensor(weights.sum() if normalizer is None else normalizer).to(total)
    return total / torch.where(count == 0, 1.0, count)


def mean_entropy(entropy: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy of the predictions of labels, to be weighted into the loss (entropy control).

    Args:
        entropy: ``(B, t)`` with gradients.
        mask: ``(B, t)`` True on labels.
    """
    return reconstruction_loss(entropy, mask.to(entropy.dtype))


def nuclear_norm(vectors: Tensor) -> Tensor:
    """Sum of the singular values over ``sqrt(S)``: equal for a batch and the batch twice.

    Its gradient pulls all singular values alike, so that small ones vanish (lower rank).

    Args:
        vectors: ``(S, d)``.

    Example:
        >>> nuclear_norm(torch.eye(4)).item()
        2.0
    """
    return torch.linalg.svdvals(_wide(vectors)).sum() / max(1, len(vectors)) ** 0.5


def whitening(vectors: Tensor) -> Tensor:
    """How far the covariance is from a multiple of the identity; 0 for white vectors.

    ``||C / (tr C / d) - I||_F^2 / d``: scale, rotation and mean play no part. With fewer than d
    vectors it cannot reach 0.

    Args:
        vectors: ``(S, d)``, S at least 2.
    """
    covariance = _covariance(vectors)
    width = covariance.shape[0]
    mean = covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)
    eye = torch.eye(width, dtype=covariance.dtype, device=covariance.device)
    return (covariance / mean - eye).square().sum() / width


def effective_rank(vectors: Tensor) -> Tensor:
    """Roy-Vetterli effective rank of the centred vectors, with gradients (card, section 2.1).

    Args:
        vectors: ``(S, d)``, S at least 2.

    Returns:
        ``exp(-sum p log p)`` with ``p`` the singular values' shares; in [1, min(S, d)]. Vectors
        that are all equal have 1.
    """
    wide = _wide(vectors)
    values = torch.linalg.svdvals(wide - wide.mean(0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares.clamp_min(1e-12)).sum().exp()


def erank_shortfall(vectors: Tensor, floor: float) -> Tensor:
    """By which share the effective rank is below a floor; 0 above it.

    Args:
        vectors: ``(S, d)``.
        floor: At least 1; above ``min(S, d)`` it cannot be met.
    """
    return (1.0 - effective_rank(vectors) / floor).clamp_min(0.0)


def _covariance(vectors: Tensor) -> Tensor:
    wide = _wide(vectors)
    centred = wide - wide.mean(0)
    return centred.T @ centred / max(1, len(wide) - 1)


def _wide(vectors: Tensor) -> Tensor:
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
