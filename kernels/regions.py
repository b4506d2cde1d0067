"""Trust regions of the vocabulary (TRE-K, TRE-P) and the types that the public functions return.

A region S is a set of tokens of each row, a function of the logits ``z`` that is held constant when
gradients are taken. With ``q`` the softmax over S alone its entropy is ``H_S = -sum_S q log q`` and
what is returned is ``s * H_S``, ``s = log V / log |S|`` [code: WhyChaos/TRE].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Scale = Literal["log_vocab", "none"]


class LogprobEntropy(NamedTuple):
    """Per-token results, shaped like the targets; float32 (float64 for float64 input), in nats.

    Ignored rows are zero in every field.

    Args:
        logprob: Log-probability of the target.
        entropy: Shannon entropy of the distribution, or None where it was not asked for.
        region_entropy: Scaled entropy of the region, or None without one.
        lse: Log-sum-exp of the scaled logits; carries no gradient.
        region_size: int32 number of tokens in the region, or None.
        region_mass: Probability of the region under the full softmax, or None; no gradient.
    """

    logprob: Tensor
    entropy: Tensor | None
    region_entropy: Tensor | None = None
    lse: Tensor | None = None
    region_size: Tensor | None = None
    region_mass: Tensor | None = None


class CEStats(NamedTuple):
    """What a cross-entropy saw, per token and without gradient; zero on ignored rows.

    Args:
        nll: Negative log-probability of the target, without smoothing or z-loss.
        lse: Log-sum-exp of the scaled logits.
        entropy: Shannon entropy.
        accuracy: 1.0 where the target is the most probable token (lowest id among equals).
    """

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class TopK:
    """The K most probable tokens (TRE-K); among equal logits the lowest id wins.

    ``k=1`` is special, as in the reference: the result is ``lse - max z`` (min-entropy over the
    full softmax), unscaled.

    Args:
        k: Number of tokens.
        scale: ``log_vocab`` multiplies by ``log V / log k``.
        preserve_mass: Project the gradient so that the region keeps its mass (to first order).

    Raises:
        ValueError: ``k`` is below 1 or the scale is unknown.
    """

    k: int
    scale: Scale = "log_vocab"
    preserve_mass: bool = False

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if self.k < 1:
            raise ValueError(f"TopK(k={self.k}): k must be at least 1")


@dataclass(frozen=True)
class TopP:
    """The nucleus (TRE-P): the fewest most probable tokens whose mass reaches ``p``.

    A token is kept while the mass strictly before it is below ``p``, so the first always is.

    Args:
        p: Mass, in (0, 1).
        scale: ``log_vocab`` multiplies by ``log V / log |S|``; a region of one token gives 0.
        max_size: Cut the nucleus at so many tokens; None is exact. The reference has 256.
        ties: Of tokens equal to the last one kept: ``index`` keeps the lowest ids that are
            needed, ``include`` keeps all.
        preserve_mass: As in ``TopK``.

    Raises:
        ValueError: A value is out of range.
    """

    p: float
    scale: Scale = "log_vocab"
    max_size: int | None = None
    ties: Literal["index", "include"] = "index"
    preserve_mass: bool = False

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not 0.0 < self.p < 1.0:
            raise ValueError(f"TopP(p={self.p}): p must be inside (0, 1)")
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"TopP(max_size={self.max_size}): give 1 or more, or None for exact")
        if self.ties not in ("index", "include"):
            raise ValueError(f"TopP(ties={self.ties!r}): give 'index' or 'include'")


Region = TopK | TopP


def _check_scale(scale: str) -> None:
    if scale not in ("log_vocab", "none"):
        raise ValueError(f"a region's scale is {scale!r}: give 'log_vocab' or 'none'")


def pack_region(region: Region | None) -> str:
    """The region as a text, which the schema of a custom op can carry."""
    if region is None:
        return ""
    if isinstance(region, TopK):
        return f"k {region.k} {region.scale} {int(region.preserve_mass)}"
    size = region.max_size or 0
    return f"p {float(region.p)!r} {region.scale} {size} {region.ties} {int(region.preserve_mass)}"


def unpack_region(text: str) -> Region | None:
    """The inverse of ``pack_region``.

    Example:
        >>> unpack_region(pack_region(TopK(2)))
        TopK(k=2, scale='log_vocab', preserve_mass=False)
    """
    if not text:
        return None
    kind, *values = text.split()
    if kind == "k":
        return TopK(int(values[0]), values[1], bool(int(values[2])))  # type: ignore[arg-type]
    return TopP(
        float(values[0]),
        values[1],  # type: ignore[arg-type]
        int(values[2]) or None,
        values[3],  # type: ignore[arg-type]
        bool(int(values[4])),
    )
