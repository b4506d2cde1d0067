"""Nearest neighbours and mined negatives against slow loops, with ties, duplicates and limits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.functional import search
from lightning_modules.functional.search import Mined, is_in, mine_negatives, top_k


def random_vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Vectors whose products float32 holds exactly, in any order: all ties are real ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float()


def slow_top_k(queries: Tensor, corpus: Tensor, k: int) -> list[list[int]]:
    """Places of the best, equal scores by place."""
    rows = (queries.double() @ corpus.double().T).tolist()
    return [sorted(range(len(row)), key=lambda c: (-row[c], c))[:k] for row in rows]


# --- top_k ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_queries", [1, 19, 20, 70])  # faiss multiplies matrices from 20 on
@pytest.mark.parametrize("k", [1, 7, 120, 200])  # and keeps its candidates differently from 100 on
def test_top_k_is_exact_with_ties(num_queries, k):
    queries, corpus = whole_numbers(num_queries, 4), whole_numbers(150, 4, seed=1)
    scores, places = top_k(queries, corpus, k, normalize=False)
    assert scores.dtype == torch.float32 and places.dtype == torch.long
    assert places.tolist() == slow_top_k(queries, corpus, k)
    assert torch.equal(scores, (queries @ corpus.T).gather(1, places))
    assert scores.shape == (num_queries, min(k, 150))


def test_ties_of_different_vectors_that_are_cut():
    """All scores are equal but no two vectors are: faiss may find any of them."""
    corpus = torch.cat([torch.ones(300, 1), torch.arange(300.0)[:, None]], dim=1)
    queries = torch.tensor([[1.0, 0.0]]).expand(25, 2)
    places = top_k(queries, corpus, 5, normalize=False)[1]
    assert places.tolist() == [[0, 1, 2, 3, 4]] * 25


def test_deeper_searches_keep_their_rows(monkeypatch):
    """Small calls of faiss, a tie in some rows alone."""
    monkeypatch.setattr(search, "_MAX_FOUND", 9)
    queries = random_vectors(30, 6).round(decimals=1)
    queries[::3, 1:] = 0.0
    corpus = torch.cat([torch.ones(80, 1), whole_numbers(80, 5)], dim=1)
    corpus[40:, 0] = 3.0
    scores, places = top_k(queries, corpus, 4, normalize=False)
    first = [40 if query > 0 else 0 for query in queries[::3, 0].tolist()]
    assert places[::3].tolist() == [list(range(start, start + 4)) for start in first]
    expected = torch.tensor(slow_top_k(queries, corpus, 4))
    torch.testing.assert_close(scores, (queries @ corpus.T).gather(1, expected))


@pytest.mark.parametrize("distinct", [1, 7, 60])
def test_equal_vectors_score_equally(distinct):
    """A large matrix product alone rounds them differently, by their place."""
    corpus = random_vectors(distinct, 384)[torch.arange(300) % distinct]
    queries = random_vectors(512, 384, seed=1)
    scores, places = top_k(queries, corpus, 50)
    unit = F.normalize(queries.double(), dim=1) @ F.normalize(corpus[:distinct].double(), dim=1).T
    for row, score, at in zip(unit.tolist(), scores.tolist(), places.tolist(), strict=True):
        ranked = sorted(range(300), key=lambda c: (-row[c % distinct], c))
        assert at == ranked[:50]
        assert len(set(score)) == len({place % distinct for place in at})


def test_equal_vectors_among_equal_scores():
    """Duplicates and other vectors of the same score are sorted together."""
    corpus = torch.tensor([[1.0, 5.0], [1.0, 7.0], [1.0, 5.0], [2.0, 0.0], [1.0, 9.0], [1.0, 7.0]])
    scores, places = top_k(torch.tensor([[1.0, 0.0]]), corpus, 4, normalize=False)
    assert places.tolist() == [[3, 0, 1, 2]] and scores.tolist() == [[2.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cosines_of_any_float_type(dtype):
    queries = random_vectors(30, 12).to(dtype).requires_grad_()
    corpus = (100 * random_vectors(90, 12, seed=1)).to(dtype)
    scores, places = top_k(queries, corpus, 8)
    unit = [F.normalize(x.detach().double(), dim=1) for x in (queries, corpus)]
    assert places.tolist() == slow_top_k(unit[0], unit[1], 8)
    exact = (unit[0] @ unit[1].T).gather(1, places).float()
    torch.testing.assert_close(scores, exact)


@pytest.mark.timeout(60)
def test_faiss_takes_the_threads_of_torch(monkeypatch):
    """Both bring an OpenMP: neither may hang the other, and they share the cores."""
    import faiss

    given, setter = [], faiss.omp_set_num_threads
    monkeypatch.setattr(
        faiss, "omp_set_num_threads", lambda threads: (given.append(threads), setter(threads))
    )
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            weight = random_vectors(256, 256).requires_grad_()
            (weight @ weight).sum().backward()
            top_k(random_vectors(64, 256), random_vectors(500, 256, seed=1), 10)
            assert given[-1:] == [threads] == [faiss.omp_get_max_threads()]
            (weight @ weight).sum().backward()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("queries", "corpus", "k", "message"),
    [
        (torch.ones(3), torch.ones(2, 3), 1, r"got \(3,\) and"),
        (torch.ones(1, 3), torch.ones(0, 3), 1, "not empty"),
        (torch.ones(0, 3), torch.ones(1, 3), 1, "not empty"),
        (torch.ones(1, 3), torch.ones(2, 4), 1, "one width, got 3 and 4"),
        (torch.ones(1, 3), torch.tensor([[1.0, 1, 1], [1, torch.nan, 1]]), 1, r"corpus\[1\]"),
        (torch.tensor([[torch.inf, 1.0]]), torch.ones(1, 2), 1, r"queries\[0\]"),
        (torch.ones(1, 2), torch.full((1, 2), 1e300, dtype=torch.float64), 1, r"corpus\[0\]"),
        (torch.ones(1, 3), torch.ones(2, 3), 0, "k=0"),
    ],
)
def test_top_k_refuses(queries, corpus, k, message):
    with pytest.raises(ValueError, match=message):
        top_k(queries, corpus, k)


@pytest.mark.parametrize("corpus", [[[1e30, 1e30]], [[1e30, -1e30]], [[-1e30, -1e30]]])
def test_top_k_refuses_products_beyond_float32(corpus):
    """Infinity, NaN and minus infinity."""
    with pytest.raises(ValueError, match="too large for float32"):
        top_k(torch.full((1, 2), 1e30), torch.tensor(corpus), 1, normalize=False)


# --- is_in ----------------------------------------------------------------------------------------


def test_is_in_keeps_rows_apart():
    places = torch.randint(0, 9, (20, 6), generator=torch.Generator().manual_seed(0))
    members = [{(3 * row) % 8, row, 40} if row % 4 else set() for row in range(20)]
    expected = [
        [p in some for p in row] for row, some in zip(places.tolist(), members, strict=True)
    ]
    assert is_in(places, members).tolist() == expected
    assert any(map(any, expected)) and not is_in(places, [()] * 20).any()
    with pytest.raises(ValueError, match="19 collections for 20"):
        is_in(places, members[1:])


# --- mining ---------------------------------------------------------------------------------------

QUERIES = random_vectors(40, 8)
CORPUS = torch.cat([QUERIES + 0.8 * random_vectors(40, 8, seed=1), random_vectors(60, 8, seed=2)])
KNOWN = [[row, *((row + 7 * i) % 100 for i in range(1, row % 4))] for row in range(40)]


def slow_mining(count: int, **options: Any) -> Mined:
    """Candidates one after the other, nearest first."""
    unit = [F.normalize(x.double(), dim=1) for x in (QUERIES, CORPUS)]
    dropped = dict.fromkeys(("absolute_margin", "relative_margin", "max_score", "min_score"), 0)
    negatives = []
    for row, scores in enumerate((unit[0] @ unit[1].T).tolist()):
        ranked = sorted(set(range(100)) - set(KNOWN[row]), key=lambda c: -scores[c])
        own, kept = scores[KNOWN[row][0]], []
        for place in ranked[options.get("range_min", 0) : options.get("range_max", 100)]:
            score = scores[place]
            out = {
                "absolute_margin": lambda limit: score > own - limit,  # noqa: B023
                "relative_margin": lambda limit: score > own - abs(own) * limit,  # noqa: B023
                "max_score": lambda limit: score > limit,  # noqa: B023
                "min_score": lambda limit: score < limit,  # noqa: B023
            }
            for name, is_out in out.items():
                if name in options and is_out(options[name]):
                    dropped[name] += 1
                    break
            else:
                kept.append(place)
        negatives.append(kept[:count])
    return Mined(negatives, dropped, sum(len(some) < count for some in negatives))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"range_min": 3, "range_max": 12},
    {"absolute_margin": 0.3},
    {"absolute_margin": -0.1, "range_max": 20},
    {"relative_margin": 0.4, "range_max": 15},
    {"max_score": 0.6, "min_score": 0.4, "range_max": 30},
    {"absolute_margin": 0.2, "relative_margin": 0.3, "max_score": 0.4, "min_score": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_top_negatives_are_those_of_the_loop(options):
    found = mine_negatives(QUERIES, CORPUS, known=KNOWN, count=6, **options)
    assert found == slow_mining(6, **options)
    assert all(found.num_dropped_by_margin[name] for name in options if "range" not in name)
    assert not any(set(some) & set(known) for some, known in zip(found[0], KNOWN, strict=True))


@pytest.mark.parametrize(("min_score", "length"), [(0.55, 6), (0.75, 0)])
def test_a_query_may_get_few_negatives_or_none(min_score, length):
    found = mine_negatives(QUERIES, CORPUS, known=KNOWN, count=6, min_score=min_score)
    assert found == slow_mining(6, min_score=min_score)
    lengths = Counter(len(some) for some in found.negatives)
    assert lengths[length] and 0 < found.num_short == 40 - lengths[6]


def test_relative_margin_of_an_opposite_positive():
    """Of a positive at -1 it drops what is above -1 - 0.1, not what is above -0.9."""
    corpus = torch.tensor([[-1.0, 0.0], [-0.95, 0.3], [0.0, 1.0]])
    found = mine_negatives(
        torch.tensor([[1.0, 0.0]]), corpus, known=[[0]], count=2, relative_margin=0.1
    )
    assert found.negatives == [[]] and found.num_dropped_by_margin["relative_margin"] == 2


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_random_negatives_are_candidates_nearest_first(options):
    every = slow_mining(100, **options)
    found = mine_negatives(QUERIES, CORPUS, known=KNOWN, count=4, sampling="random", **options)
    for some, candidates in zip(found.negatives, every.negatives, strict=True):
        ranks = [candidates.index(place) for place in some]  # ValueError for no candidate
        assert ranks == sorted(set(ranks)) and len(some) == min(4, len(candidates))
    assert found.num_dropped_by_margin == every.num_dropped_by_margin


def test_random_draws_are_even_and_follow_the_seed():
    def draw(seed: int) -> list[list[int]]:
        return mine_negatives(
            QUERIES, CORPUS, known=KNOWN, count=3, range_max=9, sampling="random", seed=seed
        ).negatives

    assert draw(1) == draw(1) != draw(2)
    counts = Counter(place for seed in range(300) for place in draw(seed)[5])
    assert set(counts) == set(slow_mining(9, range_max=9).negatives[5])
    assert all(60 < number < 140 for number in counts.values())  # 100 expected, deviation 8


def test_a_copy_of_the_positive_ties_with_it():
    """It is above no margin of 0, however its product was rounded; any margin drops it."""
    corpus = random_vectors(500, 384)
    corpus[100:200] = corpus[:100]
    queries = corpus[:100] + random_vectors(100, 384, seed=1)
    known = [[row] for row in range(100)]
    found = mine_negatives(queries, corpus, known=known, count=1, absolute_margin=0.0)
    assert found.negatives == [[row + 100] for row in range(100)]
    strict = mine_negatives(queries, corpus, known=known, count=1, absolute_margin=1e-3)
    assert strict.num_dropped_by_margin["absolute_margin"] == 100


def test_known_may_be_sets_or_empty_without_margins():
    found = mine_negatives(QUERIES[:2], CORPUS, known=[{1, 0, 2}, ()], count=5)
    ranked = slow_top_k(F.normalize(QUERIES[:2], dim=1), F.normalize(CORPUS, dim=1), 8)
    assert found.negatives[0] == [place for place in ranked[0] if place > 2][:5]
    assert found.negatives[1] == ranked[1][:5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": KNOWN[1:]}, "39 entries for 40"),
        ({"known": [*KNOWN[1:], [100]]}, r"known\[39\] holds 100, the corpus 100"),
        ({"known": [[-1], *KNOWN[1:]]}, r"known\[0\] holds -1"),
        ({"known": [*KNOWN[1:], []], "absolute_margin": 0.1}, r"known\[39\] is empty"),
        ({"known": [{0, 1}, *KNOWN[1:]], "relative_margin": 0.1}, r"known\[0\] is a set"),
        ({"count": 0}, "count=0"),
        ({"count": 6, "range_min": 5, "range_max": 10}, "range_max - range_min = 5"),
        ({"range_min": -1}, "range_min"),
        ({"range_min": 5, "range_max": 5}, "range_min < range_max"),
        ({"sampling": "best"}, "'best'"),
        ({"max_score": float("nan")}, "max_score=nan"),
        ({"min_score": float("inf")}, "min_score=inf"),
    ],
    ids=str,
)
def test_mining_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        mine_negatives(QUERIES, CORPUS, **({"known": KNOWN, "count": 2} | options))
