"""Methods of model merging that work on task vectors ``w_m - W_0``: one tensor in each model.

    task_arithmetic   W_0 + lambda sum_m alpha_m (w_m - W_0)
    ties              of each entry only the models that agree with its elected sign
    dare              entries dropped at random, the rest scaled up

Called, added up and returned as in ``merge_methods``; the base tensor ``W_0`` is needed. ``lambda``
is the option ``scale``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.functional.merge_methods import combined, wide_dtype


def task_arithmetic(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """``W_0 + scale * sum_m alpha_m (w_m - W_0)`` (arXiv 2212.04089).

    Args:
        tensors: ``M``.
        weights: ``M``; negative ones take a task away.
        base: ``W_0``.
        scale: Of the merged update.
        normalize: Divide the weights by their sum, which with a scale of 1 is ``linear``
            [our choice: mergekit does so only if asked].

    Raises:
        ValueError: There is no base.

    Example:
        >>> task_arithmetic([torch.tensor([3.0])], [1.0], torch.tensor([1.0]), scale=0.5)
        tensor([2.])
    """
    origin = _needed(base)
    factors = [scale * weight for weight in _shares(weights, normalize)]
    return combined(tensors, factors, origin)


def ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    *,
    density: float = 0.2,
    scale: float = 1.0,
) -> Tensor:
    """Trim, elect sign, merge (TIES, arXiv 2306.01708).

    Each task vector keeps its largest entries; each entry takes the sign of the weighted sum; the
    update is the weighted mean of the kept entries of that sign, times ``scale``. Exactly
    ``round(density * numel)`` entries are kept, one at least, the earlier of equal ones; an entry
    whose sum is exactly 0 is not changed [our choice: mergekit elects plus there].

    Args:
        tensors: ``M``.
        weights: ``M``, not negative.
        base: ``W_0``.
        density: Share of entries kept, in (0, 1].
        scale: Of the merged update.

    Raises:
        ValueError: There is no base.

    Example:
        >>> ties(
        ...     [torch.tensor([4.0, 1.0]), torch.tensor([2.0, -3.0])],
        ...     [0.5, 0.5],
        ...     torch.zeros(2),
        ...     density=1.0,
        ... )
        tensor([ 3., -3.])
    """
    wide = wide_dtype(tensors[0])
    origin = _needed(base).to(wide)
    kept = []  # one byte an entry; task vectors are made twice and not held
    elected = torch.zeros_like(origin)
    for tensor, weight in zip(tensors, weights, strict=True):
        delta = tensor.to(wide) - origin
        kept.append(_largest(delta.abs(), density))
        elected += weight * delta * kept[-1]
    elected.sign_()
    total, mass = torch.zeros_like(origin), torch.zeros_like(origin)
    for tensor, weight, keep in zip(tensors, weights, kept, strict=True):
        delta = tensor.to(wide) - origin
        agrees = keep & (delta.sign() == elected)
        total += weight * delta * agrees
        mass += weight * agrees
    mass[mass == 0] = 1
    return (origin + scale * total / mass).to(tensors[0].dtype)


def dare(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    *,
    density: float = 0.5,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    seed: int = 0,
    name: str = "",
) -> Tensor:
    """Task arithmetic on task vectors with entries dropped at random (DARE, arXiv 2311.03099).

    Args:
        tensors: ``M``.
        weights: ``M``.
        base: ``W_0``.
        density: Probability of an entry to be kept, in (0, 1]; each model draws for itself.
        scale: Of the merged update.
        normalize: Divide the weights by their sum.
        rescale: Divide what is kept by ``density``, which keeps the mean.
        seed: Of the draws, together with ``name`` and the model's place.
        name: Of the tensor: so the draws do not depend on which other tensors were merged before.

    Raises:
        ValueError: There is no base.

    Example:
        >>> dare([torch.tensor([3.0, 3.0])], [1.0], torch.ones(2), density=1.0)
        tensor([3., 3.])
    """
    wide = wide_dtype(tensors[0])
    origin = _needed(base).to(wide)
    total = torch.zeros_like(origin)
    factor = scale / density if rescale else scale
    for place, (tensor, weight) in enumerate(
        zip(tensors, _shares(weights, normalize), strict=True)
    ):
        text = f"{seed}/{place}/{name}".encode()
        own = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        draws = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(own))
        keep = (draws < density).to(tensor.device)
        total += factor * weight * (tensor.to(wide) - origin) * keep
    return (origin + total).to(tensors[0].dtype)


def _largest(sizes: Tensor, density: float) -> Tensor:
    """Mask of the ``round(density * numel)`` largest entries, one at least."""
    count = max(1, round(density * sizes.numel()))
    if count >= sizes.numel():
        return torch.ones_like(sizes, dtype=torch.bool)
    flat = sizes.reshape(-1)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    keep = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    keep[equal[: count - int(keep.sum())]] = True
    return keep.reshape(sizes.shape)


def _shares(weights: Sequence[float], normalize: bool) -> list[float]:
    total = sum(weights) if normalize else 1.0
    return [weight / total for weight in weights]


def _needed(base: Tensor | None) -> Tensor:
    if base is None:
        raise ValueError("this method needs the base tensor: it works on differences from it")
    return base
