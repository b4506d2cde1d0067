"""What the custom ops return, flat, and how rows are left out and put back."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .backward import Upstream, region_scale
from .problem import Problem, RegionStats, RowStats
from .regions import TopK, TopP, unpack_region

#: Outputs of the ops, in order. Those with gradients come first.
FIELDS = (
    *("lse", "logprob", "entropy", "mean_logprob", "region_entropy"),
    *("row_max", "log_sum", "target", "mean", "argmax"),
    *("region_log_sum", "region_entropy_raw", "region_size", "region_tilt"),
    *("region_ids", "region_values", "region_threshold", "region_tie_column"),
)
NUM_DIFFERENTIABLE = 5


def outputs_of(problem: Problem, stats: RowStats) -> list[Tensor]:
    """The ops' outputs, as ``FIELDS`` names them, for rows that are not ignored."""

    def empty(kind: torch.dtype = problem.dtype) -> Tensor:
        return stats.row_max.new_empty(0, dtype=kind)  # a new one each time: outputs never alias

    own = stats.region
    if own is None:
        region_entropy = empty()
        region = [empty(), empty(), empty(torch.int32), empty()]
        region += [empty(torch.int64), empty(), empty(), empty(torch.int32)]
    else:
        region_entropy = own.entropy * region_scale(problem, own.size)
        region = [value.contiguous() for value in vars(own).values()]
    return [
        stats.row_max + stats.log_sum,
        stats.target - stats.log_sum,
        stats.entropy,
        stats.mean - stats.log_sum if problem.with_mean else empty(),
        region_entropy,
        stats.row_max,
        stats.log_sum,
        stats.target,
        stats.mean,
        stats.argmax,
        *region,
    ]


def stats_of(outputs: list[Tensor], problem: Problem) -> RowStats:
    """The inverse of ``outputs_of``."""
    named = dict(zip(FIELDS, outputs, strict=True))
    return RowStats(
        row_max=named["row_max"],
        log_sum=named["log_sum"],
        target=named["target"],
        entropy=named["entropy"],
        mean=named["mean"],
        argmax=named["argmax"],
        region=None if problem.region is None else RegionStats(*outputs[10:]),
    )


def spread(values: list[Tensor], rows: Tensor | None, blank: list[Tensor]) -> list[Tensor]:
    """Put rows back in their places, zeros elsewhere.

    Args:
        values: Outputs of the rows that are not ignored.
        rows: Their numbers, or None for all rows.
        blank: Outputs of the full shapes; those without rows were not asked for.
    """
    if rows is None:
        return values
    return [
        full.zero_().index_copy_(0, rows, value) if full.shape[0] else full
        for value, full in zip(values, blank, strict=True)
    ]


def kept_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Numbers of the rows that are not ignored, or None for all."""
    is_kept = targets != ignore_index
    rows = is_kept.nonzero()[:, 0]
    return None if len(rows) == len(targets) else rows


def make_problem(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side_hidden: Tensor | None,
    side_weight: Tensor | None,
    temperature: float,
    vocab_limit: int,
    region: str,
    with_mean: bool,
    with_argmax: bool,
    workspace: int,
) -> Problem:
    """A ``Problem`` from the flat arguments of an op."""
    return Problem(
        hidden=hidden,
        weight=weight,
        targets=targets,
        bias=bias,
        side_hidden=side_hidden,
        side_weight=side_weight,
        temperature=temperature,
        vocab_limit=vocab_limit,
        region=unpack_region(region),
        with_mean=with_mean,
        with_argmax=with_argmax,
        workspace=workspace,
    )


def empty_outputs(
    targets: Tensor, dtype: torch.dtype, region: str, with_mean: bool, with_argmax: bool
) -> list[Tensor]:
    """Outputs of the right shapes and dtypes, values unset."""
    parsed = unpack_region(region)
    n = targets.shape[0]

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return targets.new_empty(shape, dtype=kind)

    mean = n if with_mean else 0
    own = n if parsed is not None else 0
    ids = (n, parsed.k) if isinstance(parsed, TopK) else (own, 0) if parsed else (0,)
    by_threshold = n if isinstance(parsed, TopP) else 0
    return [
        *(new(n), new(n), new(n), new(mean), new(own)),
        *(new(n), new(n), new(n), new(mean)),
        new(n if with_argmax else 0, kind=torch.int64),
        *(new(own), new(own), new(own, kind=torch.int32), new(own)),
        *(new(*ids, kind=torch.int64), new(*ids)),
        *(new(by_threshold), new(by_threshold, kind=torch.int32)),
    ]


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def upstream_of(grads: list[Tensor], with_entropy: bool, with_mean: bool, region: str) -> Upstream:
    """Name the gradients of the differentiable outputs; None where none is wanted."""
    lse, logprob, entropy, mean_logprob, own = grads
    return Upstream(
        lse=lse,
        logprob=logprob,
        entropy=entropy if with_entropy else None,
        mean_logprob=mean_logprob if with_mean else None,
        region=own if region else None,
    )


def check_targets(targets: Tensor, vocab_limit: int, vocabulary: int) -> None:
    """Refuse targets outside the vocabulary; on CUDA only under ``FUSED_CHECK=1`` (it waits).

    Raises:
        IndexError: Names the first and what is allowed.
    """
    if targets.is_cuda and os.environ.get("FUSED_CHECK") != "1":
        return
    wrong = ((targets < 0) | (targets >= vocab_limit)).nonzero()[:, 0]
    if len(wrong):
        limit = "" if vocab_limit == vocabulary else f" (vocab_limit of {vocabulary})"
        raise IndexError(
            f"target {int(targets[wrong[0]])} is outside the {vocab_limit} tokens of the "
            f"vocabulary{limit}: use ids in [0, {vocab_limit}), or ignore_index for rows to leave "
            f"out"
        )
