"""Branch scores against closed forms and a double loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.branching import (
    BRANCH_SCORES,
    branch_score,
    by_chunks,
    candidate_entropy,
    divergence,
    resultant,
)


def with_cosine(cosine: float, count: int) -> Tensor:
    """``(count, count)`` unit rows with this cosine between any two."""
    gram = torch.full((count, count), cosine, dtype=torch.float64)
    gram.fill_diagonal_(1.0)
    return torch.linalg.cholesky(gram)


def scores(probs: list[float], rows: Tensor) -> dict[str, float]:
    logprobs = torch.tensor([probs], dtype=torch.float64).log()
    return {name: float(branch_score(name, logprobs, rows[None])) for name in BRANCH_SCORES}


@pytest.mark.parametrize(
    ("probs", "cosine", "expected"),
    [  # H, semantic_paper, semantic_code, semantic_rao (card, 2.2)
        ([1.0, 0.0], 0.0, (0.0, 0.0, 0.0, 0.0)),
        ([0.5, 0.5], 0.0, (0.69, -0.35, 0.0, 0.35)),
        ([0.5, 0.5], 0.9, (0.69, -0.66, -0.31, 0.035)),
        ([0.5, 0.5], -0.2, (0.69, -0.28, 0.07, 0.42)),
        ([0.05] * 20, 0.1, (3.0, -0.43, -0.28, 2.56)),
        ([0.05] * 20, 0.9, (3.0, -2.71, -2.56, 0.28)),
    ],
)
def test_the_closed_forms(probs: list[float], cosine: float, expected: tuple[float, ...]) -> None:
    found = scores(probs, with_cosine(cosine, len(probs)))
    names = ("entropy", "semantic_paper", "semantic_code", "semantic_rao")
    for name, value in zip(names, expected, strict=True):
        assert found[name] == pytest.approx(value, abs=0.006), name


def test_all_scores_against_double_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(30, 7, generator=generator, dtype=torch.float64).softmax(-1) * 0.9
    rows = torch.randn(30, 7, 5, generator=generator, dtype=torch.float64)
    center = torch.randn(5, generator=generator, dtype=torch.float64)
    found = {name: branch_score(name, probs.log(), rows, center) for name in BRANCH_SCORES}
    for position in range(30):
        p, e = probs[position].tolist(), rows[position] - center
        h = -sum(x * math.log(x) for x in p)
        own = sum(x * x for x in p)
        total = sum(
            p[i] * p[j] * float(torch.dot(e[i], e[j]) / (e[i].norm() * e[j].norm()))
            for i in range(7)
            for j in range(7)
        )
        expected = {
            "entropy": h, "cosine_paper": -total, "cosine_code": own - total,
            "semantic_paper": -total * h, "semantic_code": (own - total) * h,
            "semantic_rao": (sum(p) ** 2 - total) * h,
        }  # fmt: skip
        for name, value in expected.items():
            assert float(found[name][position]) == pytest.approx(value, abs=1e-9), name


def test_divergence_is_a_spread() -> None:
    generator = torch.Generator().manual_seed(2)
    logprobs = torch.randn(50, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    rows = torch.randn(50, 6, 4, generator=generator, dtype=torch.float64)
    value = divergence(logprobs, rows)
    assert float(value.min()) > 0
    order = torch.randperm(6, generator=generator)
    assert torch.allclose(divergence(logprobs[:, order], rows[:, order]), value)
    assert torch.allclose(divergence(logprobs, 7 * rows), value), "lengths must not matter"
    same = rows[:, :1].expand(50, 6, 4)
    assert float(divergence(logprobs, same).abs().max()) < 1e-12
    basis = torch.eye(6, dtype=torch.float64).expand(50, 6, 6)
    simpson = 1 - logprobs.exp().square().sum(-1)
    assert torch.allclose(divergence(logprobs, basis), simpson)


def test_centring_finds_the_differences_behind_a_common_part() -> None:
    rows = torch.eye(4, dtype=torch.float64) + 20.0
    logprobs = torch.full((1, 4), 0.25, dtype=torch.float64).log()
    plain = float(divergence(logprobs, rows[None]))
    centred = float(divergence(logprobs, rows[None], rows.mean(0)))
    assert plain < 0.01
    assert centred == pytest.approx(1.0)  # the four rest vectors add up to nothing


def test_impossible_candidates_do_not_count() -> None:
    logprobs = torch.tensor([[0.0, -torch.inf]])
    assert float(candidate_entropy(logprobs)) == 0.0
    assert float(resultant(logprobs, torch.eye(2)[None])) == 1.0


def test_chunks_change_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(40, 8, generator=generator)
    ids = torch.randint(40, (600, 5), generator=generator)
    logprobs = torch.randn(600, 5, generator=generator).log_softmax(-1)
    whole = divergence(logprobs, table[ids])
    assert torch.equal(by_chunks(divergence, ids, logprobs, table), whole)
    assert by_chunks(divergence, ids[:0], logprobs[:0], table).shape == (0,)


def test_an_unknown_score() -> None:
    with pytest.raises(ValueError, match="semantic_rao"):
        branch_score("semantic", torch.zeros(1, 1), torch.ones(1, 1, 1))  # type: ignore[arg-type]
