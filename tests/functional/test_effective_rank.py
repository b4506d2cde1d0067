"""Spectra and ranks: matrices whose rank is known, invariances, and sums against all at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.effective_rank import (
    Scatter,
    effective_rank,
    energy_rank,
    participation_ratio,
    rank_scalars,
    sample_spectra,
    scatter,
    spectrum,
    stable_rank,
)

RANKS = [effective_rank, participation_ratio, stable_rank, energy_rank]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(rows: int, width: int, seed: int = 0) -> Tensor:
    """Vectors whose directions weigh less and less, away from the origin."""
    return randn(rows, width, seed=seed) * 0.8 ** torch.arange(width) + 3


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_identity_has_full_rank(rank: Callable[[Tensor], Tensor], width):
    assert rank(torch.ones(width)).item() == pytest.approx(width)
    both = torch.cat([torch.eye(width), -torch.eye(width)])  # its mean is 0
    assert rank(spectrum(both)).item() == pytest.approx(width)


def test_all_the_energy_needs_all_directions_whatever_the_rounding():
    for width in range(1, 200):
        assert energy_rank(torch.ones(width), share=1.0).item() == width


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rows", [2, 5, 300])
def test_one_direction_has_rank_one(rank, rows):
    line = torch.outer(randn(rows), randn(20, seed=1)) + randn(20, seed=2)
    assert rank(spectrum(line)).item() == pytest.approx(1, abs=1e-9)
    assert rank(scatter(line).spectrum()).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("rank", RANKS)
def test_equal_vectors_have_rank_zero(rank):
    same = (randn(20) * 100).expand(50, 20)
    assert rank(spectrum(same)).item() == rank(scatter(same).spectrum()).item() == 0
    assert rank(spectrum(same, centre=False)).item() == pytest.approx(1)


def test_by_hand():
    sigma = torch.tensor([3.0, 1.0, 0.0])
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(sigma).item() == pytest.approx(expected, abs=1e-12)
    assert participation_ratio(sigma).item() == pytest.approx(100 / 82)
    assert stable_rank(sigma).item() == pytest.approx(10 / 9)
    assert [energy_rank(sigma, share=s).item() for s in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    for rank in RANKS:
        assert rank(sigma[[2, 0, 1]]).item() == pytest.approx(rank(sigma).item())


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("rows", "width"), [(40, 12), (6, 30)])
def test_invariances(rank, rows, width):
    vectors = decaying(rows, width)
    found = rank(spectrum(vectors)).item()
    turn = torch.linalg.qr(randn(width, width, seed=3)).Q
    changed = [
        vectors * 1e-6,
        vectors @ turn,
        vectors + randn(width, seed=4),
        torch.cat([vectors, vectors]),
        vectors.flip(0),
        torch.cat([vectors, 5 + torch.zeros(rows, 9)], dim=1),
    ]
    for other in changed:
        assert rank(spectrum(other)).item() == pytest.approx(found, abs=1e-9)


def test_spectrum_equals_numpy():
    np = pytest.importorskip("numpy")
    memory = randn(10, 4, 6)
    rows = memory.numpy().reshape(40, 6)
    expected = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    assert spectrum(memory).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    plain = np.linalg.svd(rows, compute_uv=False)
    assert spectrum(memory, centre=False).tolist() == pytest.approx(plain.tolist(), rel=1e-12)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(60, 8), (500, 33), (5, 20), (1, 4), (20, 20)])
def test_sums_give_the_spectrum_of_all_at_once(rows, width, centre):
    vectors = decaying(rows, width)
    parts = [scatter(part) for part in vectors.split([1, rows // 3, rows - 1 - rows // 3])]
    merged = parts[2].merge(parts[0]).merge(parts[1])
    direct, summed = spectrum(vectors, centre=centre), merged.spectrum(centre=centre)
    assert direct.shape == summed.shape == (min(rows, width),)
    torch.testing.assert_close(summed, direct, rtol=0, atol=1e-8 * float(vectors.norm()))
    wanted, found = rank_scalars(direct), rank_scalars(summed)
    assert found == pytest.approx(wanted, abs=1e-8)


def test_fields_of_sums_add_up_as_ranks_would_reduce_them():
    one, two = decaying(9, 5), decaying(30, 5, seed=1)
    a, b = scatter(one), scatter(two)
    reduced = Scatter(a.outer + b.outer, a.total + b.total, a.count + b.count)
    torch.testing.assert_close(reduced.spectrum(), spectrum(torch.cat([one, two])))
    with pytest.raises(ValueError, match="widths 5 and 4"):
        a.merge(scatter(randn(3, 4)))


def test_far_from_the_origin_rounding_makes_no_directions():
    line = torch.outer(randn(400), randn(16, seed=1)) + 1e3
    assert rank_scalars(scatter(line).spectrum())["erank"] == pytest.approx(1, abs=1e-9)


def test_half_precision_is_widened_first():
    vectors = decaying(64, 8).to(torch.bfloat16).requires_grad_()
    sigma = spectrum(vectors)
    assert sigma.dtype == torch.float64 and not sigma.requires_grad
    torch.testing.assert_close(sigma, spectrum(vectors.detach().double()))
    torch.testing.assert_close(scatter(vectors).spectrum(), sigma)


def test_each_memory_by_itself():
    same = torch.ones(1, 3, 8, dtype=torch.float64)
    memories = torch.cat([randn(4, 3, 8), same, torch.zeros(1, 3, 8)])
    sigma = sample_spectra(memories)
    assert sigma.shape == (6, 3)
    for memory, row in zip(memories, sigma, strict=True):
        torch.testing.assert_close(row, spectrum(memory, centre=False))
    found = effective_rank(sigma)
    assert found.shape == (6,) and found[4].item() == pytest.approx(1) and found[5].item() == 0
    for memory, row in zip(memories, sample_spectra(memories, centre=True), strict=True):
        torch.testing.assert_close(row, spectrum(memory))


def test_normalised_by_what_is_possible():
    few = rank_scalars(spectrum(randn(4, 50)))
    assert few["erank_normalised"] == few["erank"] / 4 and few["r_99"] == 3  # one is the mean's
    assert set(few) == {"erank", "erank_normalised", "participation_ratio", "stable_rank", "r_99"}


def test_refused():
    with pytest.raises(ValueError, match=r"must be \(\.\.\., d\)"):
        spectrum(randn(4))
    for vectors in (torch.zeros(0, 3),):
        with pytest.raises(ValueError, match="at least one vector"):
            spectrum(vectors)
        with pytest.raises(ValueError, match="at least one vector"):
            scatter(vectors).spectrum()
    broken = torch.tensor([[1.0, math.nan]])
    with pytest.raises(ValueError, match="not finite"):
        spectrum(broken)
    with pytest.raises(ValueError, match="not finite"):
        scatter(broken).spectrum()
    with pytest.raises(ValueError, match="not finite"):
        sample_spectra(broken[None])
    with pytest.raises(ValueError, match=r"must be \(N, m, d\)"):
        sample_spectra(randn(3, 4))
    with pytest.raises(ValueError, match="share=0 must be"):
        energy_rank(torch.ones(2), share=0)
    with pytest.raises(ValueError, match="one spectrum"):
        rank_scalars(torch.ones(2, 2))
    with pytest.raises(ValueError, match="at least one singular value"):
        effective_rank(torch.ones(0))
