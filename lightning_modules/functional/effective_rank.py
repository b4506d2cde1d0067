"""How many directions a set of vectors uses: singular spectra and numbers made of them.

Of a compressor's memory (card, section 2.1) or of any vectors. All in float64 on the CPU (card,
section 8). Two ways to the same spectrum: ``spectrum`` takes all vectors at once, ``scatter`` adds
up outer products batch by batch and rank by rank, in d x d numbers. The first is exact also for
tiny singular values, and dear for wide vectors; the second squares them and so takes those for 0
that are below about 1e-6 of the norm of all vectors, their mean included.

A rank is at most min(S, d): compare widths through ``erank_normalised``, or in the decoder's space
where d is the same, with S of 5 d or more [card, section 8].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Scatter:
    """Sums over S vectors of width d, float64 on the CPU; fields of parts and ranks add up.

    Args:
        outer: ``(d, d)`` sum of the outer products.
        total: ``(d,)`` sum of the vectors.
        count: 0-d, S.
    """

    outer: Tensor
    total: Tensor
    count: Tensor

    def merge(self, other: Scatter) -> Scatter:
        """Sums over both sets of vectors.

        Args:
            other: Of vectors of the same width.

        Raises:
            ValueError: Widths differ.
        """
        if self.total.shape != other.total.shape:
            widths = f"{len(self.total)} and {len(other.total)}"
            raise ValueError(f"vectors of widths {widths} cannot be added up")
        return Scatter(self.outer + other.outer, self.total + other.total, self.count + other.count)

    def spectrum(self, *, centre: bool = True) -> Tensor:
        """Singular values of the vectors that were added up, the same as ``spectrum`` gives.

        Args:
            centre: Whether to take off the mean of all vectors.

        Returns:
            ``(min(S, d),)`` descending, float64.

        Raises:
            ValueError: No vector was added, or sums are not finite.

        Example:
            >>> scatter(torch.tensor([[3.0, 1.0], [-1.0, 1.0]])).spectrum().square().round(
            ...     decimals=6
            ... ).tolist()
            [8.0, 0.0]
        """
        if not self.count:
            raise ValueError("a spectrum needs at least one vector")
        if not self.outer.isfinite().all():
            raise ValueError("the sums of the vectors are not finite")
        mean = self.total / self.count
        square = self.outer - self.count * torch.outer(mean, mean) if centre else self.outer
        energies = torch.linalg.eigvalsh(square).flip(0)
        # Rounding of squares, and of their difference where vectors lie far from the origin.
        noise = 8 * _EPS * max(int(self.count), len(self.total)) ** 0.5 * self.outer.trace()
        kept = torch.where(energies > noise, energies, 0.0)
        return kept[: min(int(self.count), len(kept))].sqrt()


def scatter(vectors: Tensor) -> Scatter:
    """Sums over a batch of vectors.

    Args:
        vectors: ``(..., d)``: all dimensions but the last count vectors.

    Returns:
        Their sums, without gradient.

    Raises:
        ValueError: Fewer than two dimensions.

    Example:
        >>> scatter(torch.ones(2, 3, 4)).count.item()
        6.0
    """
    rows = _rows(vectors)
    return Scatter(rows.T @ rows, rows.sum(dim=0), torch.tensor(len(rows), dtype=torch.float64))


def spectrum(vectors: Tensor, *, centre: bool = True) -> Tensor:
    """Singular values of stacked vectors ``(S, d)``, less their mean.

    Args:
        vectors: ``(..., d)``, S vectors in all; N memories of m vectors have S = N m.
        centre: Whether to take off the mean of all vectors.

    Returns:
        ``(min(S, d),)`` descending, float64; 0 where only rounding is left.

    Raises:
        ValueError: Fewer than two dimensions, no vector, or values that are not finite.

    Example:
        >>> spectrum(torch.tensor([[5.0, 1.0], [-5.0, 1.0]])).square().round(decimals=6).tolist()
        [50.0, 0.0]
    """
    rows = _rows(vectors)
    if not len(rows):
        raise ValueError("a spectrum needs at least one vector")
    if not rows.isfinite().all():
        raise ValueError("vectors holds values that are not finite")
    return _cut(_singular(rows - rows.mean(dim=0) if centre else rows), rows)


def sample_spectra(memories: Tensor, *, centre: bool = False) -> Tensor:
    """Singular values of each memory by itself.

    Args:
        memories: ``(N, m, d)``.
        centre: Whether to take off each memory's own mean; of m = 2 vectors one direction is left
            then, so not by default [our choice].

    Returns:
        ``(N, min(m, d))`` descending, float64.

    Raises:
        ValueError: A wrong shape, or values that are not finite.

    Example:
        >>> sample_spectra(torch.eye(2)[None]).tolist()
        [[1.0, 1.0]]
    """
    if memories.dim() != 3 or not memories.shape[1]:
        raise ValueError(f"memories must be (N, m, d) with m from 1, got {tuple(memories.shape)}")
    wide = memories.detach().to("cpu", torch.float64)
    if not wide.isfinite().all():
        raise ValueError("memories holds values that are not finite")
    return _cut(_singular(wide - wide.mean(dim=1, keepdim=True) if centre else wide), wide)


def effective_rank(sigma: Tensor) -> Tensor:
    """``exp(-sum p log p)`` with ``p = sigma / sum sigma`` (Roy and Vetterli 2007).

    Args:
        sigma: ``(..., k)`` singular values, from 0.

    Returns:
        ``(...)`` from 1 to k; 0 where all are 0 [our choice].

    Example:
        >>> effective_rank(torch.ones(4)).item(), effective_rank(torch.tensor([2.0, 0.0])).item()
        (4.0, 1.0)
    """
    shares, alive = _shares(sigma)
    return torch.where(alive, torch.special.entr(shares).sum(dim=-1).exp(), 0.0)


def participation_ratio(sigma: Tensor) -> Tensor:
    """``(sum sigma^2)^2 / sum sigma^4``: how many directions share the energy.

    Args:
        sigma: ``(..., k)`` singular values, from 0.

    Returns:
        ``(...)`` from 1 to k; 0 where all are 0.

    Example:
        >>> participation_ratio(torch.tensor([1.0, 1.0, 0.0])).item()
        2.0
    """
    shares, alive = _shares(sigma.double().square())
    return torch.where(alive, 1 / shares.square().sum(dim=-1).clamp(min=_EPS), 0.0)


def stable_rank(sigma: Tensor) -> Tensor:
    """``sum sigma^2 / max sigma^2``: the energy in units of the strongest direction.

    Args:
        sigma: ``(..., k)`` singular values, from 0.

    Returns:
        ``(...)`` from 1 to k; 0 where all are 0.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0])).item()
        1.5
    """
    shares, alive = _shares(sigma.double().square())
    return torch.where(alive, 1 / shares.amax(dim=-1).clamp(min=_EPS), 0.0)


def energy_rank(sigma: Tensor, *, share: float = 0.99) -> Tensor:
    """How many of the strongest directions hold a share of the energy (r_99).

    Args:
        sigma: ``(..., k)`` singular values, from 0, in any order.
        share: In (0, 1].

    Returns:
        ``(...)`` whole numbers as float64; 0 where all are 0.

    Raises:
        ValueError: A share out of range.

    Example:
        >>> energy_rank(torch.tensor([3.0, 1.0, 0.0]), share=0.9).item()
        1.0
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be in (0, 1]")
    shares, alive = _shares(sigma.double().square())
    reached = shares.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    # The sum of all shares may stop a little short of 1.
    short = (reached < share * (1 - 4 * _EPS * shares.shape[-1])).sum(dim=-1)
    return torch.where(alive, short + 1.0, 0.0).double()


def rank_scalars(sigma: Tensor) -> dict[str, float]:
    """All numbers of one spectrum.

    Args:
        sigma: ``(k,)`` of ``spectrum`` or ``Scatter.spectrum``, so that k = min(S, d).

    Returns:
        ``erank``, ``erank_normalised`` (over k), ``participation_ratio``, ``stable_rank`` and
        ``r_99``.

    Raises:
        ValueError: Not one spectrum.

    Example:
        >>> rank_scalars(torch.ones(4))["erank_normalised"]
        1.0
    """
    if sigma.dim() != 1 or not len(sigma):
        raise ValueError(f"sigma must be one spectrum (k,), got {tuple(sigma.shape)}")
    erank = float(effective_rank(sigma))
    return {
        "erank": erank,
        "erank_normalised": erank / len(sigma),
        "participation_ratio": float(participation_ratio(sigma)),
        "stable_rank": float(stable_rank(sigma)),
        "r_99": float(energy_rank(sigma)),
    }


def _rows(vectors: Tensor) -> Tensor:
    if vectors.dim() < 2:
        raise ValueError(f"vectors must be (..., d), got {tuple(vectors.shape)}")
    return vectors.detach().to("cpu", torch.float64).reshape(-1, vectors.shape[-1])


def _singular(matrices: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrices)


def _cut(sigma: Tensor, matrices: Tensor) -> Tensor:
    """The singular values without those that rounding made, by the size before centring."""
    size = torch.linalg.matrix_norm(matrices)[..., None]
    return torch.where(sigma > size * _EPS * max(matrices.shape[-2:]), sigma, 0.0)


def _shares(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values over their sum, and whether there is anything to share."""
    wide = values.detach().to("cpu", torch.float64)
    if not wide.shape[-1:] or not wide.shape[-1]:
        raise ValueError("there must be at least one singular value")
    whole = wide.sum(dim=-1, keepdim=True)
    return wide / torch.where(whole > 0, whole, 1.0), whole[..., 0] > 0
