"""The PyTorch back end: any device, memory bounded by a workspace.

Forward: chunks of rows, each over the whole vocabulary, so that a region can be found. Backward
(``fill``): a slice of the vocabulary for a block of rows; ``backward.py`` drives it. Elementwise
work goes over blocks that stay in a processor's cache. bfloat16 and float16 on a CPU are read in
pieces and computed in float32 [our choice: CPU kernels of those types are slow and round].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import FLOOR, Coefficients, Problem, RegionStats, RowStats
from .regions import TopK, TopP

#: Bytes that each thread of a CPU takes at once in elementwise work: they stay in its cache.
CACHE = 2**18
#: Bytes of logits for each thread of a CPU, where no fewer than ``LEAST_ROWS`` rows fit.
BLOCK = 2**20
#: Fewer rows make a matrix product slow.
LEAST_ROWS = 512
#: Rows of a nucleus are first looked for among so many largest logits, then by a full sort.
NUCLEUS_TRY = 512


def matmul_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out = left @ right`` with ``out`` float32 or float64, whatever the inputs are."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def logits_block(problem: Problem, start: int, stop: int, v0: int, v1: int, out: Tensor) -> None:
    """Write scaled logits of rows ``start:stop`` and columns ``v0:v1`` into ``out``.

    Args:
        problem: The inputs.
        start: First row.
        stop: Row after the last.
        v0: First column.
        v1: Column after the last.
        out: ``(stop - start, v1 - v0)`` of ``problem.dtype``.
    """
    hidden, weight = problem.hidden[start:stop], problem.weight[v0:v1]
    step = v1 - v0
    if weight.dtype != out.dtype and not weight.is_cuda:
        step = max(1, CACHE * 4 // (out.element_size() * weight.shape[1]))
    for c0 in range(0, v1 - v0, step):
        matmul_into(hidden, weight[c0 : c0 + step].T, out[:, c0 : c0 + step])
    if problem.side_hidden is not None and problem.side_weight is not None:
        out.addmm_(
            problem.side_hidden[start:stop].to(out.dtype),
            problem.side_weight[v0:v1].to(out.dtype).T,
        )
    if problem.bias is not None:
        out.add_(problem.bias[v0:v1])
    if problem.temperature != 1.0:
        out.mul_(1.0 / problem.temperature)


def cache_rows(width: int, block: Tensor) -> int:
    """Rows of ``block`` that elementwise work takes at once."""
    if block.is_cuda:
        return max(1, block.shape[0])
    threads = torch.get_num_threads()
    return max(threads, CACHE * threads // (width * block.element_size()))


def block_rows(problem: Problem, width: int, bound: int) -> int:
    """Rows of a block of logits: all that ``bound`` allows, or on a CPU what its caches hold.

    Args:
        problem: The inputs.
        width: Columns of the block.
        bound: Most rows that the workspace allows.
    """
    rows = max(1, min(problem.num_rows, bound))
    if problem.hidden.is_cuda or problem.hidden.dtype != problem.dtype:
        return rows  # types that are converted for every block want few blocks
    cached = BLOCK * torch.get_num_threads() // (width * problem.hidden.element_size())
    return min(rows, max(LEAST_ROWS, cached))


def forward(problem: Problem) -> RowStats:
    """Statistics of every row, the workspace bounding the logits that exist at once."""
    width, device = problem.vocab_limit, problem.hidden.device
    size = torch.finfo(problem.dtype).bits // 8
    # sorting and comparing take a few copies
    copies = 4 if isinstance(problem.region, TopP) else 2 if problem.region else 1
    bound = problem.workspace // (size * width * copies)
    is_narrow = bound < min(LEAST_ROWS, problem.num_rows) and not problem.hidden.is_cuda
    if is_narrow and width > 1024 and not isinstance(problem.region, TopP):
        from . import torch_stream  # imports this module

        return torch_stream.forward(problem)
    rows = block_rows(problem, width, bound)
    logits = torch.empty((rows, width), dtype=problem.dtype, device=device)
    parts = []
    for start in range(0, problem.num_rows, rows):
        stop = min(start + rows, problem.num_rows)
        chunk = logits[: stop - start]
        logits_block(problem, start, stop, 0, width, chunk)
        parts.append(chunk_stats(problem, problem.targets[start:stop], chunk))
    return join(parts, problem)


def join(parts: list[RowStats], problem: Problem) -> RowStats:
    """Statistics of chunks of rows, put together (also of none)."""
    if not parts:
        empty = problem.hidden.new_empty((1, problem.vocab_limit), dtype=problem.dtype)
        nobody = chunk_stats(problem, problem.targets.new_zeros(1), empty.zero_())
        return _take_none(nobody)
    if len(parts) == 1:
        return parts[0]
    regions = [part.region for part in parts]
    region = None
    if regions[0] is not None:
        region = RegionStats(*(torch.cat(v) for v in zip(*map(_values, regions), strict=True)))
    own = [_values(part)[:-1] for part in parts]
    return RowStats(*(torch.cat(v) for v in zip(*own, strict=True)), region)


def _values(stats: RowStats | RegionStats | None) -> list[Tensor]:
    return list(vars(stats).values())


def _take_none(stats: RowStats) -> RowStats:
    region = stats.region and RegionStats(*(v[:0] for v in _values(stats.region)))
    return RowStats(*(v[:0] for v in _values(stats)[:-1]), region)


def chunk_stats(problem: Problem, targets: Tensor, logits: Tensor) -> RowStats:
    """Statistics of rows whose logits exist. Overwrites ``logits`` with ``logits - max``.

    Args:
        problem: Says what is asked for; its rows are not read.
        targets: ``(R,)``.
        logits: ``(R, V')`` scaled logits in ``problem.dtype``.
    """
    rows, width = logits.shape
    row_max = logits.new_empty(rows)
    exp_sum, tilted_sum = torch.empty_like(row_max), torch.empty_like(row_max)
    mean = torch.empty_like(row_max) if problem.with_mean else row_max.new_empty(0)
    argmax = targets.new_empty(rows if problem.with_argmax else 0)
    step = cache_rows(width, logits)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        block = logits[part]
        torch.amax(block, 1, out=row_max[part])
        if problem.with_argmax:
            argmax[part] = block.argmax(1)
        block.sub_(row_max[part, None])
        if problem.with_mean:
            mean[part] = block.mean(1)
        exp = block.exp()
        torch.sum(exp, 1, out=exp_sum[part])
        # an impossible token (-inf) has p = 0 and adds nothing; 0 * -inf would be NaN
        exp.mul_(block.clamp(min=FLOOR))
        torch.sum(exp, 1, out=tilted_sum[part])
    log_sum = exp_sum.log()
    return RowStats(
        row_max=row_max,
        log_sum=log_sum,
        target=logits.gather(1, targets[:, None])[:, 0],
        entropy=log_sum - tilted_sum / exp_sum,
        mean=mean,
        argmax=argmax,
        region=region_stats(problem, logits, log_sum),
    )


# ------------------------------------------------------------------------------- trust regions


def region_stats(problem: Problem, relative: Tensor, log_sum: Tensor) -> RegionStats | None:
    """The region of every row of ``relative`` ``(R, V')``, logits minus their maximum."""
    region = problem.region
    if region is None:
        return None
    if isinstance(region, TopK):
        ids = largest(relative, region.k)
        return top_k_stats(region, ids, relative.gather(1, ids), log_sum)
    return _nucleus(region, relative, log_sum)


def largest(values: Tensor, k: int) -> Tensor:
    """Ids ``(R, k)`` of the k largest of each row, largest first, lowest id first among equals."""
    if k >= values.shape[1] or values.shape[1] <= 64:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    top, ids = values.topk(k, dim=1)
    # topk leaves open which of several equal values it takes
    repeated = (values == top[:, -1:]).sum(1) != (top == top[:, -1:]).sum(1)
    tied = (repeated | (top[:, 1:] == top[:, :-1]).any(1)).nonzero()[:, 0]
    if len(tied):
        order = values[tied].sort(dim=1, descending=True, stable=True).indices
        ids = ids.index_copy(0, tied, order[:, :k])
    return ids


def top_k_stats(region: TopK, ids: Tensor, values: Tensor, log_sum: Tensor) -> RegionStats:
    """Region statistics from the members of every row.

    Args:
        region: The region.
        ids: ``(R, K)``.
        values: ``(R, K)`` relative logits, largest first.
        log_sum: ``(R,)`` of the whole row.
    """
    inside, entropy, tilt = _inside(values, torch.ones_like(values))
    return RegionStats(
        log_sum=inside,
        entropy=log_sum.clone() if region.k == 1 else entropy,
        size=torch.full_like(ids[:, 0], region.k, dtype=torch.int32),
        tilt=tilt if region.preserve_mass else torch.zeros_like(tilt),
        ids=ids,
        values=values,
        threshold=values.new_empty(0),
        tie_column=ids.new_empty(0, dtype=torch.int32),
    )


def _inside(values: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum, entropy and tilt of weighted members; the largest value of each row is 0."""
    exp = values.exp() * count
    d = values.clamp(min=FLOOR)
    total = exp.sum(1)
    log_sum = total.log()
    entropy = log_sum - (exp * d).sum(1) / total
    log_q = d - log_sum[:, None]
    square = (2 * log_q).exp() * count
    tilt = (square * (log_q + entropy[:, None])).sum(1) / square.sum(1)
    return log_sum, entropy, tilt


def _nucleus(region: TopP, relative: Tensor, log_sum: Tensor) -> RegionStats:
    """The nucleus among the largest few where it fits, by a full sort where it does not."""
    rows, width = relative.shape
    tried = min(width, NUCLEUS_TRY)
    ordered = relative.topk(tried, dim=1).values
    size = _kept(region, ordered, log_sum)
    # the last value tried may go on among those not looked at
    edge = ordered.gather(1, (size - 1)[:, None].long())[:, 0] <= ordered[:, -1]
    is_short = edge & (tried < width)
    found = _threshold(region, relative, ordered, size)
    left = is_short.nonzero()[:, 0]
    step = max(1, rows // 8)
    for start in range(0, len(left), step):
        some = left[start : start + step]
        part = relative[some]
        whole = part.sort(dim=1, descending=True).values
        result = _threshold(region, part, whole, _kept(region, whole, log_sum[some]))
        for mine, theirs in zip(_values(found), _values(result), strict=True):
            if mine.numel():
                mine[some] = theirs
    return found


def _kept(region: TopP, ordered: Tensor, log_sum: Tensor) -> Tensor:
    """Number of leading values of ``ordered`` ``(R, T)`` with less than ``p`` before them."""
    mass = (ordered.double() - log_sum.double()[:, None]).exp().cumsum(1)
    size = 1 + (mass[:, :-1] < region.p).sum(1)
    return size.clamp(max=region.max_size) if region.max_size else size


def _threshold(region: TopP, relative: Tensor, ordered: Tensor, size: Tensor) -> RegionStats:
    """The region as a threshold and the last column that ties with it."""
    theta = ordered.gather(1, (size - 1)[:, None])
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    needed = size - (ordered > theta).sum(1)  # of those equal to theta
    equal = relative == theta
    present = equal.sum(1)
    if region.ties == "include":
        size, needed = size + present - needed, present
    is_cut = needed < present
    tie_column = torch.full_like(size, -1, dtype=torch.int32)  # no column ties
    cut = is_cut.nonzero()[:, 0]
    if len(cut):
        nth = equal[cut].cumsum(1, dtype=torch.int32) == needed[cut, None]
        tie_column[cut] = nth.int().argmax(1).int()
    # half-way to the next lower value, so that rounding of a recomputed logit flips nothing
    lower = torch.where(relative < theta, relative, -torch.inf).amax(1)
    between = torch.where(lower.isneginf(), theta[:, 0] - 1, (theta[:, 0] + lower) / 2)
    between = torch.where(between < theta[:, 0], between, lower)  # neighbours among floats
    count = (ordered > theta).to(ordered.dtype)
    first = rank == (count.sum(1, keepdim=True)).long()  # stands for all equal to theta
    count = torch.where(first, needed[:, None].to(ordered.dtype), count)
    inside, entropy, tilt = _inside(ordered, count)
    return RegionStats(
        log_sum=inside,
        entropy=entropy,  # of one token exactly 0; of a NaN row NaN
        size=size.int(),
        tilt=tilt if region.preserve_mass else torch.zeros_like(tilt),
        ids=size.new_empty((len(size), 0)),
        values=ordered.new_empty((len(size), 0)),
        threshold=torch.where(is_cut, theta[:, 0], between),
        tie_column=tie_column,
    )


# ------------------------------------------------------------------------------------- backward


def fill(
    problem: Problem,
    stats: RowStats,
    coefficients: Coefficients,
    start: int,
    stop: int,
    v0: int,
    v1: int,
    out: Tensor,
) -> None:
    """Write the gradient of the unscaled logits, rows ``start:stop`` and columns ``v0:v1``.

    Args:
        problem: The inputs.
        stats: Of the forward.
        coefficients: Row scalars; TopK members are not added here.
        start: First row.
        stop: Row after the last.
        v0: First column.
        v1: Column after the last.
        out: ``(stop - start, v1 - v0)`` of ``problem.dtype``.
    """
    logits_block(problem, start, stop, v0, v1, out)
    out.sub_(stats.row_max[start:stop, None])
    fill_relative(problem.targets, stats, coefficients, start, stop, v0, out)


def fill_relative(
    targets: Tensor,
    stats: RowStats,
    coefficients: Coefficients,
    start: int,
    stop: int,
    v0: int,
    out: Tensor,
) -> None:
    """As ``fill``, where ``out`` already holds the logits minus their row's maximum."""
    step = cache_rows(out.shape[1], out)
    for first in range(start, stop, step):
        rows = slice(first, min(first + step, stop))
        block = out[rows.start - start : rows.stop - start]
        _fill_block(stats, coefficients, rows, v0, block)
    column = targets[start:stop] - v0
    row = ((column >= 0) & (column < out.shape[1])).nonzero()[:, 0]
    out[row, column[row]] += coefficients.at_target[start:stop][row].to(out.dtype)


def _fill_block(
    stats: RowStats, coefficients: Coefficients, rows: slice, v0: int, block: Tensor
) -> None:
    def column(value: Tensor) -> Tensor:
        return value[rows, None]

    inside = None
    if coefficients.region_flat is not None and stats.region is not None:
        theta = column(stats.region.threshold)
        ids = torch.arange(v0, v0 + block.shape[1], device=block.device)
        tied = (block == theta) & (ids <= column(stats.region.tie_column))
        inside = (block > theta) | tied
    block.sub_(column(stats.log_sum))
    probability = block.exp()
    if coefficients.tilted is None and inside is None:
        torch.mul(probability, column(coefficients.flat), out=block)
    else:
        block.clamp_(min=FLOOR)
        factor = column(coefficients.flat)
        if coefficients.tilted is not None:
            factor = block.mul(column(coefficients.tilted)).add_(factor)
        if inside is not None:
            assert coefficients.region_flat is not None and coefficients.region_tilted is not None
            extra = torch.addcmul(
                column(coefficients.region_flat), column(coefficients.region_tilted), block
            )
            factor = factor + torch.where(inside, extra, 0.0)
        torch.mul(probability, factor, out=block)
    if coefficients.everywhere is not None:
        block.add_(column(coefficients.everywhere))
