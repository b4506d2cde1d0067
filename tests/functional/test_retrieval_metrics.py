"""Ranking metrics and correlations against hand-written ones."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.functional.retrieval_metrics import retrieval_metrics, sts_metrics
from lightning_modules.functional.search import top_k


def slow_metrics(
    scores: list[list[float]],
    places: list[list[int]],
    relevant: list[set[int]],
    ks: tuple[int, ...] = (1, 10),
) -> dict[str, float]:
    """By the definitions of trec_eval, one query after the other."""
    rows = []
    for score, place, answers in zip(scores, places, relevant, strict=True):
        pairs = sorted(zip(score, place, strict=True), key=lambda pair: (-pair[0], pair[1]))
        hits = [at in answers for _, at in pairs]
        gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits[:10], 1) if hit)
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(10, len(answers)) + 1))
        found = [rank for rank, hit in enumerate(hits, 1) if hit]
        row = {
            "ndcg_at_10": gain / ideal,
            "mrr_at_10": next((1 / rank for rank in found if rank <= 10), 0.0),
            "map_at_100": sum((i + 1) / r for i, r in enumerate(found) if r <= 100) / len(answers),
            "precision_at_1": float(hits[0]),
        }
        rows.append(row | {f"recall_at_{k}": sum(hits[:k]) / len(answers) for k in ks})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def check(scores: Tensor, places: Tensor, relevant: list[set[int]]) -> dict[str, float]:
    found = retrieval_metrics(scores, places, relevant)
    expected = slow_metrics(scores.tolist(), places.tolist(), relevant)
    assert found == pytest.approx(expected, abs=1e-6)
    assert all(type(value) is float for value in found.values())
    return found


def retrieved(num_queries: int, num_found: int, num_places: int) -> tuple[Tensor, Tensor]:
    """Random scores of both signs, in no order, for random places."""
    generator = torch.Generator().manual_seed(num_found)
    scores = torch.randn(num_queries, num_found, generator=generator)
    keys = torch.rand(num_queries, num_places, generator=generator)
    return scores, keys.argsort(dim=1)[:, :num_found]


@pytest.mark.parametrize("num_found", [1, 3, 9, 10, 11, 100, 130])
@pytest.mark.parametrize("most", [1, 4, 30])
def test_as_by_hand(num_found, most):
    """Few or many answers, some retrieved and some not, in lists shorter and longer than k."""
    draw = random.Random(most)
    scores, places = retrieved(60, num_found, 150)
    relevant = [set(draw.sample(range(150), draw.randint(1, most))) for _ in range(40)]
    relevant += [{draw.choice(row), *range(draw.randrange(most))} for row in places[40:].tolist()]
    found = check(scores, places, relevant)
    assert 0 < found["map_at_100"] < 1


def test_more_answers_than_ranks():
    scores, places = retrieved(5, 140, 150)
    check(scores, places, [set(range(150 - row)) for row in range(5)])


@pytest.mark.parametrize("num_found", [2, 40])
def test_nothing_retrieved(num_found):
    scores, places = retrieved(4, num_found, 50)
    found = check(scores, places, [{60, 61}] * 4)
    assert set(found.values()) == {0.0}


def test_everything_right():
    scores, places = retrieved(4, 12, 50)
    best = scores.topk(3, dim=1).indices
    found = check(scores, places, [set(row.tolist()) for row in places.gather(1, best)])
    assert found.pop("recall_at_1") == pytest.approx(1 / 3)
    assert found == pytest.approx(dict.fromkeys(found, 1.0))


def test_fewer_documents_than_ranks():
    """Missed answers must not slip into the ranks 4 to 10 that nobody took."""
    scores, places = torch.tensor([[0.3, 0.2, 0.1]]), torch.tensor([[0, 1, 2]])
    assert check(scores, places, [{2}])["ndcg_at_10"] == pytest.approx(0.5)
    assert check(scores, places, [{2, 8}])["ndcg_at_10"] == pytest.approx(0.5 / (1 + 0.63092975))


def test_scores_below_zero_are_retrieved():
    """torchmetrics itself would count none of these."""
    scores, places = torch.tensor([[-0.5, -0.1, -0.2]]), torch.tensor([[5, 6, 7]])
    assert check(scores, places, [{6}])["mrr_at_10"] == 1.0


def test_average_precision_counts_missed_answers_and_no_rank_beyond_100():
    scores, places = torch.arange(110.0, 0, -1)[None], torch.arange(110)[None]
    assert check(scores, places, [{1, 500}])["map_at_100"] == pytest.approx(0.25)
    assert check(scores, places, [{100}])["map_at_100"] == 0.0
    assert check(scores, places, [{99}])["map_at_100"] == pytest.approx(0.01)


def test_ties_rank_by_place_in_any_order_of_columns():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (50, 30), generator=generator).float()
    places = retrieved(50, 30, 40)[1]
    relevant = [{row % 40, (3 * row + 1) % 40} for row in range(50)]
    found = check(scores, places, relevant)
    mixed = torch.randperm(30, generator=generator)
    assert retrieval_metrics(scores[:, mixed], places[:, mixed], relevant) == found


def test_ranks_of_the_recall():
    scores, places = retrieved(40, 20, 30)
    relevant = [{row % 30, (row + 9) % 30} for row in range(40)]
    found = retrieval_metrics(scores, places, relevant, ks=(3, 20, 50))
    expected = slow_metrics(scores.tolist(), places.tolist(), relevant, ks=(3, 20, 50))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found["recall_at_20"] == found["recall_at_50"] > found["recall_at_3"]


def test_lists_with_repeated_answers_are_sets():
    scores, places = retrieved(1, 20, 20)
    assert retrieval_metrics(scores, places, [[4, 4, 9]]) == check(scores, places, [{4, 9}])


def test_with_the_search():
    generator = torch.Generator().manual_seed(0)
    corpus = torch.randn(300, 16, generator=generator)
    queries = corpus[:50] + 0.7 * torch.randn(50, 16, generator=generator)
    scores, places = top_k(queries, corpus, 100)
    found = check(scores, places, [{row} for row in range(50)])
    assert 0.4 < found["recall_at_1"] < found["mrr_at_10"] < found["recall_at_10"] <= 1


@pytest.mark.parametrize(
    ("scores", "places", "relevant", "ks", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 2).long(), [{0}] * 2, (1,), "one shape"),
        (torch.ones(0, 3), torch.ones(0, 3).long(), [], (1,), "not empty"),
        (torch.tensor([[torch.nan]]), torch.tensor([[0]]), [{0}], (1,), "not finite"),
        (torch.ones(1, 1), torch.ones(1, 1), [{0}], (1,), "integers"),
        (torch.ones(1, 1), torch.tensor([[-1]]), [{0}], (1,), "from 0"),
        (torch.ones(2, 3), torch.tensor([[0, 1, 2], [4, 5, 4]]), [{0}] * 2, (1,), r"\[1\].*twice"),
        (torch.ones(2, 1), torch.tensor([[0], [0]]), [{0}], (1,), "1 entries for 2"),
        (torch.ones(2, 1), torch.tensor([[0], [0]]), [{0}, set()], (1,), r"relevant\[1\]"),
        (torch.ones(1, 1), torch.tensor([[0]]), [{-1, 0}], (1,), r"relevant\[0\]"),
        (torch.ones(1, 1), torch.tensor([[0]]), [{0}], (0, 1), "ks="),
        (torch.ones(1, 1), torch.tensor([[0]]), [{0}], (1, 1), "ks="),
    ],
)
def test_retrieval_refuses(scores, places, relevant, ks, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(scores, places, relevant, ks=ks)


# --- correlations ---------------------------------------------------------------------------------


def mean_ranks(values: np.ndarray) -> np.ndarray:
    below = (values[:, None] > values).sum(axis=1)
    return below + ((values[:, None] == values).sum(axis=1) + 1) / 2


def at_cosines(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of vectors of several lengths with these cosines."""
    angles = cosines.double().acos()
    first = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(len(cosines), 2)
    lengths = 1 + torch.arange(len(cosines))[:, None] % 3
    return first, lengths * torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correlations_as_by_hand(dtype):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200, 12, generator=generator, dtype=dtype)
    second = 3 * (first + torch.randn(200, 12, generator=generator, dtype=dtype))
    cosines = torch.cosine_similarity(first.double(), second.double()).numpy()
    scores = (cosines * 5 + np.random.default_rng(0).normal(size=200)).round()  # with ties
    found = sts_metrics(first, second, torch.from_numpy(scores))
    ranks = np.corrcoef(mean_ranks(cosines), mean_ranks(scores))[0, 1]
    plain = np.corrcoef(cosines, scores)[0, 1]
    assert found == pytest.approx({"spearman": ranks, "pearson": plain}, abs=1e-5)
    assert 0.2 < ranks < 0.8


def test_order_alone_counts_for_spearman():
    first, second = at_cosines(torch.linspace(-0.9, 0.9, 30))
    scores = torch.arange(30).float().exp()
    found = sts_metrics(first, second, scores)
    assert found["spearman"] == pytest.approx(1.0, abs=1e-5) and found["pearson"] < 0.6
    assert sts_metrics(first, second, -scores)["spearman"] == pytest.approx(-1.0, abs=1e-5)
    assert sts_metrics(first, second, torch.arange(30))["pearson"] == pytest.approx(1.0, abs=1e-5)


def test_one_far_outlier_among_thousands():
    """NaN in float32."""
    cosines = torch.linspace(0.5, 0.501, 5000)
    cosines[0] = -1.0
    found = sts_metrics(*at_cosines(cosines), torch.arange(5000))
    assert found["pearson"] == pytest.approx(
        np.corrcoef(cosines.double().numpy(), np.arange(5000))[0, 1], abs=1e-5
    )


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_collapsed_model_follows_nothing(noise):
    """Also where rounding gives its cosines an order, and without a warning."""
    first, second = at_cosines(torch.full((6,), 0.5))
    second = second + noise * torch.arange(6)[:, None] * torch.tensor([[1.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sts_metrics(first, second, torch.arange(6.0))
    assert found == {"spearman": 0.0, "pearson": 0.0}


@pytest.mark.parametrize(
    ("first", "second", "scores", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), torch.ones(2), r"must be \(N, d\)"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), r"must be \(N, d\)"),
        (torch.ones(1, 3), torch.ones(1, 3), torch.ones(1), "2 pairs or more, got 1"),
        (torch.eye(2), torch.full((2, 2), torch.inf), torch.arange(2.0), "second holds"),
        (torch.eye(2), torch.eye(2), torch.tensor([0.0, torch.nan]), "scores holds"),
        (torch.eye(2), torch.ones(2, 2), torch.full((2,), 3.0), "all 2 scores are 3"),
    ],
)
def test_correlations_refuse(first, second, scores, message):
    with pytest.raises(ValueError, match=message):
        sts_metrics(first, second, scores)
