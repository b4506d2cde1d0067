"""Uncertainty of positions against distributions written out by hand and float64 sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.sums import means, merge
from lightning_modules.functional.uncertainty import (
    by_slot,
    certainty_metrics,
    near_greedy_alternatives,
    restricted_entropy,
    top_margin,
)


def random_logits(*shape: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def test_slots_and_rest():
    entropy = torch.tensor([[1.0, 2.0, 4.0, math.nan], [8.0, 16.0, math.inf, math.nan]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    slots = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])
    found = by_slot("entropy", entropy.requires_grad_(), mask, slots)
    sums = {name: (total.item(), count.item()) for name, (total, count) in found.items()}
    assert sums == {
        "entropy": (31.0, 5.0),
        "entropy_slot": (10.0, 2.0),
        "entropy_rest": (21.0, 3.0),
    }
    parts = [by_slot("entropy", entropy[i], mask[i], slots[i]) for i in range(2)]
    assert means(merge(*parts)) == means(found)


def test_a_text_without_facts_has_no_slot_entropy():
    found = means(by_slot("entropy", torch.ones(3), torch.ones(3), torch.zeros(3)))
    assert found == {"entropy": 1.0, "entropy_rest": 1.0}


def test_live_values_must_be_finite_and_shapes_equal():
    with pytest.raises(ValueError, match=r"entropy at \[0, 1\] is not finite"):
        by_slot("entropy", torch.tensor([[0.0, math.nan]]), torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"\(1, 2\), \(2,\) and \(1, 2\)"):
        by_slot("entropy", torch.ones(1, 2), torch.ones(2), torch.ones(1, 2))


@pytest.mark.parametrize("size", [2, 9, 11, 50])
def test_margin_and_alternatives_by_sorting(size):
    logits = random_logits(40, size)
    for row, margin, number in zip(
        logits.softmax(-1).tolist(),
        top_margin(logits).tolist(),
        near_greedy_alternatives(logits).tolist(),
        strict=True,
    ):
        best = sorted(row, reverse=True)
        assert margin == pytest.approx(best[0] - best[1], abs=1e-12)
        assert number == sum(p > 0.1 for p in best[1:])


def test_known_distributions():
    uniform, sure = torch.zeros(1, 8), torch.tensor([[50.0] + [-math.inf] * 7])
    assert top_margin(uniform).item() == 0 and top_margin(sure).item() == 1
    assert near_greedy_alternatives(uniform).item() == 7  # 1/8 each
    assert near_greedy_alternatives(torch.zeros(1, 11)).item() == 0  # 1/11 each
    assert near_greedy_alternatives(sure).item() == 0
    few = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert [near_greedy_alternatives(few, threshold=t).item() for t in (0.1, 0.25, 0.4)] == [
        2,
        1,
        0,
    ]
    ids = [0, 3, 5]
    assert restricted_entropy(uniform, ids).item() == pytest.approx(math.log(3))
    assert restricted_entropy(sure, ids).item() == 0


def test_restricted_entropy_renormalises():
    logits, ids = random_logits(20, 12), [7, 2, 3, 11]
    shares = logits.softmax(-1)[:, ids]
    shares = shares / shares.sum(-1, keepdim=True)
    expected = -(shares * shares.log()).sum(-1)
    torch.testing.assert_close(restricted_entropy(logits, ids), expected)
    torch.testing.assert_close(restricted_entropy(logits + 100, ids), expected)
    whole = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(restricted_entropy(logits, list(range(12))), whole)
    other = logits.clone()
    other[:, 0] += 50  # a token outside of the set takes all the mass
    torch.testing.assert_close(restricted_entropy(other, ids), expected)


def test_shapes_dtypes_and_gradients():
    logits = random_logits(2, 3, 5).to(torch.bfloat16).requires_grad_()
    for found in (top_margin(logits), restricted_entropy(logits, [1, 2])):
        assert found.shape == (2, 3) and found.dtype == torch.float32 and not found.requires_grad
    assert near_greedy_alternatives(logits).shape == (2, 3)
    torch.testing.assert_close(top_margin(logits), top_margin(logits.detach().float()))


def test_impossible_tokens_are_no_trouble():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    assert top_margin(logits).item() == 0 and near_greedy_alternatives(logits).item() == 1
    assert restricted_entropy(logits, [0, 1]).item() == 0
    assert restricted_entropy(logits, [0, 2]).item() == pytest.approx(math.log(2))


def test_certainty_is_sorted_into_slots():
    logits, slots = random_logits(10, 6), torch.arange(10) % 3 == 0
    found = means(certainty_metrics(logits, slots, ids=[1, 4], threshold=0.2))
    assert len(found) == 9
    assert found["margin_slot"] == pytest.approx(top_margin(logits)[slots].mean().item())
    rest = near_greedy_alternatives(logits, threshold=0.2)[~slots].double().mean().item()
    assert found["alternatives_rest"] == pytest.approx(rest)
    restricted = restricted_entropy(logits, [1, 4]).mean().item()
    assert found["entropy_restricted"] == pytest.approx(restricted)
    assert set(means(certainty_metrics(logits, slots))) == {
        name + part for name in ("margin", "alternatives") for part in ("", "_slot", "_rest")
    }


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_positions_without_a_distribution_are_refused(bad):
    logits = torch.tensor([[1.0, 0.0], bad])
    for call in (top_margin, near_greedy_alternatives, lambda x: restricted_entropy(x, [0, 1])):
        with pytest.raises(ValueError, match=r"logits at \[1\] are NaN, infinite, or all -inf"):
            call(logits)


def test_wrong_options():
    logits = torch.zeros(1, 4)
    for ids in ([], [0, 0], [-1], [4]):
        with pytest.raises(ValueError, match=r"ids=.* must be different tokens from 0 to 3"):
            restricted_entropy(logits, ids)
    for threshold in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"threshold=.* must be in \(0, 1\)"):
            near_greedy_alternatives(logits, threshold=threshold)
    with pytest.raises(ValueError, match="V from 2"):
        top_margin(torch.zeros(3, 1))
