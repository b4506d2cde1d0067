"""Averages of one tensor in each model: along a line, or of directions on a sphere.

All methods of model merging are called alike, ``method(tensors, weights, base, **options)``, and
are pure; those on task vectors are in ``task_vectors``. Here are

    linear                        W = sum_m alpha_m w_m
    slerp, multislerp, karcher    a mean direction times sum_m alpha_m ||w_m||

A mean direction of M tensors is a weighted sum of them, so these three work on the M x M Gram
matrix (dot products in float64, over pieces) and need no copy of a tensor [our choice]. With a
``base`` they average task vectors and add the base [mergekit for multislerp; our choice for slerp
and karcher]: on nearly orthogonal updates the restored norm makes the update up to sqrt(M) larger
than the linear one (card of BOOM, pitfall 6).

Everything is added up in float32 (float64 stays) and returned in the first tensor's dtype: sums in
half precision lose small differences. Shape legend: ``M`` models; a tensor may have any shape, the
same in all models and in the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Beyond this |cosine| slerp is a straight line [mergekit].
LERP_COSINE = 0.9995
#: A weighted mean of unit vectors shorter than this has no direction [our choice].
SPREAD_FLOOR = 1e-6
#: Entries of each tensor that are multiplied at once.
_PIECE = 2**15


def gram_matrix(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Dot products of tensors, or of their differences from ``base``, exact to float64.

    Args:
        tensors: ``M`` of one shape.
        base: Subtracted from each; None for zeros.

    Returns:
        ``(M, M)`` float64 on the CPU.

    Example:
        >>> gram_matrix([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])])
        tensor([[25.,  3.],
                [ 3.,  1.]], dtype=torch.float64)
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    origin = None if base is None else base.detach().reshape(-1)
    gram = flat[0].new_zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat[0].numel(), _PIECE):
        rows = torch.stack([one[start : start + _PIECE].to(torch.float64) for one in flat])
        if origin is not None:
            rows -= origin[start : start + _PIECE].to(torch.float64)
        gram += rows @ rows.T
    return gram.cpu()


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None
) -> Tensor:
    """Weighted sum; with weights that add up to 1, an average.

    Tensors of whole numbers or booleans (buffers such as positions) must be equal.

    Args:
        tensors: One a model, all of one shape.
        weights: One a model; those of ``normalized_weights`` make it an average.
        base: The sum is then that of the differences from it, plus it: the same for an average.

    Raises:
        ValueError: Tensors of whole numbers differ.

    Example:
        >>> linear([torch.zeros(2), torch.ones(2)], [0.75, 0.25])
        tensor([0.2500, 0.2500])
    """
    first = tensors[0]
    if first.is_floating_point():
        return combined(tensors, weights, base)
    if any(not torch.equal(first, other) for other in tensors[1:]):
        raise ValueError(f"tensors of {first.dtype} differ and cannot be averaged")
    return first.clone()


def slerp(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None
) -> Tensor:
    """Spherical interpolation of two models.

    The direction goes along the great circle from the first model to the second, ``weights[1]`` of
    the way; the norm is the weighted mean of the two norms [our choice: mergekit applies the sines
    to the tensors themselves, which is the same where their norms are equal]. Where the absolute
    cosine is above ``LERP_COSINE``, or a tensor is all zeros, it is ``linear`` [mergekit].

    Args:
        tensors: Two.
        weights: Two, not negative, adding up to 1.
        base: With one, task vectors are interpolated.

    Raises:
        ValueError: Not two tensors.

    Example:
        >>> slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [0.5, 0.5])
        tensor([0.7071, 0.7071])
    """
    if len(tensors) != 2:
        raise ValueError(f"slerp merges 2 models, not {len(tensors)}")
    gram = gram_matrix(tensors, base)
    norms = gram.diagonal().sqrt()
    if not bool(norms.all()):
        return combined(tensors, weights, base)
    cosine = float(gram[0, 1] / norms.prod())
    if abs(cosine) > LERP_COSINE:
        return combined(tensors, weights, base)
    angle, share = math.acos(cosine), torch.tensor(weights, dtype=torch.float64)
    units = (share * angle).sin() / math.sin(angle)
    return combined(tensors, (units / norms * (share @ norms)).tolist(), base)


def multislerp(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None
) -> Tensor:
    """Norm-restored average of directions.

        W = sum_m alpha_m ||w_m|| * normalise( sum_m alpha_m w_m / ||w_m|| )

    The public implementation takes the mean direction mu, averages the tangents at mu and goes
    along that average; the average is always 0, since mu is the direction of the weighted mean
    itself, so the closed form is all of it (card of BOOM, 2.3, proved). For two models of equal
    weights this is ``slerp``; for others it is not: weights .8 and .2 at 90 degrees end at 14.04
    degrees instead of 18. A tensor of zeros has no direction: the result is then ``linear``.

    Args:
        tensors: ``M``.
        weights: ``M``, not negative, adding up to 1.
        base: With one, task vectors are merged [mergekit].

    Raises:
        ValueError: Directions of more than two models cancel out (for two it is ``linear``)
            [mergekit].

    Example:
        >>> multislerp([torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])], [0.5, 0.5])
        tensor([2.1213, 2.1213])
    """
    gram = gram_matrix(tensors, base)
    norms = gram.diagonal().sqrt()
    if not bool(norms.all()):
        return combined(tensors, weights, base)
    share = torch.tensor(weights, dtype=torch.float64)
    units = share / norms
    spread = _length(units, gram)
    if spread < SPREAD_FLOOR:
        if len(tensors) == 2:
            return combined(tensors, weights, base)
        raise ValueError("the directions of the models cancel out: they have no mean direction")
    return combined(tensors, (units * (share @ norms) / spread).tolist(), base)


def karcher(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    *,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> Tensor:
    """Weighted mean on the sphere: the direction with the least squared angles to all models.

    From the direction of the weighted mean, ``u <- exp_u(sum_m alpha_m log_u u_m)`` until the step
    is below ``tolerance``; the norm is ``sum_m alpha_m ||w_m||``. For two models it is spherical
    interpolation at any weights. Tensors of zeros are left out of the direction [mergekit].

    Args:
        tensors: ``M``.
        weights: ``M``, not negative, adding up to 1.
        base: With one, task vectors are merged [our choice].
        iterations: At most.
        tolerance: In radians.

    Raises:
        ValueError: Directions of more than two models cancel out, or one is opposite to the mean
            (for two models it is ``linear``).

    Example:
        >>> karcher([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [0.8, 0.2])
        tensor([0.9511, 0.3090])
    """
    gram = gram_matrix(tensors, base)
    norms = gram.diagonal().sqrt()
    share = torch.tensor(weights, dtype=torch.float64)
    used = ((norms > 0) & (share > 0)).nonzero().flatten()
    if not len(used):
        return combined(tensors, weights, base)
    alpha = share[used] / share[used].sum()
    cosines = gram[used][:, used] / (norms[used, None] * norms[None, used])
    place = _karcher_direction(cosines, alpha, iterations, tolerance)
    if place is None:
        if len(used) == 2:
            return combined(tensors, weights, base)
        raise ValueError("the directions of the models are opposite: they have no mean on a sphere")
    factors = torch.zeros_like(share)
    factors[used] = place / norms[used] * (share @ norms)
    return combined(tensors, factors.tolist(), base)


def _karcher_direction(
    cosines: Tensor, alpha: Tensor, iterations: int, tolerance: float
) -> Tensor | None:
    """``(M,)`` coefficients of the mean direction over the unit vectors; None if there is none."""
    start = _length(alpha, cosines)
    if start < SPREAD_FLOOR:
        return None
    place = alpha / start
    for _ in range(iterations):
        cosine = (cosines @ place).clamp(-1.0, 1.0)
        if cosine.min() < -1.0 + 1e-12:
            return None
        sine = (1 - cosine.square()).sqrt()
        stretch = torch.where(sine > 1e-6, cosine.acos() / sine, 1.0)
        tangent = alpha * stretch
        tangent = tangent - (tangent @ cosine) * place
        step = _length(tangent, cosines)
        stride = math.sin(step) / step if step > 0 else 1.0
        place = math.cos(step) * place + stride * tangent
        place = place / _length(place, cosines)
        if step < tolerance:
            break
    return place


def _length(coefficients: Tensor, gram: Tensor) -> float:
    """Norm of a weighted sum of vectors with this Gram matrix."""
    return math.sqrt(max(0.0, float(coefficients @ gram @ coefficients)))


def combined(tensors: Sequence[Tensor], factors: Sequence[float], base: Tensor | None) -> Tensor:
    """``sum_m factor_m w_m``, or ``base + sum_m factor_m (w_m - base)``.

    Args:
        tensors: ``M`` of one shape.
        factors: ``M``.
        base: Of that shape, or None.

    Returns:
        Their shape, in the first tensor's dtype.
    """
    first = tensors[0]
    wide = wide_dtype(first)
    origin = None if base is None else base.to(wide)
    total = torch.zeros_like(first, dtype=wide) if origin is None else origin.clone()
    for tensor, factor in zip(tensors, factors, strict=True):
        part = tensor.to(wide)
        total += factor * (part if origin is None else part - origin)
    return total.to(first.dtype)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """In which sums are made: float32, or float64 for tensors of that."""
    return torch.promote_types(tensor.dtype, torch.float32)
