"""Exact nearest neighbours (faiss), and hard negatives mined with them.

Shape legend: ``Q`` queries, ``C`` vectors in the corpus, ``d`` dimensions, ``K`` neighbours a
query. A *place* is a row of the corpus.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_FOUND = 1 << 22  # neighbours that one call of faiss may return: 50 MB


class Mined(NamedTuple):
    """Hard negatives of each query.

    Args:
        negatives: Q lists of places, the hardest first; at most ``count`` each, maybe none.
        num_dropped_by_margin: Candidates that ``absolute_margin``, ``relative_margin``,
            ``max_score`` and ``min_score`` dropped, under these names. The limits act in this
            order, and a candidate counts for the first that drops it.
        num_short: Queries with fewer than ``count`` negatives.
    """

    negatives: list[list[int]]
    num_dropped_by_margin: dict[str, int]
    num_short: int


def top_k(
    queries: Tensor, corpus: Tensor, k: int, *, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """The k corpus vectors with the largest inner product, found by comparing all of them.

    Computed by faiss in float32 on the CPU. Of equal scores the lower place comes first, also
    where only some of them are among the k, and equal vectors have equal scores; faiss itself
    promises neither. The order of scores that differ by rounding alone (about 1e-7 for cosines)
    may depend on the number of threads.

    Args:
        queries: ``(Q, d)``, on any device, of any float type.
        corpus: ``(C, d)``.
        k: Neighbours a query, 1 or more.
        normalize: Divide vectors by their length, so that scores are cosines.

    Returns:
        Scores ``(Q, K)``, float32, falling, and places ``(Q, K)``, int64, with ``K = min(k, C)``;
        both on the CPU.

    Raises:
        ValueError: Empty or mismatched shapes, vectors that are not finite, inner products beyond
            float32, or k below 1.

    Example:
        >>> corpus = torch.tensor([[0.0, 1.0], [3.0, 0.0], [1.0, 1.0]])
        >>> scores, places = top_k(torch.tensor([[1.0, 0.0]]), corpus, 2)
        >>> [round(score, 4) for score in scores[0].tolist()], places[0].tolist()
        ([1.0, 0.7071], [1, 2])
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    return _top_k(*_checked(queries, corpus, normalize), k)


def mine_negatives(
    queries: Tensor,
    corpus: Tensor,
    *,
    known: Sequence[Collection[int]],
    count: int,
    range_min: int = 0,
    range_max: int = 100,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    sampling: Literal["top", "random"] = "top",
    seed: int = 0,
) -> Mined:
    """Negatives that a model takes for answers, by cosine.

    The options are those of ``mine_hard_negatives`` of sentence-transformers; margins relative to
    the positive are those of NV-Retriever (arXiv 2407.15831). Known positives leave the ranking,
    and the ranks ``range_min <= rank < range_max`` of what is left are the candidates. With ``s+``
    as the cosine of the query and its first known positive, those go whose cosine is

    - above ``s+ - absolute_margin`` (negative margins let harder ones through, as Qwen3 Embedding,
      arXiv 2506.05176, does in its loss);
    - above ``s+ - |s+| relative_margin``, which is ``s+ (1 - relative_margin)`` for ``s+ > 0``;
    - above ``max_score`` or below ``min_score``.

    [our choice] sentence-transformers takes the ranks after the margins and, of several positives,
    the one with the lowest score.

    Args:
        queries: ``(Q, d)``.
        corpus: ``(C, d)``.
        known: For each query the places of all that answers it, its own positive first and, where
            the query is in the corpus itself, its own place too. These are never negatives.
        count: Negatives a query, 1 or more.
        range_min: Nearest candidates to skip.
        range_max: Rank at which the candidates end.
        absolute_margin: See above; None for none.
        relative_margin: See above; None for none.
        max_score: See above; None for none.
        min_score: See above; None for none.
        sampling: ``top`` for the nearest candidates, ``random`` for a draw among all of them.
        seed: Of that draw.

    Returns:
        The negatives, and what the limits did.

    Raises:
        ValueError: As ``top_k``; places that are not in the corpus, a query without a known
            positive (or with a set of several, which has no first one) although there is a margin,
            or options that cannot be.

    Example:
        >>> corpus = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.6], [0.0, 1.0]])
        >>> mine_negatives(corpus[:1], corpus, known=[[0]], count=2, absolute_margin=0.1)
        Mined(negatives=[[2, 3]], num_dropped_by_margin={'absolute_margin': 1, \
'relative_margin': 0, 'max_score': 0, 'min_score': 0}, num_short=0)
    """
    limits = {
        "absolute_margin": absolute_margin,
        "relative_margin": relative_margin,
        "max_score": max_score,
        "min_score": min_score,
    }
    _check_mining(limits, count, range_min, range_max, sampling)
    queries, corpus = _checked(queries, corpus, True)
    has_margin = absolute_margin is not None or relative_margin is not None
    _check_known(known, len(queries), len(corpus), has_margin)

    most_known = max(len(set(places)) for places in known)
    scores, places = _top_k(queries, corpus, range_max + most_known)
    unknown = ~is_in(places, known)
    ranks = unknown.cumsum(dim=1) - 1
    candidates = unknown & (ranks >= range_min) & (ranks < range_max)

    positive = torch.zeros(len(queries), 1, dtype=torch.float32)
    if has_margin:
        first = torch.tensor([int(next(iter(places))) for places in known])
        positive = (queries * corpus[first]).sum(dim=1, keepdim=True)
        own = places == first[:, None]  # where it was found: rounded as an equal candidate's
        positive = (
            torch.where(own, scores, 0.0)
            .sum(dim=1, keepdim=True)
            .where(own.any(dim=1, keepdim=True), positive)
        )
    dropped = {}
    for name, limit in limits.items():
        out = torch.zeros_like(candidates)
        if limit is not None:
            out = candidates & _beyond(name, limit, scores, positive)
        candidates = candidates & ~out
        dropped[name] = int(out.sum())

    order = ranks.double()
    if sampling == "random":
        order = torch.rand(ranks.shape, generator=torch.Generator().manual_seed(seed)).double()
    order = order.masked_fill(~candidates, math.inf)
    chosen = order.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values  # hardest first
    rows = zip(places.gather(1, chosen), candidates.gather(1, chosen), strict=True)
    negatives = [found[valid].tolist() for found, valid in rows]
    return Mined(negatives, dropped, sum(len(found) < count for found in negatives))


def is_in(places: Tensor, members: Sequence[Collection[int]]) -> Tensor:
    """Which places of a row are among that row's members.

    Args:
        places: ``(Q, K)``, integers from 0.
        members: Q collections of integers from 0.

    Returns:
        ``(Q, K)`` bool.

    Raises:
        ValueError: Not one collection a row.

    Example:
        >>> is_in(torch.tensor([[0, 1], [0, 1]]), [[1, 5], ()])
        tensor([[False,  True],
                [False, False]])
    """
    if len(members) != len(places):
        raise ValueError(f"{len(members)} collections for {len(places)} rows of places")
    pairs = [(row, int(place)) for row, some in enumerate(members) for place in some]
    if not pairs or not places.numel():
        return torch.zeros(places.shape, dtype=torch.bool)
    row, place = torch.tensor(pairs).unbind(1)
    width = int(torch.maximum(places.max(), place.max())) + 1
    return torch.isin(places + width * torch.arange(len(places))[:, None], place + width * row)


def _top_k(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``top_k`` of checked float32 tensors.

    A matrix product may round the scores of equal vectors differently, so each vector is searched
    for once and then stands for all its places.
    """
    members = _equal_rows(corpus)
    if len(members) == len(corpus):
        return _top_k_distinct(queries, corpus, min(k, len(corpus)))
    distinct = corpus[torch.tensor([rows[0] for rows in members])]
    scores, found = _top_k_distinct(queries, distinct, min(k, len(distinct)))
    lists = []
    for row, vectors in zip(scores.tolist(), found.tolist(), strict=True):
        pairs: list[tuple[float, int]] = []
        for score, vector in zip(row, vectors, strict=True):
            if len(pairs) >= k and -score > pairs[-1][0]:
                break
            pairs += [(-score, place) for place in members[vector][:k]]
        lists.append(sorted(pairs)[:k])
    scores = torch.tensor([[-score for score, _ in pairs] for pairs in lists])
    return scores, torch.tensor([[place for _, place in pairs] for pairs in lists])


def _top_k_distinct(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``top_k`` for k up to C.

    One neighbour more than wanted shows whether a tie was cut; such rows are searched deeper.
    """
    scores = torch.empty(len(queries), k, dtype=torch.float32)  # whatever the default is
    places = torch.empty(len(queries), k, dtype=torch.long)
    rows, depth = torch.arange(len(queries)), k + 1
    while len(rows):
        depth = min(depth, len(corpus))
        cut = []
        for some in rows.split(max(1, _MAX_FOUND // depth)):
            found, at = _faiss(queries[some], corpus, depth)
            at, order = at.sort(dim=1)
            found, order = found.gather(1, order).sort(dim=1, descending=True, stable=True)
            at = at.gather(1, order)
            scores[some], places[some] = found[:, :k], at[:, :k]
            cut.append(some[found[:, -1] == found[:, k - 1]])
        if depth == len(corpus):
            break
        rows, depth = torch.cat(cut), 2 * depth
    if not scores.isfinite().all() or (places < 0).any():  # faiss has no place for NaN
        raise ValueError("inner products are too large for float32: normalise the vectors")
    return scores, places


def _equal_rows(vectors: Tensor) -> list[list[int]]:
    """Places of each distinct row, in order of the first ones."""
    members: dict[bytes, list[int]] = {}
    for place, row in enumerate(vectors.numpy()):
        members.setdefault(blake2b(row, digest_size=16).digest(), []).append(place)
    return list(members.values())


def _faiss(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and places ``(Q, k)`` in the order that faiss finds them; k is at most C."""
    logging.getLogger("faiss").setLevel(logging.WARNING)  # its loader tells of instruction sets
    import faiss  # takes time to import

    faiss.omp_set_num_threads(torch.get_num_threads())  # it may have an OpenMP of its own
    inner = faiss.METRIC_INNER_PRODUCT
    scores, places = faiss.knn(queries.numpy(), corpus.numpy(), k, metric=inner)
    return torch.from_numpy(scores), torch.from_numpy(places)


def _checked(queries: Tensor, corpus: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Both as contiguous float32 on the CPU, or a ValueError."""
    if queries.dim() != 2 or corpus.dim() != 2 or not queries.numel() or not corpus.numel():
        shapes = f"{tuple(queries.shape)} and {tuple(corpus.shape)}"
        raise ValueError(f"queries must be (Q, d) and corpus (C, d), not empty, got {shapes}")
    if queries.shape[1] != corpus.shape[1]:
        widths = f"{queries.shape[1]} and {corpus.shape[1]}"
        raise ValueError(f"queries and corpus must be of one width, got {widths}")
    made = []
    for name, given in (("queries", queries), ("corpus", corpus)):
        vectors = given.detach().to("cpu", torch.float32)
        finite = vectors.isfinite().all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"{name}[{row}] is not finite in float32")
        made.append((F.normalize(vectors, dim=1) if normalize else vectors).contiguous())
    return made[0], made[1]


def _check_mining(
    limits: dict[str, float | None], count: int, range_min: int, range_max: int, sampling: str
) -> None:
    """Refuse options that cannot be."""
    if not 0 <= range_min < range_max:
        raise ValueError(f"need 0 <= range_min < range_max, got {range_min} and {range_max}")
    if not 1 <= count <= range_max - range_min:
        most = range_max - range_min
        raise ValueError(f"count={count} must be 1 to range_max - range_min = {most}")
    if sampling not in ("top", "random"):
        raise ValueError(f"sampling={sampling!r} must be 'top' or 'random'")
    for name, limit in limits.items():
        if limit is not None and not math.isfinite(limit):
            raise ValueError(f"{name}={limit} must be finite, or None for none")


def _check_known(
    known: Sequence[Collection[int]], num_queries: int, num_places: int, has_margin: bool
) -> None:
    """Refuse positives that are not there, and positives without a first one if that counts."""
    if len(known) != num_queries:
        raise ValueError(f"known has {len(known)} entries for {num_queries} queries")
    for row, places in enumerate(known):
        strange = [place for place in places if not 0 <= place < num_places]
        if strange:
            raise ValueError(f"known[{row}] holds {strange[0]}, the corpus {num_places} vectors")
        if has_margin and not places:
            raise ValueError(f"known[{row}] is empty, but a margin needs a positive")
        if has_margin and isinstance(places, set | frozenset) and len(places) > 1:
            raise ValueError(f"known[{row}] is a set without a first positive: pass a list")


def _beyond(name: str, limit: float, scores: Tensor, positive: Tensor) -> Tensor:
    """Where scores ``(Q, K)`` break a limit; ``positive`` is ``(Q, 1)``."""
    if name == "absolute_margin":
        return scores > positive - limit
    if name == "relative_margin":
        return scores > positive - positive.abs() * limit
    return scores > limit if name == "max_score" else scores < limit
