"""Which tokens explore: the baselines that treat a share of tokens apart.

Shape legend: ``N`` sequences, ``T`` padded completion length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forking_weights(entropy: Tensor, mask: Tensor, *, share: float = 0.2) -> Tensor:
    """Weights that train the most uncertain tokens only ("forking tokens", arXiv 2506.01939).

    Of the L live tokens the ``ceil(share L)`` of highest entropy (at least one) have weight
    ``L / kept``, the others 0: a token mean over all is then the mean over those that are kept
    [code: WhyChaos/TRE, per micro-batch]. Among equal entropies the first wins.

    Args:
        entropy: ``[N, T]`` full-vocabulary entropy (nats); used for ranking only.
        mask: ``[N, T]``, nonzero at completion tokens.
        share: Share of tokens to keep, in (0, 1].

    Returns:
        ``[N, T]`` float32, without gradient.

    Example:
        >>> forking_weights(torch.tensor([[0.1, 0.9]]), torch.ones(1, 2), share=0.5)
        tensor([[0., 2.]])
    """
    live = mask.to(torch.bool)
    total = int(live.sum())
    kept = max(1, math.ceil(round(share * total, 9))) if total else 0
    return _largest(entropy, live, kept) * (total / max(kept, 1))


def kl_cov_tokens(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, *, share: float = 0.002
) -> Tensor:
    """The tokens whose advantage and log-prob covary most (KL-Cov, arXiv 2505.22617).

    ``c_t = (A_t - mean A)(logp_t - mean logp)`` over the L live tokens; the ``floor(share L)``
    largest (at least one) are chosen [code: WhyChaos/TRE, per micro-batch].

    Args:
        logprobs: ``[N, T]`` nats; used for ranking only.
        advantages: ``[N, T]``.
        mask: ``[N, T]``, nonzero at completion tokens.
        share: Share of tokens, in (0, 1].

    Returns:
        ``[N, T]`` float32 of 0 and 1, without gradient.

    Example:
        >>> logprobs, gain = torch.tensor([[-1.0, -3.0]]), torch.tensor([[2.0, 1.0]])
        >>> kl_cov_tokens(logprobs, gain, torch.ones(1, 2))
        tensor([[1., 0.]])
    """
    live = mask.to(torch.bool)
    total = int(live.sum())
    if not total:
        return torch.zeros_like(logprobs, dtype=torch.float32)
    mine = logprobs.detach()
    centred = [
        torch.where(live, values - values[live].mean(), 0.0) for values in (mine, advantages)
    ]
    return _largest(centred[0] * centred[1], live, max(1, math.floor(round(share * total, 9))))


def _largest(values: Tensor, live: Tensor, count: int) -> Tensor:
    """1.0 at the ``count`` largest live values, the first of equals, else 0.0."""
    chosen = torch.zeros(values.numel(), device=values.device)
    ranked = torch.where(live, values.detach(), -torch.inf).flatten()
    order = ranked.argsort(descending=True, stable=True)
    chosen[order[:count]] = 1.0
    return chosen.view(values.shape)
