"""RankNet by hand and against a slow loop: ties, unknown scores, masks, order, refusals."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.rank_net import rank_net
from lightning_modules.functional.sums import means


def slow(
    similarities: Tensor, scores: Tensor, tau: float, mask: Tensor | None = None
) -> tuple[float, int, int]:
    """Sum, pairs, and pairs in the right order, one pair after the other."""
    total, pairs, right = 0.0, 0, 0
    for row, (own, told) in enumerate(zip(similarities.tolist(), scores.tolist(), strict=True)):
        for i, j in permutations(range(len(own)), 2):
            if mask is not None and not (mask[row, i] and mask[row, j]):
                continue
            if told[i] > told[j] >= 0:
                total += math.log1p(math.exp(-(own[i] - own[j]) / tau))
                pairs, right = pairs + 1, right + (own[i] > own[j])
    return total, pairs, right


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities, scores with ties and gaps, and a mask, of 6 rows of 5."""
    generator = torch.Generator().manual_seed(seed)
    similarities = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    scores = torch.randint(-1, 4, (6, 5), generator=generator)
    mask = torch.rand(6, 5, generator=generator) > 0.3
    return similarities.requires_grad_(), scores, mask


def test_by_hand() -> None:
    similarities = torch.tensor([[0.5, 0.3, 0.1], [0.2, 0.4, 0.9]])
    scores = torch.tensor([[90, 30, 30], [50, 60, -1]])
    found = rank_net(similarities, scores, temperature=0.1)
    wanted = [math.log1p(math.exp(-gap)) for gap in (2.0, 4.0, 2.0)]  # 0.4 above 0.2, over 0.1
    assert found.num_pairs == 3
    assert found.loss_sum.item() == pytest.approx(sum(wanted), rel=1e-5)
    metrics = means(found.metrics)
    assert metrics["rank_loss"] == pytest.approx(sum(wanted) / 3, rel=1e-5)
    assert metrics["rank_accuracy"] == 1.0 and metrics["rank_pairs"] == 1.5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed: int, masked: bool) -> None:
    similarities, scores, mask = drawn(seed)
    given = mask if masked else None
    found = rank_net(similarities, scores, temperature=0.3, mask=given)
    total, pairs, right = slow(similarities, scores, 0.3, given)
    assert found.num_pairs == pairs > 4
    assert found.loss_sum.item() == pytest.approx(total, rel=1e-12)
    assert found.metrics["rank_accuracy"][0] == right


def test_the_order_of_a_group_does_not_matter() -> None:
    similarities, scores, mask = drawn()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3))
    one = rank_net(similarities, scores, mask=mask).loss_sum
    other = rank_net(similarities[:, order], scores[:, order], mask=mask[:, order]).loss_sum
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_the_gradient_pulls_pairs_into_order() -> None:
    similarities = torch.tensor([[0.1, 0.5, 0.3]], requires_grad=True)
    found = rank_net(similarities, torch.tensor([[80, 20, -1]]), temperature=0.1)
    found.loss_sum.backward()
    assert similarities.grad is not None
    up, down, unknown = similarities.grad[0].tolist()
    slope = 10 / (1 + math.exp(-4))  # sigmoid of the gap, over tau
    assert (up, down, unknown) == (pytest.approx(-slope), pytest.approx(slope), 0.0)


def test_without_pairs_there_is_a_zero_with_a_graph() -> None:
    similarities = torch.rand(2, 3, requires_grad=True)
    scores = torch.tensor([[7, 7, 7], [-1, 3, -1]])
    found = rank_net(similarities, scores)
    assert (found.loss_sum.item(), found.num_pairs) == (0.0, 0)
    found.loss_sum.backward()
    assert similarities.grad is not None and not similarities.grad.any()
    assert "rank_loss" not in means(found.metrics) and means(found.metrics)["rank_pairs"] == 0


def test_half_precision_is_computed_in_float32() -> None:
    similarities = torch.tensor([[0.9, 0.1]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rank_net(similarities, torch.tensor([[2, 1]]), temperature=0.01).loss_sum
    assert found.dtype == torch.float32
    far = rank_net(torch.tensor([[-9.0, 9.0]]), torch.tensor([[2, 1]]), temperature=0.01)
    assert far.loss_sum.item() == pytest.approx(1800.0)  # no overflow


def test_what_is_refused() -> None:
    good = torch.zeros(2, 3)
    for given, options, message in (
        (torch.zeros(2, 3), {}, "scores must hold integers"),
        (torch.zeros(2, 4).long(), {}, r"one shape \(B, G\)"),
        (torch.zeros(2, 3).long(), {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        (torch.zeros(2, 3).long(), {"mask": torch.ones(3, 2).bool()}, "mask and similarities"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_net(good, given, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="similarities must be"):
        rank_net(torch.zeros(3), torch.zeros(3).long())
