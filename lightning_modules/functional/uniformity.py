"""Two measures of an embedding space: how near partners are, how evenly all vectors are spread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.functional.sums import masked_sum_count


def alignment(queries: Tensor, positives: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Distance of the partners on the unit sphere, ``||u - v||^alpha`` (arXiv 2005.10242).

    Args:
        queries: ``(B, d)``, any length.
        positives: ``(B, d)``.
        alpha: Exponent, above 0.

    Returns:
        ``(B,)``; the measure is their mean (``masked_sum_count`` gives sum and count).

    Raises:
        ValueError: Mismatched shapes or an exponent of 0 or below.

    Example:
        >>> alignment(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([2.0000])
    """
    if queries.dim() != 2 or queries.shape != positives.shape:
        shapes = f"{tuple(queries.shape)} and {tuple(positives.shape)}"
        raise ValueError(f"queries and positives must be of one shape (B, d), got {shapes}")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be above 0")
    gaps = F.normalize(queries, dim=-1) - F.normalize(positives, dim=-1)
    return gaps.norm(dim=-1).pow(alpha)


def uniformity_sums(vectors: Tensor, *, t: float = 2.0) -> tuple[Tensor, Tensor]:
    """Sum and count of ``exp(-t ||u_i - u_j||^2)`` over the pairs i < j, on the unit sphere.

    Uniformity (arXiv 2005.10242) is the logarithm of their mean: the lower, the more even; 0 for
    vectors that are all equal. Sums of several sets add up, without the pairs between the sets.

    Args:
        vectors: ``(N, d)``, any length.
        t: Above 0.

    Returns:
        ``(sum, count)``, detached, 0-d.

    Raises:
        ValueError: A wrong shape or ``t`` of 0 or below.

    Example:
        >>> total, count = uniformity_sums(torch.tensor([[1.0, 0.0]] * 3))
        >>> total.item(), count.item()
        (3.0, 3.0)
    """
    if vectors.dim() != 2 or not t > 0:
        raise ValueError(f"vectors must be (N, d) and t above 0, got {tuple(vectors.shape)}, {t}")
    unit = F.normalize(vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32)))
    total = masked_sum_count(unit.new_zeros(0))
    for start in range(0, len(unit), 1024):  # a few rows at a time: N x N would not fit
        rows = unit[start : start + 1024]
        kernel = (2 * t * (rows @ unit.T - 1)).clamp(max=0).exp()
        later = torch.ones_like(kernel, dtype=torch.bool).triu(start + 1)
        part = masked_sum_count(kernel, later)
        total = (total[0] + part[0], total[1] + part[1])
    return total
