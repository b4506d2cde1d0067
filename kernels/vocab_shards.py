"""A vocabulary shared among ranks: each holds some rows of the weight.

Every rank has the same hidden states and targets and computes statistics of its own columns; they
are merged with one maximum and one sum over the ranks (and a gather for a TopK region). In the
backward pass each rank's slice of the weight's gradient is its own; the hidden states' gradient is
summed. A rank's share is named by its first token: equal shards are an assumption that breaks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .backward import Fill, Gradients, Upstream, backward, coefficients
from .problem import Problem, RowStats, rescaled_sums
from .regions import TopK
from .torch_backend import largest, top_k_stats


def find_group(name: str) -> Any:
    """The process group of a name (a custom op's schema cannot carry the group itself)."""
    return dist.distributed_c10d._resolve_process_group(name)


def group_name(process_group: Any) -> str:
    """Name of a process group; empty for None."""
    return "" if process_group is None else process_group.group_name


def own_columns(problem: Problem, start: int, group: Any) -> tuple[Problem, Tensor, int]:
    """This rank's part of a problem.

    Args:
        problem: With the whole vocabulary's ``vocab_limit`` (or this rank's number of rows where
            none was given) and targets.
        start: First token of this rank's rows.
        group: The ranks.

    Returns:
        The problem on this rank's columns, which targets are its own ``(N,)``, and the number of
        columns of all ranks.

    Raises:
        ValueError: A TopK region is larger than the whole vocabulary.
    """
    own = problem.vocab_limit
    total = torch.tensor(own, device=problem.hidden.device)
    dist.all_reduce(total, group=group)
    vocabulary = int(total)
    region = problem.region
    if isinstance(region, TopK):
        if region.k > vocabulary:
            raise ValueError(f"TopK(k={region.k}) exceeds the {vocabulary} tokens of all ranks")
        region = replace(region, k=min(region.k, own))
    local = problem.targets - start
    is_mine = (local >= 0) & (local < own)
    part = replace(problem, targets=torch.where(is_mine, local, 0), region=region)
    return part, is_mine, vocabulary


def merge(
    stats: RowStats, problem: Problem, is_mine: Tensor, start: int, vocabulary: int, group: Any
) -> RowStats:
    """Statistics of whole rows from those of every rank's columns.

    Args:
        stats: Of this rank's columns.
        problem: The whole problem.
        is_mine: ``(N,)`` whether the target is this rank's.
        start: First token of this rank's rows.
        vocabulary: Columns of all ranks.
        group: The ranks.
    """
    top = stats.row_max.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    is_dead = stats.row_max.isneginf()  # all of this rank's columns are impossible
    sums = [
        *rescaled_sums(stats.row_max, stats.log_sum, stats.entropy, top),
        torch.where(is_mine, stats.target + stats.row_max - top, 0.0),
    ]
    if problem.with_mean:
        sums.append((stats.mean + stats.row_max - top) * (problem.vocab_limit / vocabulary))
    stacked = torch.stack(sums)
    dist.all_reduce(stacked, group=group)
    log_sum = stacked[0].log()
    argmax = stats.argmax
    if problem.with_argmax:
        ids = torch.where(stats.row_max == top, stats.argmax + start, torch.iinfo(torch.int64).max)
        dist.all_reduce(ids, dist.ReduceOp.MIN, group=group)
        argmax = ids
    merged = RowStats(
        row_max=top,
        log_sum=log_sum,
        target=stacked[2].clone(),
        entropy=log_sum - stacked[1] / stacked[0],
        mean=stacked[3].clone() if problem.with_mean else stats.mean,
        argmax=argmax,
        region=None,
    )
    if isinstance(problem.region, TopK) and stats.region is not None:
        values = stats.region.values + (stats.row_max - top)[:, None]
        values = torch.where(is_dead[:, None], -torch.inf, values)
        merged.region = _merge_top_k(
            problem.region, stats.region.ids + start, values, log_sum, group
        )
    return merged


def _merge_top_k(region: TopK, ids: Tensor, values: Tensor, log_sum: Tensor, group: Any) -> Any:
    """The K best of every rank's best; ids are tokens of the whole vocabulary."""
    world = dist.get_world_size(group)
    widths = [torch.zeros((), dtype=torch.int64, device=ids.device) for _ in range(world)]
    dist.all_gather(widths, torch.tensor(ids.shape[1], device=ids.device), group=group)
    width = max(int(one) for one in widths)
    missing = width - ids.shape[1]
    ids = torch.nn.functional.pad(ids, (0, missing), value=torch.iinfo(torch.int64).max)
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    all_ids = [torch.empty_like(ids) for _ in range(world)]
    all_values = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(all_ids, ids.contiguous(), group=group)
    dist.all_gather(all_values, values.contiguous(), group=group)
    every_id, every = torch.cat(all_ids, 1), torch.cat(all_values, 1)
    order = every_id.argsort(dim=1, stable=True)  # so that the lowest id wins among equals
    every_id, every = every_id.gather(1, order), every.gather(1, order)
    best = largest(every, region.k)
    return top_k_stats(region, every_id.gather(1, best), every.gather(1, best), log_sum)


def backward_of_rank(
    problem: Problem,
    stats: RowStats,
    upstream: Upstream,
    needs: list[bool],
    fill: Fill,
    start: int,
    group: Any,
) -> Gradients:
    """Gradients of this rank's rows of the weight, and of the hidden states summed over ranks."""
    total = torch.tensor(problem.vocab_limit, device=problem.hidden.device)
    dist.all_reduce(total, group=group)
    coefs = coefficients(replace(problem, vocab_limit=int(total)), stats, upstream)
    own = replace(problem, targets=problem.targets - start)  # other ranks' match no column
    if stats.region is not None:
        stats = replace(stats, region=replace(stats.region, ids=stats.region.ids - start))
    found = backward(own, stats, coefs, needs, fill)
    for value in (found.hidden, found.side_hidden):
        if value is not None:
            dist.all_reduce(value, group=group)
    return found
