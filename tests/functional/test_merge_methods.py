"""Merge methods of one tensor: averages of directions, against formulas and brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.merge_methods import (
    gram_matrix,
    karcher,
    linear,
    multislerp,
    slerp,
)

DIRECTIONAL = [multislerp, karcher]
EAST, NORTH = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()


def draw(
    count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(0.5, 3.0, count).tolist()
    return [size * torch.randn(shape, generator=generator, dtype=dtype) for size in sizes]


def shares(count: int, seed: int = 1) -> list[float]:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.1
    return (drawn.double() / drawn.double().sum()).tolist()


def published_multislerp(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """Tangents at the mean direction, averaged, and the exponential map back: nothing left out."""
    units = [t / t.norm() for t in tensors]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    length = tangent.norm()
    point = mean * length.cos() + tangent * torch.sinc(length / math.pi)
    return point * sum(w * t.norm() for w, t in zip(weights, tensors, strict=True))


def angle(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.atan2(float(a[0] * b[1] - a[1] * b[0]), float((a * b).sum())))


def test_gram_matrix_is_exact_over_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_modules.functional.merge_methods._PIECE", 7)
    tensors, base = draw(3, 5, 6), draw(1, 5, 6, seed=9)[0]
    rows = torch.stack([tensor.flatten() for tensor in tensors])
    assert torch.allclose(gram_matrix(tensors), rows @ rows.T, rtol=1e-13)
    rows = rows - base.flatten()
    assert torch.allclose(gram_matrix(tensors, base), rows @ rows.T, rtol=1e-13)
    # 1 + 1e-8 does not exist in float32 sums of squares, but does here
    wide = torch.full((4096,), 1e-4).bfloat16()
    exact = 4096 * float(wide[0]) ** 2
    assert float(gram_matrix([wide])[0, 0]) == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_multislerp_is_the_published_formula(count: int) -> None:
    tensors, weights = draw(count, 7, 9), shares(count)
    expected = published_multislerp(tensors, weights)
    assert (multislerp(tensors, weights) - expected).abs().max() < 1e-10
    base = draw(1, 7, 9, seed=5)[0]
    updates = [tensor - base for tensor in tensors]
    expected = base + published_multislerp(updates, weights)
    assert (multislerp(tensors, weights, base) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("method", DIRECTIONAL)
def test_one_model_equal_models_order_and_norm(method: Callable[..., Tensor]) -> None:
    one = draw(1, 6, 4)[0]
    assert torch.allclose(method([one], [1.0]), one, rtol=1e-14)
    assert torch.allclose(method([one] * 3, [0.5, 0.2, 0.3]), one, rtol=1e-13)
    tensors, weights = draw(3, 6, 4), [0.5, 0.2, 0.3]
    merged = method(tensors, weights)
    for order in itertools.permutations(range(3)):
        again = method([tensors[i] for i in order], [weights[i] for i in order])
        assert (again - merged).abs().max() < 1e-12
    norm = sum(w * float(t.norm()) for w, t in zip(weights, tensors, strict=True))
    assert float(merged.norm()) == pytest.approx(norm, rel=1e-12)
    assert abs(float(linear(tensors, weights).norm()) - norm) > 0.1 * norm


def test_slerp_goes_along_the_great_circle() -> None:
    assert angle(EAST, slerp([EAST, NORTH], [0.8, 0.2])) == pytest.approx(18.0, abs=1e-10)
    assert angle(EAST, slerp([3 * EAST, NORTH], [0.2, 0.8])) == pytest.approx(72.0, abs=1e-10)
    assert float(slerp([3 * EAST, NORTH], [0.2, 0.8]).norm()) == pytest.approx(1.4)
    obtuse = -0.5 * EAST + 0.75**0.5 * NORTH  # 120 degrees
    assert angle(EAST, slerp([EAST, obtuse], [0.75, 0.25])) == pytest.approx(30.0, abs=1e-10)
    base = torch.tensor([10.0, -2.0]).double()
    merged = slerp([base + EAST, base + NORTH], [0.8, 0.2], base)
    assert angle(EAST, merged - base) == pytest.approx(18.0, abs=1e-10)
    with pytest.raises(ValueError, match="2 models, not 3"):
        slerp([EAST] * 3, [0.3, 0.3, 0.4])


@pytest.mark.parametrize(("cosine", "is_line"), [(0.9996, True), (0.9994, False), (-0.9996, True)])
def test_slerp_is_a_line_where_angles_are_tiny(cosine: float, is_line: bool) -> None:
    pair = [EAST, cosine * EAST + math.sqrt(1 - cosine**2) * NORTH]
    merged, line = slerp(pair, [0.7, 0.3]), linear(pair, [0.7, 0.3])
    assert torch.equal(merged, line) == is_line


def test_multislerp_is_slerp_for_two_equal_weights_only() -> None:
    pair = draw(2, 4, 5)
    expected = slerp(pair, [0.5, 0.5])
    assert (multislerp(pair, [0.5, 0.5]) - expected).abs().max() < 1e-12
    assert (multislerp(pair, [0.8, 0.2]) - slerp(pair, [0.8, 0.2])).abs().max() > 1e-2
    # card of BOOM, 2.3: 14.04 degrees where slerp has 18
    exact = math.degrees(math.atan2(0.2, 0.8))
    got = angle(EAST, multislerp([EAST, NORTH], [0.8, 0.2]))
    assert got == pytest.approx(exact, abs=1e-10)
    assert round(got, 2) == 14.04


@pytest.mark.parametrize("weight", [0.05, 0.3, 0.5, 0.9])
def test_karcher_is_slerp_for_two_at_any_weights(weight: float) -> None:
    pair, weights = draw(2, 4, 5), [1 - weight, weight]
    assert (karcher(pair, weights) - slerp(pair, weights)).abs().max() < 1e-10
    base = draw(1, 4, 5, seed=4)[0]
    merged = karcher(pair, weights, base)
    assert (merged - slerp(pair, weights, base)).abs().max() < 1e-10
    assert (merged - karcher(pair, weights)).abs().max() > 1e-2


def test_karcher_minimises_squared_angles() -> None:
    generator = torch.Generator().manual_seed(3)
    centre = torch.randn(6, generator=generator).double()
    tensors = [
        size * (centre + torch.randn(6, generator=generator)) for size in (1.0, 2.0, 0.3, 1.5)
    ]
    weights = [0.4, 0.3, 0.2, 0.1]
    units = torch.stack([tensor / tensor.norm() for tensor in tensors])

    def slope(point: Tensor) -> float:
        point = (point / point.norm()).detach().requires_grad_()
        angles = (units @ point).clamp(-1, 1).acos()
        (torch.tensor(weights).double() * angles.square()).sum().backward()
        gradient, point = point.grad, point.detach()
        return float((gradient - (gradient @ point) * point).norm())

    assert slope(karcher(tensors, weights, iterations=100, tolerance=1e-13)) < 1e-7
    assert slope(karcher(tensors, weights)) < 1e-4  # 10 iterations, 1e-5
    assert slope(multislerp(tensors, weights)) > 1e-2
    coarse = slope(karcher(tensors, weights, iterations=1))
    assert 1e-4 < coarse < slope(multislerp(tensors, weights))
    assert slope(karcher(tensors, weights, iterations=100, tolerance=1.0)) == coarse


@pytest.mark.parametrize("method", [linear, multislerp, karcher])
def test_equal_task_vectors_give_base_plus_one_of_them(method: Callable[..., Tensor]) -> None:
    base, update = draw(2, 5, 5)
    merged = method([base + update] * 4, [0.25] * 4, base)
    assert (merged - (base + update)).abs().max() < 1e-12


@pytest.mark.parametrize("count", [2, 3, 5])
def test_orthogonal_task_vectors_grow_by_the_root_of_their_number(count: int) -> None:
    base = draw(1, 100, 200, seed=8)[0]
    models = [base + 0.01 * torch.randn(100, 200).double() for _ in range(count)]
    weights = [1 / count] * count
    update = linear(models, weights, base) - base
    for method in (multislerp, karcher):
        factor = float((method(models, weights, base) - base).norm() / update.norm())
        assert factor == pytest.approx(math.sqrt(count), rel=0.05)
        whole = method(models, weights)  # of the weights themselves it is nearly the average
        assert float(whole.norm() / linear(models, weights).norm()) == pytest.approx(1, abs=1e-3)


def test_zeros_have_no_direction() -> None:
    zeros, weights = torch.zeros(2).double(), [0.5, 0.25, 0.25]
    expected = linear([EAST, zeros, NORTH], weights)
    assert torch.equal(multislerp([EAST, zeros, NORTH], weights), expected)
    assert torch.equal(slerp([EAST, zeros], [0.25, 0.75]), 0.25 * EAST)
    assert torch.equal(karcher([EAST, zeros], [0.25, 0.75]), 0.25 * EAST)
    for method in (multislerp, karcher, linear):
        assert torch.equal(method([zeros] * 3, weights), zeros)
        frozen = method([EAST] * 3, weights, EAST)  # a weight that no model has changed
        assert torch.equal(frozen, EAST)
    # karcher leaves zeros out of the direction, not out of the norm
    merged = karcher([EAST, zeros, NORTH], weights)
    assert angle(EAST, merged) == pytest.approx(30.0, abs=1e-3)
    assert float(merged.norm()) == pytest.approx(0.75)


def test_opposite_directions() -> None:
    for method in (slerp, multislerp, karcher):
        merged = method([2 * EAST, -EAST], [0.5, 0.5])
        assert torch.allclose(merged, 0.5 * EAST)
    assert torch.allclose(karcher([2 * EAST, -EAST], [0.75, 0.25]), 1.25 * EAST)
    cancel = [EAST, -0.5 * EAST + 0.75**0.5 * NORTH, -0.5 * EAST - 0.75**0.5 * NORTH]
    for method in DIRECTIONAL:
        with pytest.raises(ValueError, match="directions of the models"):
            method(cancel, [1 / 3] * 3)
    opposite = [EAST, EAST, -EAST]
    assert torch.allclose(multislerp(opposite, [1 / 3] * 3), EAST)
    with pytest.raises(ValueError, match="opposite"):
        karcher(opposite, [1 / 3] * 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", [linear, multislerp, karcher])
def test_sums_are_wide_and_the_dtype_is_that_of_the_first(
    method: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    narrow = [tensor.to(dtype) for tensor in draw(3, 30, 10)]
    base = draw(1, 30, 10, seed=6)[0].to(dtype)
    for origin in (None, base):
        merged = method(narrow, [0.5, 0.3, 0.2], origin)
        assert merged.dtype == dtype
        wide = None if origin is None else origin.double()
        exact = method([tensor.double() for tensor in narrow], [0.5, 0.3, 0.2], wide)
        error = (merged.double() - exact).abs()  # one rounding to ``dtype``, and float32 sums
        assert bool((error <= torch.finfo(dtype).eps * exact.abs() + 2e-6).all())
    mixed = method([narrow[0], narrow[1].float(), narrow[2].double()], [0.5, 0.3, 0.2])
    assert mixed.dtype == dtype


@pytest.mark.parametrize("method", [linear, multislerp, karcher])
def test_inputs_are_left_alone(method: Callable[..., Tensor]) -> None:
    tensors, base = draw(2, 3, 3, dtype=torch.float32), draw(1, 3, 3, dtype=torch.float32)[0]
    before = [tensor.clone() for tensor in (*tensors, base)]
    for origin in (None, base):
        method(tensors, [0.5, 0.5], origin).zero_()
    assert all(torch.equal(a, b) for a, b in zip((*tensors, base), before, strict=True))
