"""The Triton back end, host side: chooses blocks, launches, joins. See ``triton_fwd`` and others.

No region or ``TopK`` up to 8: one stream over the vocabulary without logits. ``TopP``: chunks of
rows of float32 logits in a workspace, read by the row kernels. Larger ``TopK``: the PyTorch back
end, whose time is in matrix products too.

``interpret=True`` runs the same kernels on CPU tensors by Triton's interpreter (tests). The
decorators decide when the modules are imported: one process cannot do both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import torch_backend
from .problem import Coefficients, Problem, RegionStats, RowStats
from .regions import TopK, TopP
from .triton_bwd import fill_kernel
from .triton_fwd import forward_kernel, merge, merge_top
from .triton_region import nucleus_kernel, row_kernel
from .tuning import Config, choose_splits, get_config

#: The running top-K of the forward kernel is made for few tokens.
MOST_RUNNING = 8
#: The candidates' cutoff is lowered by so much in log-prob, for rounding.
MARGIN = 0.01
#: Whether the kernels were imported with TRITON_INTERPRET=1.
IS_INTERPRETED = not isinstance(forward_kernel, triton.runtime.jit.JITFunction)


def forward(problem: Problem, *, interpret: bool) -> RowStats:
    """Statistics of every row.

    Args:
        problem: ``(N, H)`` hidden states, ``(V, H)`` weight and so on, not float64.
        interpret: Run by the interpreter, on CPU tensors.

    Raises:
        RuntimeError: The kernels were imported for the other mode.
        TypeError: A dtype that the kernels do not compute in.
    """
    _check(problem, interpret)
    region = problem.region
    if isinstance(region, TopP):
        return _forward_in_chunks(problem, region)
    if region is not None and region.k > min(MOST_RUNNING, problem.vocab_limit):
        return torch_backend.forward(problem)
    return _forward_streaming(problem, region)


def fill(
    problem: Problem,
    stats: RowStats,
    coefficients: Coefficients,
    start: int,
    stop: int,
    v0: int,
    v1: int,
    out: Tensor,
    *,
    interpret: bool,
) -> None:
    """Write the gradient of the unscaled logits, rows ``start:stop`` and columns ``v0:v1``.

    Args:
        problem: The inputs.
        stats: Of the forward.
        coefficients: Row scalars; TopK members are not added here.
        start: First row.
        stop: Row after the last.
        v0: First column.
        v1: Column after the last, at most ``vocab_limit``.
        out: ``(stop - start, v1 - v0)`` contiguous, of any float dtype the kernels know.
        interpret: Run by the interpreter, on CPU tensors.

    Raises:
        RuntimeError: The kernels were imported for the other mode.
        ValueError: ``out`` has another shape or is not contiguous.
    """
    _check(problem, interpret)
    if out.shape != (stop - start, v1 - v0) or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}, not contiguous ({stop - start}, {v1 - v0})")
    if v1 > problem.vocab_limit:
        raise ValueError(f"columns {v0}:{v1} reach beyond vocab_limit={problem.vocab_limit}")
    if out.numel() == 0:
        return
    terms = {
        name: None if value is None else value.float().contiguous()
        for name, value in vars(coefficients).items()
        if name != "members"
    }
    region = stats.region if coefficients.region_flat is not None else None
    rows = stop - start
    blank = stats.row_max

    def launch(config: Config) -> None:
        num_row_blocks = triton.cdiv(rows, config.block_m)
        num_column_blocks = triton.cdiv(v1 - v0, config.block_n)
        fill_kernel[(num_row_blocks * num_column_blocks,)](
            *_sources(problem),
            stats.row_max,
            stats.log_sum,
            *(blank if value is None else value for value in terms.values()),
            blank if region is None else region.threshold,
            blank if region is None else region.tie_column,
            out,
            start,
            stop,
            v0,
            v1,
            *_sizes(problem),
            num_row_blocks,
            num_column_blocks,
            **_flags(problem, config),
            HAS_TILTED=terms["tilted"] is not None,
            HAS_EVERYWHERE=terms["everywhere"] is not None,
            HAS_REGION=region is not None,
            **_blocks(config),
        )

    flags = _key(problem, terms["tilted"], terms["everywhere"], region)
    shape = (rows, problem.hidden.shape[1], v1 - v0)
    dtype, device = problem.hidden.dtype, problem.hidden.device
    launch(get_config("backward", *shape, dtype, flags, device, launch))


# ------------------------------------------------------------------------------------- forward


def _forward_streaming(problem: Problem, region: TopK | None) -> RowStats:
    """Kernel F1 and the merge of its splits."""
    rows, width = problem.hidden.shape
    device = problem.hidden.device
    k = 0 if region is None else region.k

    def launch(config: Config) -> tuple[Tensor, ...]:
        num_row_blocks = triton.cdiv(rows, config.block_m)
        num_tiles = triton.cdiv(problem.vocab_limit, config.block_n)
        splits = config.splits or choose_splits(num_row_blocks, num_tiles, _processors(device))

        def new(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        parts = (
            *(new(splits, rows) for _ in range(3)),
            new(splits if problem.with_mean else 0, rows),
            new(splits if problem.with_argmax else 0, rows, kind=torch.int32),
            new(rows).fill_(torch.nan),  # shows, should no split own a target
            new(splits, rows, k),
            new(splits, rows, k, kind=torch.int32),
        )
        forward_kernel[(num_row_blocks * splits,)](
            *_sources(problem),
            *parts,
            rows,
            problem.vocab_limit,
            *_sizes(problem),
            num_row_blocks,
            splits,
            triton.cdiv(num_tiles, splits),
            **_flags(problem, config),
            WITH_MEAN=problem.with_mean,
            WITH_ARGMAX=problem.with_argmax,
            TOP=k,
            TOP_SLOTS=triton.next_power_of_2(max(k, 2)),
            **_blocks(config),
        )
        return parts

    flags = _key(problem, problem.with_mean, problem.with_argmax, k)
    shape = (rows, width, problem.vocab_limit)
    measure = launch if rows else None
    config = get_config(
        *("forward", *shape, problem.hidden.dtype, flags, device, measure), is_collective=True
    )
    if rows == 0:
        return torch_backend.join([], problem)
    return _join_splits(problem, region, launch(config), config)


def _join_splits(
    problem: Problem, region: TopK | None, parts: tuple[Tensor, ...], config: Config
) -> RowStats:
    part_max, part_sum, part_tilted, total, ids, target, top_values, top_ids = parts
    row_max, log_sum, entropy, shift = merge(part_max, part_sum, part_tilted)
    mean, argmax = row_max.new_empty(0), ids.new_empty(0, dtype=torch.int64)
    if problem.with_mean:
        num_tiles = triton.cdiv(problem.vocab_limit, config.block_n)
        step = triton.cdiv(num_tiles, len(part_max)) * config.block_n
        first = torch.arange(len(part_max), device=row_max.device) * step
        columns = (problem.vocab_limit - first).clamp(0, step)
        mean = (total + shift * columns[:, None]).sum(0) / problem.vocab_limit
        mean = torch.where(log_sum.isnan(), torch.nan, mean)
    if problem.with_argmax:
        is_best = part_max == part_max.amax(0)
        argmax = torch.where(is_best, ids, problem.vocab_limit - 1).amin(0).long()
    found = None
    if region is not None:
        values, columns = merge_top(top_values, top_ids, region.k, problem.vocab_limit)
        found = torch_backend.top_k_stats(region, columns, values - row_max[:, None], log_sum)
    return RowStats(
        row_max=row_max,
        log_sum=log_sum,
        target=target - row_max,
        entropy=entropy,
        mean=mean,
        argmax=argmax,
        region=found,
    )


def _forward_in_chunks(problem: Problem, region: TopP) -> RowStats:
    """Chunks of rows: a matrix product into a float32 workspace, then the row kernels."""
    width = problem.vocab_limit
    shape = (problem.num_rows, problem.hidden.shape[1], width)
    device = problem.hidden.device
    config = get_config("region", *shape, problem.hidden.dtype, _key(problem), device)
    capacity = min(config.capacity, width)
    rows = min(problem.num_rows, max(1, problem.workspace // (4 * (width + capacity))))
    logits = torch.empty((rows, width), dtype=torch.float32, device=device)
    scratch = torch.empty((rows, capacity), dtype=torch.float32, device=device)
    parts = []
    for start in range(0, problem.num_rows, max(1, rows)):
        stop = min(start + rows, problem.num_rows)
        chunk = logits[: stop - start]
        torch_backend.logits_block(problem, start, stop, 0, width, chunk)
        targets = problem.targets[start:stop].contiguous()
        parts.append(_nucleus_chunk(problem, region, targets, chunk, scratch, config))
    return torch_backend.join(parts, problem)


def _nucleus_chunk(
    problem: Problem,
    region: TopP,
    targets: Tensor,
    logits: Tensor,
    scratch: Tensor,
    config: Config,
) -> RowStats:
    """Statistics of rows whose logits ``(R, V')`` exist, by kernel R1."""
    rows, width = logits.shape
    capacity = scratch.shape[1]
    log_cut = math.log((1.0 - region.p) / width) - MARGIN

    def new(size: int = rows, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=kind, device=logits.device)

    row_max, log_sum, exp_total, entropy, target = (new() for _ in range(5))
    mean = new(rows if problem.with_mean else 0)
    argmax = new(rows if problem.with_argmax else 0, torch.int64)
    num_candidates, best_rejected = new(kind=torch.int32), new()
    row_kernel[(rows,)](
        *(logits, targets, row_max, log_sum, exp_total, entropy, target, mean, argmax),
        *(num_candidates, best_rejected, scratch, width, log_cut, capacity),
        WITH_MEAN=problem.with_mean,
        WITH_ARGMAX=problem.with_argmax,
        BLOCK=config.block_n,
        num_warps=config.warps,
    )
    inside, region_entropy, threshold = new(), new(), new()
    size, tie_column = new(kind=torch.int32), new(kind=torch.int32)
    tilt = torch.zeros_like(inside)
    nucleus_kernel[(rows,)](
        *(logits, row_max, exp_total, log_sum, num_candidates, best_rejected, scratch),
        *(inside, region_entropy, size, tilt, threshold, tie_column),
        *(width, log_cut, capacity, region.p, region.max_size or width),
        INCLUDE_TIES=region.ties == "include",
        WITH_TILT=region.preserve_mass,
        BLOCK=min(config.block_n, 1024),
        num_warps=min(config.warps, 4),
    )
    found = RegionStats(
        log_sum=inside,
        entropy=region_entropy,
        size=size,
        tilt=tilt,
        ids=targets.new_empty((rows, 0)),
        values=inside.new_empty((rows, 0)),
        threshold=threshold,
        tie_column=tie_column,
    )
    return RowStats(row_max, log_sum, target, entropy, mean, argmax, found)


# ----------------------------------------------------------------------------- shared arguments


def _check(problem: Problem, interpret: bool) -> None:
    """Refuse a mode the kernels were not imported for, and dtypes that they do not know."""
    if interpret and not IS_INTERPRETED:
        raise RuntimeError(
            "the kernels were imported for a GPU: set TRITON_INTERPRET=1 in the environment before "
            "the process imports them (one process cannot do both)"
        )
    if not interpret and IS_INTERPRETED:
        raise RuntimeError(
            "the kernels were imported with TRITON_INTERPRET=1, which runs them on a CPU: start a "
            "process without it, or use backend='interpret'"
        )
    known = (torch.float32, torch.bfloat16, torch.float16)
    if problem.hidden.dtype not in known:
        raise TypeError(f"the Triton kernels do not compute in {problem.hidden.dtype}")


def _sources(problem: Problem) -> tuple[Tensor, ...]:
    """Tensors every product kernel reads; what is missing is stood for by another."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    side_hidden, side_weight = problem.side_hidden, problem.side_weight
    return (
        hidden,
        weight,
        weight if problem.bias is None else problem.bias.detach().contiguous(),
        hidden if side_hidden is None else side_hidden.detach().contiguous(),
        weight if side_weight is None else side_weight.detach().contiguous(),
        problem.targets.contiguous(),
    )


def _sizes(problem: Problem) -> tuple[int | float, ...]:
    """Sizes, strides and the scale, in the kernels' order. Any strides work without a copy."""
    side_hidden = problem.side_hidden
    return (
        problem.hidden.shape[1],
        0 if side_hidden is None else side_hidden.shape[1],
        *problem.hidden.stride(),
        *problem.weight.stride(),
        1.0 / problem.temperature,
    )


def _flags(problem: Problem, config: Config) -> dict[str, Any]:
    """What is compiled into a product kernel."""
    is_single = problem.hidden.dtype == torch.float32
    is_exact = not is_single or torch.get_float32_matmul_precision() == "highest"
    return {
        "HAS_BIAS": problem.bias is not None,
        "HAS_SIDE": problem.side_hidden is not None,
        "HAS_SCALE": problem.temperature != 1.0,
        "EVEN": problem.hidden.shape[1] % config.block_k == 0,
        "UPCAST": IS_INTERPRETED,
        "PRECISION": "ieee" if is_exact else "tf32",
    }


def _blocks(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": min(config.block_k, 16),
        "GROUP": config.group,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _key(problem: Problem, *more: object) -> str:
    """Flags as a text for the measurements' keys."""
    given = (problem.bias, problem.side_hidden, *more)
    numbers = [int(v) if isinstance(v, bool | int) else int(v is not None) for v in given]
    return "".join(map(str, numbers))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
