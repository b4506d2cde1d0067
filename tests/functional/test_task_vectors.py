"""Merge methods on task vectors: task arithmetic, TIES and DARE, against loops over entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.merge_methods import linear
from lightning_modules.functional.task_vectors import dare, task_arithmetic, ties


def models(count: int, *shape: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).double()
    return [base + torch.randn(shape, generator=generator) for _ in range(count)], base


def ties_by_loops(
    tensors: list[Tensor], weights: list[float], base: Tensor, density: float, scale: float
) -> Tensor:
    rows = [(tensor - base).flatten().tolist() for tensor in tensors]
    count = max(1, round(density * base.numel()))
    for row in rows:
        largest = sorted(range(len(row)), key=lambda i: -abs(row[i]))[:count]
        row[:] = [value if i in largest else 0.0 for i, value in enumerate(row)]
    update = []
    for entries in zip(*rows, strict=True):
        total = sum(w * e for w, e in zip(weights, entries, strict=True))
        agreeing = [(w, e) for w, e in zip(weights, entries, strict=True) if e * total > 0]
        mass = sum(w for w, _ in agreeing)
        update.append(sum(w * e for w, e in agreeing) / mass if agreeing else 0.0)
    return base + scale * torch.tensor(update, dtype=base.dtype).reshape(base.shape)


def test_task_arithmetic() -> None:
    tensors, base = models(3, 4, 5)
    weights = [0.5, 0.2, 0.3]
    assert torch.allclose(task_arithmetic(tensors, [5, 2, 3], base), linear(tensors, weights))
    expected = base + 0.4 * sum(
        w * (tensor - base) for w, tensor in zip([1.0, -1.0, 2.0], tensors, strict=True)
    )
    got = task_arithmetic(tensors, [1.0, -1.0, 2.0], base, scale=0.4, normalize=False)
    assert torch.allclose(got, expected, rtol=1e-13)
    away = task_arithmetic(tensors[:1], [-1.0], base, normalize=False)  # a task taken away
    assert torch.allclose(away, 2 * base - tensors[0], rtol=1e-13)


def test_ties_by_hand() -> None:
    """Three models of 3 x 4; half the entries are kept, so six in each."""
    updates = torch.tensor(
        [
            [[9.0, -1, 2, 8], [7, 0, -6, 1], [5, 1, -4, 0]],
            [[3.0, 4, 1, -2], [9, -5, 0, 1], [-8, 0, 6, 0]],
            [[-6.0, 2, 0, 1], [5, 7, -3, 0], [0, 0, -4, 1]],
        ]
    )
    # kept:   1: 9 8 7 -6 5 -4    2: 3 4 9 -5 -8 6    3: -6 2 5 7 -3 -4
    expected = torch.tensor([[6.0, 3, 0, 8], [7, 7, -4.5, 0], [-8, 0, -4, 0]])
    base = torch.full((3, 4), 10.0)
    got = ties(list(base + updates), [1 / 3] * 3, base, density=0.5)
    assert torch.allclose(got, base + expected)
    doubled = ties(list(base + updates), [1 / 3] * 3, base, density=0.5, scale=2.0)
    assert torch.allclose(doubled, base + 2 * expected)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.77, 1.0])
def test_ties_is_the_loop_over_entries(density: float) -> None:
    tensors, base = models(4, 6, 7, seed=2)
    weights = [0.4, 0.1, 0.2, 0.3]
    got = ties(tensors, weights, base, density=density, scale=0.7)
    expected = ties_by_loops(tensors, weights, base, density, 0.7)
    assert torch.allclose(got, expected, atol=1e-12)
    changed = int((got != base).sum())
    assert round(density * 42) <= changed or density == 0.01 and changed


def test_ties_keeps_exactly_its_share_of_equal_entries() -> None:
    base = torch.zeros(10)
    got = ties([torch.ones(10)], [1.0], base, density=0.3)
    assert got.tolist() == [1.0] * 3 + [0.0] * 7
    steps = torch.tensor([1.0, 2, 1, 1, -2, 1, 1, 1, 1, 1])
    assert ties([steps], [1.0], base, density=0.4).tolist() == [1, 2, 1, 0, -2, 0, 0, 0, 0, 0]
    tie = ties([torch.ones(2), -torch.ones(2)], [0.5, 0.5], torch.zeros(2), density=1.0)
    assert tie.tolist() == [0.0, 0.0]
    assert torch.equal(ties([base] * 2, [0.5, 0.5], base), base)


def test_dare_keeps_the_mean_over_draws() -> None:
    tensors, base = models(2, 8, seed=3)
    exact = linear(tensors, [0.5, 0.5]) - base
    draws = torch.stack([dare(tensors, [1, 1], base, density=0.4, seed=s) for s in range(2000)])
    spread = draws.std(0)
    assert bool(((draws.mean(0) - base - exact).abs() < 5 * spread / 2000**0.5).all())
    # variance of a kept-and-rescaled entry: update^2 (1 - p) / p, for each model by itself
    variance = sum((0.5 * (t - base)).square() * 0.6 / 0.4 for t in tensors)
    assert torch.allclose(spread.square(), variance, rtol=0.15)
    plain = dare(tensors, [1, 1], base, density=0.4, seed=7, rescale=False)
    scaled = dare(tensors, [1, 1], base, density=0.4, seed=7)
    assert torch.allclose(scaled - base, (plain - base) / 0.4)


def test_dare_drops_entries_of_each_model_for_itself() -> None:
    base = torch.zeros(20_000)
    one, two = torch.ones(20_000), torch.full((20_000,), 10.0)
    got = dare([one, two], [1, 1], base, density=0.25, rescale=False, normalize=False)
    shares = {value: float((got == value).float().mean()) for value in (0.0, 1.0, 10.0, 11.0)}
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
    expected = {0.0: 0.5625, 1.0: 0.1875, 10.0: 0.1875, 11.0: 0.0625}
    assert shares == pytest.approx(expected, abs=0.012)  # 3.5 standard errors


def test_dare_draws_by_seed_and_name() -> None:
    tensors, base = models(2, 30, seed=4)
    first = dare(tensors, [1, 1], base, name="a")
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(dare(tensors, [1, 1], base, name="a"), first)
    assert not torch.equal(dare(tensors, [1, 1], base, name="b"), first)
    assert not torch.equal(dare(tensors, [1, 1], base, name="a", seed=1), first)
    everything = dare(tensors, [3, 1], base, density=1.0, scale=0.5)
    expected = task_arithmetic(tensors, [3, 1], base, scale=0.5)
    assert torch.allclose(everything, expected, rtol=1e-13)


@pytest.mark.parametrize("method", [task_arithmetic, ties, dare])
def test_base_is_needed_dtype_is_kept_and_inputs_too(method) -> None:
    tensors, base = models(2, 6, 6)
    with pytest.raises(ValueError, match="needs the base"):
        method(tensors, [0.5, 0.5], None)
    tensors, base = [tensor.bfloat16() for tensor in tensors], base.bfloat16()
    before = [tensor.clone() for tensor in (*tensors, base)]
    merged = method(tensors, [0.5, 0.5], base)
    assert merged.dtype == torch.bfloat16
    exact = method([tensor.double() for tensor in tensors], [0.5, 0.5], base.double())
    assert torch.allclose(merged.double(), exact, rtol=2**-8, atol=1e-6)
    merged.zero_()
    assert all(torch.equal(a, b) for a, b in zip((*tensors, base), before, strict=True))
