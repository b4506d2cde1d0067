"""Gradient surgery on Gram matrices: what weight each domain's gradient gets in each unit.

Modular Gradient Surgery (MGS, arXiv 2602.02301) runs PCGrad (arXiv 2001.06782) inside each unit of
the parameters instead of once on the whole gradient. Projecting a gradient leaves it a sum of the
domains' gradients, so everything happens in the K x K matrix of their dot products,

    A[a, b] = <g_a, g_b>   for each unit,

which is a few numbers a unit, adds up over shards and needs no second copy of a gradient
[our choice: the same algebra as the release, which works on whole vectors].

Shape legend: ``U`` units, ``K`` domains. Weights are computed in float64 on the CPU, so every rank
that has the same Gram and generator gets the same weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Method = Literal["pcgrad", "gradvac", "cagrad", "nash_mtl", "aligned_mtl", "upgrad", "none"]
#: Of a cosine that is logged [code].
COSINE_FLOOR = 1e-8
_INSTALL = "pip install -e '.[surgery]'"


def gram_of(gradients: Sequence[Tensor | None]) -> Tensor:
    """Dot products of one parameter's gradients, in float32 at least.

    Args:
        gradients: ``K`` tensors of one shape, or None for a gradient of zeros.

    Returns:
        ``(K, K)`` on the gradients' device (the CPU if all are None).

    Example:
        >>> gram_of([torch.tensor([1.0, 2.0]), None])
        tensor([[5., 0.],
                [0., 0.]])
    """
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return torch.zeros(len(gradients), len(gradients))
    wide = torch.promote_types(given[0].dtype, torch.float32)
    gram = given[0].new_zeros(len(gradients), len(gradients), dtype=wide)
    flat = [None if g is None else g.detach().reshape(-1).to(wide) for g in gradients]
    for a, one in enumerate(flat):
        for b, other in enumerate(flat[: a + 1]):
            if one is not None and other is not None:
                gram[a, b] = gram[b, a] = torch.dot(one, other)
    return gram


def pcgrad_weights(
    gram: Tensor,
    *,
    generator: torch.Generator,
    threshold: float = 0.0,
    norm_floor: float = 1e-12,
) -> Tensor:
    """PCGrad in Gram form, each unit for itself.

    A gradient visits the others in random order; where its present form conflicts with another
    one's original, the component along that is taken away [code: production, not the toy]. The
    order in which gradients are treated does not matter, since all are tested against originals.
    For two domains in conflict with norms a, b and cosine -c the weights are ``1 + c b / a`` and
    ``1 + c a / b``; without conflict all are 1.

    Args:
        gram: ``(U, K, K)``, finite.
        generator: Of the orders, on the CPU.
        threshold: Project only where the cosine is below ``-threshold``.
        norm_floor: Squared norms up to this are never projected on [code].

    Returns:
        ``(U, K)`` float64 weights: the unit's gradient is ``sum_k w[k] g_k``.

    Example:
        >>> gram = torch.tensor([[[1.0, -0.5], [-0.5, 1.0]]])
        >>> pcgrad_weights(gram, generator=torch.Generator())
        tensor([[1.5000, 1.5000]], dtype=torch.float64)
    """
    gram = gram.detach().to("cpu", torch.float64)
    units, count, _ = gram.shape
    rows = torch.eye(count, dtype=torch.float64).repeat(units, 1, 1)  # row i: g_i's coefficients
    order = torch.rand(units, count, count, generator=generator).argsort(-1)
    squares = gram.diagonal(dim1=1, dim2=2)
    own = torch.arange(count)[None, :].expand(units, count)
    for position in range(count):
        other = order[:, :, position]
        dots = (rows @ gram).gather(2, other[..., None])[..., 0]
        square = squares.gather(1, other)
        bound = torch.zeros_like(dots)
        if threshold:
            lengths = ((rows @ gram) * rows).sum(-1).clamp(min=0).sqrt()
            bound = -threshold * lengths * square.sqrt()
        is_hit = (dots < bound) & (square > norm_floor) & (other != own)
        step = torch.where(is_hit, -dots / square.clamp(min=norm_floor), 0.0)
        rows.scatter_add_(2, other[..., None], step[..., None])
    return rows.sum(1)


class GradVac(NamedTuple):
    """Result of ``gradvac_weights``.

    Args:
        weights: ``(U, K)`` float64.
        targets: ``(U, K, K)`` float64, the running cosines after this step.
    """

    weights: Tensor
    targets: Tensor


def gradvac_weights(
    gram: Tensor,
    targets: Tensor,
    *,
    generator: torch.Generator,
    decay: float = 0.5,
    eps: float = 1e-8,
) -> GradVac:
    """Gradient Vaccine (arXiv 2010.05874) in Gram form: raise cosines to their running mean.

    Where the cosine c of ``g_i`` (as it stands) and ``g_j`` is below its target t,
    ``g_i += |g_i| (t sqrt(1 - c^2) - c sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j``. Own code
    [our choice: the targets belong into checkpoints and know absent domains]; with all targets 0 it
    is PCGrad.

    Args:
        gram: ``(U, K, K)``, finite.
        targets: ``(U, K, K)`` running cosines, zeros at the start.
        generator: Of the orders, on the CPU.
        decay: Weight of the new cosine in the running mean.
        eps: Added to denominators.

    Returns:
        Weights and new targets.

    Example:
        >>> gram = torch.tensor([[[1.0, -0.5], [-0.5, 1.0]]])
        >>> gradvac_weights(gram, torch.zeros(1, 2, 2), generator=torch.Generator()).targets[0, 0]
        tensor([ 0.0000, -0.2500], dtype=torch.float64)
    """
    gram = gram.detach().to("cpu", torch.float64)
    targets = targets.detach().to("cpu", torch.float64).clone()
    units, count, _ = gram.shape
    rows = torch.eye(count, dtype=torch.float64).repeat(units, 1, 1)
    order = torch.rand(units, count, count, generator=generator).argsort(-1)
    norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    own = torch.arange(count)[None, :].expand(units, count)
    for position in range(count):
        other = order[:, :, position]
        dots = (rows @ gram).gather(2, other[..., None])[..., 0]
        length = ((rows @ gram) * rows).sum(-1).clamp(min=0).sqrt()
        norm = norms.gather(1, other)
        cosine = dots / (length * norm + eps)
        target = targets.gather(2, other[..., None])[..., 0]
        rest = (1 - target.square()).clamp(min=0).sqrt()
        lack = target * (1 - cosine.square()).clamp(min=0).sqrt() - cosine * rest
        is_hit = (cosine < target) & (other != own)
        step = torch.where(is_hit, length * lack / (norm * rest + eps), 0.0)
        rows.scatter_add_(2, other[..., None], step[..., None])
        moved = torch.where(other == own, target, (1 - decay) * target + decay * cosine)
        targets.scatter_(2, other[..., None], moved[..., None])
    return GradVac(rows.sum(1), targets)


def torchjd_weights(gram: Tensor, method: Method) -> Tensor:
    """Weights of an aggregator of torchjd, unit by unit, on the scale of a sum.

    ``upgrad`` (arXiv 2406.16232), ``cagrad`` (2110.14048, c = 0.5), ``aligned_mtl`` (2305.19000)
    and ``nash_mtl`` (2202.01017; scale-invariant, so its scale is its own). torchjd's own weights
    are those of a mean, ours K times as large [our choice: without conflict UPGrad is the sum]. A
    unit without any gradient gets weights of 1.

    Args:
        gram: ``(U, K, K)``, finite.
        method: One of the four.

    Returns:
        ``(U, K)`` float64.

    Raises:
        ImportError: A package is missing (``check_torchjd`` says so before training).
    """
    gram = gram.detach().to("cpu", torch.float64)
    weights = torch.ones(gram.shape[:2], dtype=torch.float64)
    weigh = _torchjd(method, gram.shape[1])
    for unit, matrix in enumerate(gram):
        scale = matrix.diagonal().max()
        if scale > 0:  # of no influence on these methods but through their thresholds
            weights[unit] = weigh(matrix / scale)
    return weights


def check_torchjd(method: Method) -> None:
    """Refuse a method whose packages are missing, before anything is trained.

    Args:
        method: Any method.

    Raises:
        ValueError: Names what is missing and the command that installs it.
    """
    if method not in ("cagrad", "nash_mtl", "aligned_mtl", "upgrad"):
        return
    try:
        _torchjd(method, 2)(torch.eye(2, dtype=torch.float64))
    except (ImportError, NameError) as error:  # torchjd hides failed imports of its solvers
        first = str(error).split(". ")[0]
        raise ValueError(
            f"callbacks.gradient_surgery.method={method} needs packages that are not installed "
            f"({first}): {_INSTALL}"
        ) from error


def _torchjd(method: Method, count: int) -> Callable[[Tensor], Tensor]:
    """A function from one unit's Gram, its largest entry 1, to weights ``(K,)``."""
    from torchjd import aggregation

    if method == "nash_mtl":
        # torchjd offers it on Jacobians only, and it remembers its last answer: a square root of
        # the Gram is a Jacobian with these dot products, and a reset keeps resuming exact
        nash = aggregation.NashMTL(n_tasks=count, max_norm=0.0, optim_niter=20)

        def weigh(gram: Tensor) -> Tensor:
            nash.reset()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the solver is slower than it could be
                return nash.weighting(_root(gram))

        return weigh
    made: dict[str, Callable[[], Any]] = {
        "cagrad": lambda: aggregation.CAGradWeighting(c=0.5),
        "aligned_mtl": aggregation.AlignedMTLWeighting,
        "upgrad": aggregation.UPGradWeighting,
    }
    weighting = made[method]()
    return lambda gram: count * weighting(gram)


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """Cosines of all pairs.

    Args:
        gram: ``(..., K, K)``.

    Returns:
        The same shape; nan where a gradient is (nearly) zero and so has no direction.

    Example:
        >>> cosines(torch.tensor([[4.0, -2.0], [-2.0, 4.0]]))[0, 1]
        tensor(-0.5000)
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = norms[..., :, None] * norms[..., None, :]
    return torch.where(scale > COSINE_FLOOR**2, gram / scale.clamp(min=COSINE_FLOOR**2), torch.nan)


def conflict_fraction(gram: Tensor) -> float:
    """Share of the pairs of domains over all units whose gradients point against each other.

    Args:
        gram: ``(U, K, K)``.

    Returns:
        The share among pairs that have a cosine; nan if none has.

    Example:
        >>> conflict_fraction(torch.tensor([[[1.0, -0.5], [-0.5, 1.0]]]))
        1.0
    """
    count = gram.shape[-1]
    a, b = torch.triu_indices(count, count, 1)
    pairs = cosines(gram)[..., a, b]
    return float((pairs[~pairs.isnan()] < 0).double().mean())


def cosine_to_sum(gram: Tensor, weights: Tensor) -> float:
    """Cosine of the whole weighted gradient and the plain sum of the domains.

    Args:
        gram: ``(U, K, K)``.
        weights: ``(U, K)``.

    Returns:
        The cosine; nan if either is zero.

    Example:
        >>> cosine_to_sum(torch.eye(2)[None], torch.tensor([[1.0, 1.0]]))
        1.0
    """
    gram, weights = gram.double(), weights.double()
    both = torch.stack([weights, torch.ones_like(weights)])  # (2, U, K)
    products = torch.einsum("xuk,ukl,yul->xy", both, gram, both)
    return min(1.0, float(cosines(products)[0, 1]))
