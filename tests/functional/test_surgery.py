"""Surgery on Gram matrices against slow loops on vectors, hand-made cases and torchjd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.surgery import (
    check_torchjd,
    conflict_fraction,
    cosine_to_sum,
    cosines,
    gradvac_weights,
    gram_of,
    pcgrad_weights,
    torchjd_weights,
)
from lightning_modules.functional.units import partition, place_of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(units: int, count: int, width: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(units, count, width, generator=seeded(seed), dtype=torch.float64)


def gram(rows: Tensor) -> Tensor:
    return rows @ rows.transpose(-1, -2)


def pair(a: float, b: float, cosine: float) -> Tensor:
    return torch.tensor([[[a * a, a * b * cosine], [a * b * cosine, b * b]]], dtype=torch.float64)


# --- the Gram -------------------------------------------------------------------------------------


def test_gram_is_all_dot_products() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    found = gram_of([a, None, b])
    wanted = torch.zeros(3, 3)
    for i, one in enumerate((a, None, b)):
        for j, other in enumerate((a, None, b)):
            if one is not None and other is not None:
                products = zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)
                wanted[i, j] = sum(x * y for x, y in products)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(gram_of([None, None]), torch.zeros(2, 2))
    assert torch.equal(gram_of([torch.zeros(0), torch.zeros(0)]), torch.zeros(2, 2))


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    ones = torch.ones(1000, dtype=torch.bfloat16)
    found = gram_of([ones, ones])
    assert found.dtype == torch.float32 and found[0, 1] == 1000  # 1000 bfloat16 ones add up to 256


# --- PCGrad ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 0.5), (0.3, 4.0)])
@pytest.mark.parametrize("cosine", [-0.9, -0.2])
def test_two_domains_in_closed_form(a: float, b: float, cosine: float) -> None:
    found = pcgrad_weights(pair(a, b, cosine), generator=seeded())
    wanted = torch.tensor([[1 - cosine * b / a, 1 - cosine * a / b]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_without_conflict_it_is_the_sum() -> None:
    rows = vectors(5, 4).abs()
    assert torch.equal(pcgrad_weights(gram(rows), generator=seeded()), torch.ones(5, 4).double())


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_gram_form_is_projection_of_vectors(count: int, threshold: float) -> None:
    rows = vectors(20, count)
    found = pcgrad_weights(gram(rows), generator=seeded(4), threshold=threshold)
    order = torch.rand(20, count, count, generator=seeded(4)).argsort(-1).tolist()
    hits = 0
    for unit, originals in enumerate(rows):
        total = torch.zeros_like(originals[0])
        for i in range(count):
            mine = originals[i].clone()
            for j in order[unit][i]:
                cosine = torch.cosine_similarity(mine, originals[j], dim=0)
                if j != i and cosine < -threshold:
                    mine = mine - (mine @ originals[j]) / originals[j].square().sum() * originals[j]
                    last, hits = j, hits + 1
                    assert abs(float(mine @ originals[last])) < 1e-10
            total = total + mine
        torch.testing.assert_close(found[unit] @ originals, total, atol=1e-9, rtol=1e-9)
    assert hits > 5


def test_projected_pairs_conflict_no_more() -> None:
    rows = vectors(50, 2)
    for unit, matrix in enumerate(gram(rows)):
        a, b = rows[unit]
        if matrix[0, 1] < 0:
            projected = a - matrix[0, 1] / matrix[1, 1] * b
            assert float(projected @ b) > -1e-10
            total = pcgrad_weights(matrix[None], generator=seeded())[0] @ rows[unit]
            assert float(total @ a) >= -1e-10 and float(total @ b) >= -1e-10


def test_a_gradient_of_nothing_is_not_projected_on() -> None:
    matrix = pair(1.0, 1e-7, -1.0)
    assert torch.equal(pcgrad_weights(matrix, generator=seeded())[0, 1], torch.tensor(1.0).double())
    found = pcgrad_weights(matrix, generator=seeded(), norm_floor=1e-20)
    assert found[0, 1] == pytest.approx(1 + 1e7)
    zeros = torch.zeros(1, 3, 3)
    assert torch.equal(pcgrad_weights(zeros, generator=seeded()), torch.ones(1, 3).double())


def test_orders_are_random_and_a_function_of_the_generator() -> None:
    rows = vectors(1, 3, width=2, seed=1)  # three directions of a plane: conflicts
    found = {tuple(pcgrad_weights(gram(rows), generator=seeded(i))[0].tolist()) for i in range(40)}
    assert 2 <= len(found) <= 8
    same = [pcgrad_weights(gram(rows), generator=seeded(3)) for _ in range(2)]
    assert torch.equal(*same)


# --- the numbers of the method card, section 9A ---------------------------------------------------


@pytest.mark.parametrize(
    ("norms", "whole", "naive", "modular", "factor"),
    [
        ((1.0, 2.0), 0.32, (0.2, 6.4), (0.36, 6.4), 1.0),
        ((2.0, 1.0), -0.52, (0.8, 1.6), (1.44, 1.6), 1.52),
    ],
)
def test_golden_values_of_two_modules(
    norms: tuple[float, float], whole: float, naive: Any, modular: Any, factor: float
) -> None:
    """Two domains of equal norm; module A has cosine -0.8, module B 0.6."""
    both = torch.cat([pair(norms[0], norms[0], -0.8), pair(norms[1], norms[1], 0.6)])
    assert float(cosines(both.sum(0))[0, 1]) == pytest.approx(whole)

    def descent(weights: Tensor) -> list[float]:
        return (both[:, 0] * weights).sum(1).tolist()  # <g_1, g> in each module

    assert descent(torch.ones(2, 2)) == pytest.approx(naive)
    assert descent(pcgrad_weights(both, generator=seeded())) == pytest.approx(modular)
    total = pcgrad_weights(both.sum(0, keepdim=True), generator=seeded())
    assert total.flatten().tolist() == pytest.approx([factor, factor])


# --- other aggregators ----------------------------------------------------------------------------


def test_gradvac_reaches_its_target() -> None:
    rows = vectors(30, 2)
    target = torch.full((30, 2, 2), 0.5, dtype=torch.float64)
    matrix = gram(rows)
    found = gradvac_weights(matrix, target, generator=seeded(), decay=0.2, eps=0.0)
    raised = 0
    for unit in range(30):
        a, b = rows[unit]
        cosine = float(torch.cosine_similarity(a, b, dim=0))
        if cosine >= 0.5:
            assert found.weights[unit].tolist() == pytest.approx([1.0, 1.0])
            continue
        raised += 1
        extra = found.weights[unit] - 1  # what b gets from a's vaccine, and a from b's
        for mine, other, more in ((a, b, extra[1]), (b, a, extra[0])):
            reached = torch.cosine_similarity(mine + more * other, other, dim=0)
            assert float(reached) == pytest.approx(0.5)
        assert found.targets[unit, 0, 1] == pytest.approx(0.8 * 0.5 + 0.2 * cosine)
    assert raised > 10


def test_gradvac_without_targets_is_pcgrad() -> None:
    matrix = gram(vectors(20, 3))
    zeros = torch.zeros(20, 3, 3)
    found = gradvac_weights(matrix, zeros, generator=seeded(2), eps=0.0)
    wanted = pcgrad_weights(matrix, generator=seeded(2))
    torch.testing.assert_close(found.weights, wanted)


def test_pcgrad_and_gradvac_agree_with_torchjd() -> None:
    jd = pytest.importorskip("torchjd.aggregation")
    for matrix in gram(vectors(20, 2)):
        mine = pcgrad_weights(matrix[None], generator=seeded())[0]
        torch.testing.assert_close(mine, jd.PCGradWeighting()(matrix))
        other = jd.GradVacWeighting()
        targets = torch.zeros(1, 2, 2)
        for _ in range(3):
            result = gradvac_weights(matrix[None], targets, generator=seeded())
            targets = result.targets
            torch.testing.assert_close(result.weights[0], other(matrix), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["upgrad", "aligned_mtl", "cagrad", "nash_mtl"])
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_aggregators_of_torchjd(method: Any, scale: float) -> None:
    pytest.importorskip("torchjd")
    try:
        check_torchjd(method)
    except ValueError as error:
        assert "pip install -e '.[surgery]'" in str(error)
        pytest.skip(f"a solver is missing: {error}")
    rows = vectors(6, 3) * scale
    rows[0] = 0.0
    weights = torchjd_weights(gram(rows), method)
    assert weights.shape == (6, 3) and weights.isfinite().all()
    assert weights[0].tolist() == [1.0, 1.0, 1.0]
    for unit in range(1, 6):
        total = weights[unit] @ rows[unit]
        inner = rows[unit] @ total / scale**2
        if method in ("upgrad", "nash_mtl"):
            assert inner.min() > -1e-2, "a domain is made worse"
        if method == "aligned_mtl":  # equal singular values: every domain gains alike
            assert weights[unit].min() > -1e3
        if method == "nash_mtl":
            product = inner * weights[unit] / inner[0] / weights[unit][0]
            torch.testing.assert_close(product, torch.ones(3).double(), atol=0.1, rtol=0)
    calm = torch.eye(3).double()[None]
    if method == "upgrad":
        torch.testing.assert_close(
            torchjd_weights(calm, method), torch.ones(1, 3).double(), atol=1e-3, rtol=0
        )
    again = torchjd_weights(gram(rows), method)
    assert torch.equal(again, weights), "an answer must not depend on the one before"


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_against_vectors() -> None:
    rows = vectors(8, 3)
    matrix, weights = gram(rows), torch.rand(8, 3, generator=seeded(9)).double()
    found = cosines(matrix)
    negative = 0
    for unit in range(8):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            wanted = torch.cosine_similarity(rows[unit, a], rows[unit, b], dim=0)
            assert float(found[unit, a, b]) == pytest.approx(float(wanted))
            negative += bool(wanted < 0)
    assert conflict_fraction(matrix) == pytest.approx(negative / 24)
    final = torch.cat([weights[u] @ rows[u] for u in range(8)])
    naive = torch.cat([rows[u].sum(0) for u in range(8)])
    wanted = torch.cosine_similarity(final, naive, dim=0)
    assert cosine_to_sum(matrix, weights) == pytest.approx(float(wanted))


def test_a_zero_gradient_has_no_cosine() -> None:
    matrix = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, -1.0], [-1.0, 4.0]]])
    assert cosines(matrix)[0, 0, 1].isnan()
    assert conflict_fraction(matrix) == 1.0  # of the pairs that have one


# --- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("policy.model.model.embed_tokens.weight", ("", "embed", "embed")),
        ("policy.model.lm_head.weight", ("", "head", "head")),
        ("m.model.norm.weight", ("", "norm", "norm")),
        ("m.layers.2.self_attn.q_proj.weight", ("m.layers.2", "attn", "attn")),
        ("m.layers.2.self_attn.q_norm.weight", ("m.layers.2", "norm", "attn")),
        ("m.layers.2.input_layernorm.weight", ("m.layers.2", "norm", "attn")),
        ("m.layers.2.post_attention_layernorm.weight", ("m.layers.2", "norm", "mlp")),
        ("m.layers.11.mlp.up_proj.weight", ("m.layers.11", "mlp", "mlp")),
        ("m.layers.0.mlp.up_proj.lora_A.default.weight", ("m.layers.0", "mlp", "mlp")),
        ("m.layers.0.self_attn.k_proj.lora_B.default.weight", ("m.layers.0", "attn", "attn")),
        ("transformer.h.4.ln_1.bias", ("transformer.h.4", "norm", "attn")),
        ("transformer.h.4.ln_2.bias", ("transformer.h.4", "norm", "mlp")),
        ("transformer.wte.weight", ("", "embed", "embed")),
        ("encoder.layer.1.attention.output.LayerNorm.weight", ("encoder.layer.1", "norm", "attn")),
        ("visual.blocks.0.attn.qkv.bias", ("visual.blocks.0", "attn", "attn")),
        ("net.2.weight", ("net.2", "mlp", "mlp")),
        ("score.weight", ("", "head", "head")),
    ],
)
def test_places(name: str, wanted: tuple[str, str, str]) -> None:
    assert tuple(place_of(name)) == wanted


NAMES = {
    "embed_tokens.weight": 800,
    "layers.0.self_attn.q_proj.weight": 64,
    "layers.0.self_attn.q_proj.bias": 8,
    "layers.0.self_attn.q_norm.weight": 8,
    "layers.0.input_layernorm.weight": 16,
    "layers.0.mlp.up.lora_A.default.weight": 16,
    "layers.0.mlp.up.lora_B.default.weight": 16,
    "layers.0.post_attention_layernorm.weight": 16,
    "layers.1.mlp.up.weight": 64,
    "norm.weight": 8,
    "lm_head.weight": 800,
    "lm_head.bias": 1,
}


@pytest.mark.parametrize(
    ("granularity", "wanted"),
    [
        ("tensor", [[0], [1, 2, 3], [4], [5, 6], [7], [8], [9], [10, 11]]),
        ("module", [[0], [1, 2, 3, 4], [5, 6, 7], [8], [9], [10, 11]]),
        ("layer", [[0], [1, 2, 3, 4, 5, 6, 7], [8], [9], [10, 11]]),
        ("global", [list(range(12))]),
    ],
)
def test_partition(granularity: Any, wanted: list[list[int]]) -> None:
    units = partition(list(NAMES), list(NAMES.values()), granularity=granularity)
    found = [[i for i, u in enumerate(units.unit_of) if u == n] for n in range(len(units.names))]
    assert found == wanted
    assert len(set(units.cells)) == len(units.cells) == 7
    assert units.cells[units.cell_of[2]] == ("layers.0", "attn")


def test_a_lonely_scalar_stays_alone() -> None:
    assert partition(["scale"], [1]).names == ["scale"]
