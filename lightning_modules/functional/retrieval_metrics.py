"""How good a ranking is (nDCG, MRR, recall, MAP) and how well cosines follow human scores.

The values are those of torchmetrics. It sees one query at a time, as scores and marks of what was
*retrieved*, so it needs help in three places:

- answers that were not retrieved are appended below all else, or nDCG and recall would not know
  that they exist;
- its mean average precision divides by the answers that were retrieved, where others divide by all
  of them (trec_eval and MTEB): the product with the recall at the same rank puts that right;
- it takes scores of 0 and below for "not retrieved": scores are replaced by descending ranks.

A metric at k depends on nothing but which of the first k are answers and on how many answers there
are. Queries that agree in both are computed once; with one answer a query, few differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_normalized_dcg,
    retrieval_precision,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from lightning_modules.functional.search import is_in

_NO_SPREAD = 1e-6  # cosines of a collapsed model differ by rounding in float32 alone


def retrieval_metrics(
    scores: Tensor,
    places: Tensor,
    relevant: Sequence[Collection[int]],
    *,
    ks: Sequence[int] = (1, 10),
) -> dict[str, float]:
    """Means over the queries of nDCG, MRR and the like, for answers that are right or wrong.

    Pass the K best of the corpus, with K at least 100 (and at least the largest of ``ks``) or all
    of it: a metric at k over fewer counts what is missing as wrong. Of equal scores the lower
    place ranks first, as in ``top_k`` [our choice; trec_eval sorts by name, torchmetrics averages
    in nDCG alone].

    Args:
        scores: ``(Q, K)``, the higher the better, any sign.
        places: ``(Q, K)`` integers from 0, different within a row.
        relevant: For each query the places of all its answers, retrieved or not; at least one.
        ks: Ranks of the recall.

    Returns:
        ``ndcg_at_10``, ``mrr_at_10``, ``map_at_100``, ``precision_at_1`` (share of the queries with
        an answer on top) and a ``recall_at_<k>`` (share of the answers) for each of ``ks``.

    Raises:
        ValueError: Shapes that do not fit, scores that are not finite, a place that stands twice
            in a row, a query without an answer, a negative place, or ``ks`` that cannot be.

    Example:
        >>> found = retrieval_metrics(
        ...     torch.tensor([[0.9, 0.8, -0.1]]), torch.tensor([[4, 2, 7]]), [{2, 5}]
        ... )
        >>> found["mrr_at_10"], found["recall_at_10"], found["map_at_100"]  # 5 was not found
        (0.5, 0.5, 0.25)
    """
    _check(scores, places, relevant, ks)
    scores, places = scores.detach().cpu(), places.detach().cpu()
    answers = [{int(place) for place in some} for some in relevant]
    places, order = places.sort(dim=1)
    order = scores.gather(1, order).argsort(dim=1, descending=True, stable=True)
    hits = is_in(places.gather(1, order), answers)
    totals = torch.tensor([len(some) for some in answers])
    return {
        "ndcg_at_10": _mean(retrieval_normalized_dcg, hits, totals, 10),
        "mrr_at_10": _mean(retrieval_reciprocal_rank, hits, totals, 10),
        "map_at_100": _mean(_average_precision, hits, totals, 100),
        "precision_at_1": _mean(retrieval_precision, hits, totals, 1),
        **{f"recall_at_{k}": _mean(retrieval_recall, hits, totals, k) for k in ks},
    }


def sts_metrics(first: Tensor, second: Tensor, scores: Tensor) -> dict[str, float]:
    """Correlation of the cosines of pairs with scores that people gave.

    Args:
        first: ``(N, d)``, one vector of each pair.
        second: ``(N, d)``, the other.
        scores: ``(N,)``, in any unit.

    Returns:
        ``spearman`` and ``pearson``, from -1 to 1. Both are 0 if all cosines are the same, as those
        of a collapsed model are: that says nothing about any pair [our choice].

    Raises:
        ValueError: Shapes that do not fit, fewer than 2 pairs, values that are not finite, or
            scores that are all the same, which nothing can follow.

    Example:
        >>> first, second = torch.eye(2)[[0, 0, 0]], torch.tensor([[1.0, 0.0], [1, 1], [0, 1]])
        >>> sts_metrics(first, second, torch.tensor([5.0, 1.0, 0.0]))["spearman"] > 0.9999
        True
    """
    if first.dim() != 2 or first.shape != second.shape or scores.shape != first.shape[:1]:
        shapes = f"{tuple(first.shape)}, {tuple(second.shape)} and {tuple(scores.shape)}"
        raise ValueError(f"first and second must be (N, d) and scores (N,), got {shapes}")
    if len(scores) < 2:
        raise ValueError(f"a correlation needs 2 pairs or more, got {len(scores)}")
    # float64: in float32 torchmetrics gives NaN for thousands of pairs with one far outlier
    one, two, given = (x.detach().to("cpu", torch.float64) for x in (first, second, scores))
    for name, values in (("first", one), ("second", two), ("scores", given)):
        if not values.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if given.min() == given.max():
        raise ValueError(f"all {len(given)} scores are {given[0].item():g}: nothing to follow")
    cosines = (F.normalize(one, dim=1) * F.normalize(two, dim=1)).sum(dim=1)
    if cosines.max() - cosines.min() < _NO_SPREAD:  # NaN in torchmetrics, or the order of rounding
        return {"spearman": 0.0, "pearson": 0.0}
    return {
        "spearman": float(spearman_corrcoef(cosines, given)),
        "pearson": float(pearson_corrcoef(cosines, given)),
    }


def _mean(metric: Callable[..., Tensor], hits: Tensor, totals: Tensor, k: int) -> float:
    """Mean of a metric at k over the queries.

    Args:
        metric: ``(preds, target, top_k)`` of one query to a 0-d tensor.
        hits: ``(Q, K)`` bool: whether what is at a rank is an answer.
        totals: ``(Q,)``: how many answers there are.
        k: Ranks beyond it do not count.
    """
    first = F.pad(hits[:, :k], (0, max(0, k - hits.shape[1])))  # wrong ones up to rank k
    patterns, counts = torch.cat([first, totals[:, None]], 1).unique(dim=0, return_counts=True)
    longest = k + int(totals.max())
    ranks = torch.arange(longest, 0, -1, dtype=torch.float32)  # missed answers from k on
    values = []
    for *marks, total in patterns.tolist():
        target = torch.tensor(marks + [1] * (total - sum(marks)))
        values.append(metric(ranks[: len(target)], target, top_k=k))
    return float((torch.stack(values).double() * counts).sum() / len(hits))


def _average_precision(preds: Tensor, target: Tensor, top_k: int) -> Tensor:
    """Average precision over all answers; torchmetrics' own is over the retrieved ones."""
    precision = retrieval_average_precision(preds, target, top_k=top_k)
    return precision * retrieval_recall(preds, target, top_k=top_k)


def _check(
    scores: Tensor, places: Tensor, relevant: Sequence[Collection[int]], ks: Sequence[int]
) -> None:
    """Refuse what would give silent nonsense."""
    if scores.dim() != 2 or scores.shape != places.shape or not scores.numel():
        shapes = f"{tuple(scores.shape)} and {tuple(places.shape)}"
        raise ValueError(f"scores and places must be of one shape (Q, K), not empty, got {shapes}")
    if not scores.isfinite().all():
        raise ValueError("scores holds values that are not finite")
    if places.is_floating_point() or places.dtype == torch.bool or places.min() < 0:
        raise ValueError(f"places must hold integers from 0, got {places.dtype}")
    ordered = places.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if twice.any():
        raise ValueError(f"places[{int(twice.nonzero()[0])}] holds a place twice")
    if len(relevant) != len(places):
        raise ValueError(f"relevant has {len(relevant)} entries for {len(places)} queries")
    for row, answers in enumerate(relevant):
        if not answers or min(answers) < 0:
            raise ValueError(f"relevant[{row}] must hold at least one place, all from 0")
    if len(set(ks)) < len(ks) or any(k < 1 for k in ks):
        raise ValueError(f"ks={list(ks)} must be different numbers from 1")
