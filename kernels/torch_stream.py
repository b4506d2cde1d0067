"""Statistics of rows from slices of the vocabulary, merged.

For vocabularies so large that few whole rows fit the workspace: products of few rows are slow.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .problem import Problem, RegionStats, RowStats, rescaled_sums
from .regions import TopK
from .torch_backend import block_rows, chunk_stats, join, largest, logits_block, top_k_stats

#: Columns of a slice: wide enough for matrix products, narrow enough for the workspace.
WIDTH = 8192


def forward(problem: Problem) -> RowStats:
    """As ``torch_backend.forward``, without a region or with a TopK one that fits a slice."""
    size = torch.finfo(problem.dtype).bits // 8
    copies = 2 if problem.region else 1
    budget = problem.workspace // (size * copies)
    width = min(max(budget // max(1, problem.num_rows), 1024), WIDTH, problem.vocab_limit)
    rows = block_rows(problem, width, budget // width)
    space = torch.empty(rows * width, dtype=problem.dtype, device=problem.hidden.device)
    parts = []
    for start in range(0, problem.num_rows, rows):
        stop = min(start + rows, problem.num_rows)
        targets = problem.targets[start:stop]
        pieces = []
        for v0 in range(0, problem.vocab_limit, width):
            v1 = min(v0 + width, problem.vocab_limit)
            block = space[: (stop - start) * (v1 - v0)].view(stop - start, v1 - v0)
            logits_block(problem, start, stop, v0, v1, block)
            own = problem
            if isinstance(problem.region, TopK) and problem.region.k > v1 - v0:
                own = replace(problem, region=replace(problem.region, k=v1 - v0))
            pieces.append(chunk_stats(own, (targets - v0).clamp(0, v1 - v0 - 1), block))
        parts.append(_merged(problem, targets, width, pieces))
    return join(parts, problem)


def _merged(problem: Problem, targets: Tensor, width: int, pieces: list[RowStats]) -> RowStats:
    """Statistics of whole rows from those of slices of ``width`` columns, in order."""
    row_max = torch.stack([piece.row_max for piece in pieces])
    top = row_max.amax(0)
    offset = row_max - top
    is_dead = row_max.isneginf()  # all columns of the slice are impossible
    log_sums = torch.stack([piece.log_sum for piece in pieces])
    entropies = torch.stack([piece.entropy for piece in pieces])
    exp_sums, tilted_sums = rescaled_sums(row_max, log_sums, entropies, top)
    exp_sum = exp_sums.sum(0)
    log_sum = exp_sum.log()
    at_targets = torch.stack([piece.target for piece in pieces]) + offset
    at_targets = torch.where(is_dead, offset, at_targets)
    mean, argmax, region = pieces[0].mean, pieces[0].argmax, None
    if problem.with_mean:
        widths = torch.full_like(offset[:, :1], width)
        widths[-1] = problem.vocab_limit - width * (len(pieces) - 1)
        means = torch.stack([piece.mean for piece in pieces]) + offset
        mean = (torch.where(is_dead, offset, means) * (widths / problem.vocab_limit)).sum(0)
    if problem.with_argmax:
        first = (row_max == top).int().argmax(0)
        ids = torch.stack([piece.argmax for piece in pieces])
        argmax = ids.gather(0, first[None])[0] + first * width
    if isinstance(problem.region, TopK):
        region = _top_k(problem.region, pieces, offset, is_dead, width, log_sum)
    return RowStats(
        row_max=top,
        log_sum=log_sum,
        target=at_targets.gather(0, (targets // width)[None])[0],
        entropy=log_sum - tilted_sums.sum(0) / exp_sum,
        mean=mean,
        argmax=argmax,
        region=region,
    )


def _top_k(
    region: TopK,
    pieces: list[RowStats],
    offset: Tensor,
    is_dead: Tensor,
    width: int,
    log_sum: Tensor,
) -> RegionStats:
    """The K best of the slices' best; slices and their ids come in order, so ties stay right."""
    ids, values = [], []
    for number, piece in enumerate(pieces):
        assert piece.region is not None
        ids.append(piece.region.ids + number * width)
        own = piece.region.values + offset[number, :, None]
        values.append(torch.where(is_dead[number, :, None], -torch.inf, own))
    every_id, every = torch.cat(ids, 1), torch.cat(values, 1)
    best = largest(every, region.k)
    return top_k_stats(region, every_id.gather(1, best), every.gather(1, best), log_sum)
