"""Exact nearest neighbours among vectors that may lie on a disk.

Shape legend: ``Q`` queries, ``C`` vectors, ``d`` dimensions, ``K = min(k, C)`` neighbours.

Matrix products round the scores of equal vectors differently. So a few neighbours more than wanted
are found with them, block by block; their scores are then computed anew in a way that is the same
for every pair, and it is searched deeper wherever something left out could still belong to the
best. Products are torch's: ``faiss.knn`` took 12 times as long (faiss-cpu 1.15, one thread, 256
queries, 100,000 vectors of 384 dimensions).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 1 << 28  # of vectors that are compared at once
SPARE = 8  # neighbours more than wanted
SLACK = 1e-5  # of a score, relative to the lengths of its vectors: above float32's rounding
_MAX_FOUND = 1 << 22  # neighbours that are held at once: 50 MB
_MAX_QUERIES = 1024  # that are compared at once
_MAX_SCORES = 1 << 24  # products that are held at once: 64 MB
_MAX_GATHERED = 1 << 23  # numbers that are scored anew at once: 64 MB


def load_faiss() -> Any:
    """The package, with as many threads as torch has."""
    logging.getLogger("faiss").setLevel(logging.WARNING)  # its loader tells of instruction sets
    import faiss  # takes time to import

    faiss.omp_set_num_threads(torch.get_num_threads())  # it may have an OpenMP of its own
    return faiss


@torch.no_grad()
def exact_search(
    queries: Tensor,
    vectors: np.ndarray,
    k: int,
    *,
    longest: float | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k vectors with the largest inner product of each query.

    Of equal scores the lower place comes first, also where only some of them are among the k, and
    equal vectors have equal scores.

    Args:
        queries: ``(Q, d)``, of any float type, on any device; may be empty.
        vectors: ``(C, d)`` float32, finite, at least one; may be mapped from a file.
        k: Neighbours a query, 1 or more.
        longest: Length of the longest vector; None measures them.
        block_bytes: Of vectors that are in memory at a time.

    Returns:
        Scores ``(Q, K)``, float32, falling, and places ``(Q, K)``, int64, on the CPU.

    Raises:
        ValueError: k below 1, other widths, queries that are not finite, or inner products beyond
            float32.

    Example:
        >>> vectors = np.array([[0, 1], [1, 0], [1, 0]], dtype=np.float32)
        >>> exact_search(torch.tensor([[2.0, 1.0]]), vectors, 2)[1].tolist()
        [[1, 2]]
    """
    queries = checked_queries(queries, vectors.shape[1], k)
    if longest is None:
        longest = max(longest_of(block) for _, block in blocks_of(vectors, block_bytes))
    k = min(k, len(vectors))
    scores = torch.empty(len(queries), k, dtype=torch.float32)
    places = torch.empty(len(queries), k, dtype=torch.long)
    rows, depth = torch.arange(len(queries)), k + SPARE
    while len(rows):
        depth = min(depth, len(vectors))
        unsure = []
        for some in rows.split(max(1, min(_MAX_QUERIES, _MAX_FOUND // depth))):
            coarse, at = _coarse(queries[some], vectors, depth, block_bytes)
            exact, at = _rescored(queries[some], vectors, at)
            scores[some], places[some] = exact[:, :k], at[:, :k]
            # what was left out scores at most as the last one found, up to rounding
            slack = SLACK * queries[some].norm(dim=1) * longest
            unsure.append(some[coarse[:, -1] + slack >= exact[:, k - 1]])
        if depth == len(vectors):
            break
        rows, depth = torch.cat(unsure), 4 * depth
    return scores, places


def blocks_of(
    vectors: np.ndarray, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, np.ndarray]]:
    """Contiguous pieces of vectors, each with the place of its first one.

    Args:
        vectors: ``(C, d)``, maybe mapped.
        block_bytes: Of a piece at most, but one vector at least.
    """
    size = max(1, block_bytes // max(1, vectors.itemsize * vectors.shape[1]))
    for start in range(0, len(vectors), size):
        yield start, np.ascontiguousarray(vectors[start : start + size])


def longest_of(vectors: np.ndarray) -> float:
    """Length of the longest of some vectors.

    Args:
        vectors: ``(n, d)``, n at least 1.
    """
    squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    return float(np.sqrt(squares.max()))


def checked_queries(queries: Tensor, width: int, k: int) -> Tensor:
    """Queries as contiguous float32 on the CPU.

    Args:
        queries: ``(Q, d)``.
        width: What d must be.
        k: Neighbours, to be checked too.

    Raises:
        ValueError: Another shape, a number that is not finite, or k below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    if queries.dim() != 2 or queries.shape[1] != width:
        raise ValueError(f"queries must be (Q, {width}), got {tuple(queries.shape)}")
    made = queries.detach().to("cpu", torch.float32).contiguous()
    finite = made.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(f"queries[{int((~finite).nonzero()[0])}] is not finite in float32")
    return made


def ordered(scores: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Both ``(Q, n)`` by falling score, the lower place first among equal ones."""
    places, order = places.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, places.gather(1, order)


def _coarse(
    queries: Tensor, vectors: np.ndarray, depth: int, block_bytes: int
) -> tuple[Tensor, Tensor]:
    """The ``depth`` best of each query by products in float32, the best first."""
    scores, places = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    most = _MAX_SCORES // len(queries) * vectors[0].nbytes
    for start, block in blocks_of(vectors, min(block_bytes, most)):
        with _exact_products(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a mapped file cannot be written: fine
            found = queries @ torch.from_numpy(block).T
        found, at = found.topk(min(depth, len(block)), dim=1)
        if not found.isfinite().all():  # NaN counts as the largest
            raise ValueError("inner products are too large for float32: normalise the vectors")
        scores, places = torch.cat([scores, found], dim=1), torch.cat([places, at + start], dim=1)
        scores, kept = scores.topk(min(depth, scores.shape[1]), dim=1)
        places = places.gather(1, kept)
    return scores, places


@contextmanager
def _exact_products() -> Iterator[None]:
    """Inside the block products of float32 are float32, whatever training has asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rescored(queries: Tensor, vectors: np.ndarray, places: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of found places ``(Q, n)``, the same way for every pair, and both ordered."""
    flat = places.flatten()
    owners = torch.arange(len(queries)).repeat_interleave(places.shape[1])
    scores = torch.empty(len(flat), dtype=torch.float32)
    for pairs in torch.arange(len(flat)).split(max(1, _MAX_GATHERED // vectors.shape[1])):
        near = torch.from_numpy(vectors[flat[pairs].numpy()]).double()
        scores[pairs] = (near * queries[owners[pairs]].double()).sum(-1).float()
    return ordered(scores.view(places.shape), places)
