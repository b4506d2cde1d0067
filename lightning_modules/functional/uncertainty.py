"""How sure a decoder is of the tokens of a text, on its facts and on the rest (card, 2.1).

Entropies of whole distributions come from the fused head, one a position, and are only sorted into
slots and rest here. What the head does not give (margin, alternatives, entropy of some tokens) is
taken from logits of positions that were picked before, a few hundred at a time, so that no
``(N, T, V)`` need exist.

Shape legend: ``N`` texts, ``T`` padded length, ``P`` picked positions, ``V`` vocabulary. All at
temperature 1, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.functional.sums import Metrics, masked_sum_count


def by_slot(name: str, values: Tensor, mask: Tensor, slots: Tensor) -> Metrics:
    """Mean of a quantity over all tokens, over those of facts, and over the others.

    Args:
        name: Of the quantity, such as ``entropy``.
        values: ``(N, T)`` (or ``(P,)``), one a token; entropies of the fused head [nats].
        mask: Same shape, nonzero at tokens of the text.
        slots: Same shape, nonzero at tokens of a fact; counts only under the mask.

    Returns:
        ``name``, ``name_slot`` and ``name_rest``, each ``(sum, count)``.

    Raises:
        ValueError: Shapes differ, or a value under the mask is not finite (names its place).

    Example:
        >>> found = by_slot("entropy", torch.tensor([1.0, 3.0]), torch.ones(2), torch.eye(2)[1])
        >>> [float(found[name][0]) for name in ("entropy", "entropy_slot", "entropy_rest")]
        [4.0, 3.0, 1.0]
    """
    if not values.shape == mask.shape == slots.shape:
        shapes = f"{tuple(values.shape)}, {tuple(mask.shape)} and {tuple(slots.shape)}"
        raise ValueError(f"values, mask and slots must be of one shape, got {shapes}")
    live, fact = mask.to(torch.bool), slots.to(torch.bool)
    odd = live & ~values.detach().isfinite()
    if odd.any():
        raise ValueError(f"{name} at {odd.nonzero()[0].tolist()} is not finite")
    return {
        name: masked_sum_count(values, live),
        f"{name}_slot": masked_sum_count(values, live & fact),
        f"{name}_rest": masked_sum_count(values, live & ~fact),
    }


def top_margin(logits: Tensor) -> Tensor:
    """Probability of the best token less that of the second best.

    Args:
        logits: ``(..., V)``, V from 2; -inf is a token that cannot be.

    Returns:
        ``(...)`` float32 (float64 for float64) from 0 (a tie) to 1, without gradient.

    Raises:
        ValueError: Fewer than two tokens, or a position without a finite logit or with NaN or inf.

    Example:
        >>> top_margin(torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log())
        tensor([0.5000, 0.0000])
    """
    best = _top_probabilities(logits, 2)
    return best[..., 0] - best[..., 1]


def near_greedy_alternatives(logits: Tensor, *, threshold: float = 0.1) -> Tensor:
    """How many tokens besides the best one have a probability above the threshold.

    Args:
        logits: ``(..., V)``, V from 2; -inf is a token that cannot be.
        threshold: In (0, 1) [card: 0.1].

    Returns:
        ``(...)`` whole numbers as int64, less than ``1 / threshold``. Of equally good tokens one is
        the best and the others are alternatives.

    Raises:
        ValueError: A threshold out of range, or as for ``top_margin``.

    Example:
        >>> near_greedy_alternatives(torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05]]).log())
        tensor([1, 0])
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must be in (0, 1)")
    best = _top_probabilities(logits, max(2, math.ceil(1 / threshold)))
    return (best[..., 1:] > threshold).sum(dim=-1)


def restricted_entropy(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Entropy among some tokens alone, their probabilities made to sum to 1.

    Args:
        logits: ``(..., V)``; -inf is a token that cannot be.
        ids: The tokens, such as those of all colours; different ones.

    Returns:
        ``(...)`` float32 (float64 for float64) from 0 to ``log(len(ids))`` nats, no gradient.

    Raises:
        ValueError: No ids, ids that repeat or lie outside the vocabulary, or a position where none
            of them can be, or with NaN or inf.

    Example:
        >>> restricted_entropy(torch.tensor([[9.0, 1.0, 1.0]]), [1, 2]).exp().tolist()
        [2.0]
    """
    if not ids or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < logits.shape[-1]:
        size = logits.shape[-1]
        raise ValueError(f"ids={list(ids)} must be different tokens from 0 to {size - 1}")
    picked = _wide(logits[..., torch.tensor(list(ids), device=logits.device)])
    return torch.special.entr(picked.softmax(dim=-1)).sum(dim=-1)


def certainty_metrics(
    logits: Tensor, slots: Tensor, *, ids: Sequence[int] = (), threshold: float = 0.1
) -> Metrics:
    """What the logits of picked positions tell, over all of them, over facts, and over the rest.

    Args:
        logits: ``(P, V)`` at positions that all count.
        slots: ``(P,)``, nonzero at tokens of a fact.
        ids: Tokens whose own entropy is wanted; none leaves it out.
        threshold: As for ``near_greedy_alternatives``.

    Returns:
        ``margin``, ``alternatives`` and, with ids, ``entropy_restricted``, each as ``by_slot``
        gives them.

    Raises:
        ValueError: As for the functions above.

    Example:
        >>> found = certainty_metrics(torch.tensor([[0.0, 0.0]]), torch.ones(1))
        >>> found["margin_slot"][0].item(), found["alternatives"][0].item()
        (0.0, 1.0)
    """
    rows = {
        "margin": top_margin(logits),
        "alternatives": near_greedy_alternatives(logits, threshold=threshold),
    }
    if ids:
        rows["entropy_restricted"] = restricted_entropy(logits, ids)
    every = torch.ones_like(slots, dtype=torch.bool)
    metrics: Metrics = {}
    for name, values in rows.items():
        metrics.update(by_slot(name, values, every, slots))
    return metrics


def _top_probabilities(logits: Tensor, count: int) -> Tensor:
    """The highest probabilities of every position, descending: ``(..., min(count, V))``."""
    if logits.shape[-1] < 2:
        raise ValueError(f"logits must be (..., V) with V from 2, got {tuple(logits.shape)}")
    wide = _wide(logits)
    best = wide.topk(min(count, wide.shape[-1]), dim=-1).values
    return (best - wide.logsumexp(dim=-1, keepdim=True)).exp()


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32 or wider, each position with a best token."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    odd = ~wide.amax(dim=-1).isfinite()  # NaN and inf rise to the top
    if odd.any():
        place = odd.nonzero()[0].tolist()
        raise ValueError(f"logits at {place} are NaN, infinite, or all -inf")
    return wide
