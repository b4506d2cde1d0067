"""The same quantities from logits that already exist, as a custom operator.

A block of rows at a time, so that no copy of all logits is made in float32. PyTorch on every device
[our choice: small heads, rollouts and diagnostics, where the logits are there anyway].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import torch_backend
from .backward import add_members, coefficients
from .fields import (
    NUM_DIFFERENTIABLE,
    accumulator_dtype,
    check_targets,
    empty_outputs,
    kept_rows,
    make_problem,
    outputs_of,
    spread,
    stats_of,
    upstream_of,
)
from .problem import Problem


@torch.library.custom_op("litpost::logits_head", mutates_args=())
def logits_head(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    ignore_index: int,
    region: str,
    entropy_grad: bool,
) -> list[Tensor]:
    """Row quantities of ``FIELDS`` from ``logits (N, V)``, a block of rows at a time."""
    problem = _logits_problem(logits, targets, temperature, region)
    rows = kept_rows(targets, ignore_index)
    own = targets if rows is None else targets[rows]
    check_targets(own, logits.shape[1], logits.shape[1])
    step = _logits_rows(problem)
    parts = []
    for start in range(0, len(own), step):
        some = slice(start, start + step)  # rows are gathered a block at a time
        chunk = logits[some if rows is None else rows[some]].to(problem.dtype, copy=True)
        if temperature != 1.0:
            chunk.mul_(1.0 / temperature)
        parts.append(torch_backend.chunk_stats(problem, own[some], chunk))
    stats = torch_backend.join(parts, problem)
    blank = empty_outputs(targets, problem.dtype, region, False, False)
    return spread(outputs_of(problem, stats), rows, blank)


def _logits_problem(logits: Tensor, targets: Tensor, temperature: float, region: str) -> Problem:
    """The logits stand in the place of hidden states."""
    return make_problem(
        *(logits, logits, targets, None, None, None, temperature, logits.shape[1]),
        *(region, False, False, 16 * 2**20),
    )


def _logits_rows(problem: Problem) -> int:
    size = torch.finfo(problem.dtype).bits // 8
    return max(1, problem.workspace // (size * problem.vocab_limit))


@logits_head.register_fake
def _logits_head_fake(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    ignore_index: int,
    region: str,
    entropy_grad: bool,
) -> list[Tensor]:
    return empty_outputs(targets, accumulator_dtype(logits), region, False, False)


def _logits_gradient(
    logits: Tensor,
    targets: Tensor,
    outputs: list[Tensor],
    grads: list[Tensor],
    temperature: float,
    ignore_index: int,
    region: str,
    entropy_grad: bool,
    out: Tensor,
) -> None:
    """Write the gradient of the logits into ``out``, which may be the logits themselves."""
    problem = _logits_problem(logits, targets, temperature, region)
    stats = stats_of(outputs, problem)
    coefs = coefficients(problem, stats, upstream_of(grads, entropy_grad, False, region))
    is_kept = targets != ignore_index
    step = _logits_rows(problem)
    safe = torch.where(is_kept, targets, -1)  # matches no column
    for start in range(0, problem.num_rows, step):
        stop = min(start + step, problem.num_rows)
        block = logits[start:stop].to(problem.dtype, copy=True)
        if temperature != 1.0:
            block.mul_(1.0 / temperature)
        block.sub_(stats.row_max[start:stop, None])
        torch_backend.fill_relative(safe, stats, coefs, start, stop, 0, block)
        add_members(coefs, stats, start, stop, 0, block)
        out[start:stop] = torch.where(is_kept[start:stop, None], block, 0.0).to(out.dtype)


@torch.library.custom_op("litpost::logits_head_backward", mutates_args=())
def logits_head_backward(
    logits: Tensor,
    targets: Tensor,
    outputs: list[Tensor],
    grads: list[Tensor],
    temperature: float,
    ignore_index: int,
    region: str,
    entropy_grad: bool,
) -> Tensor:
    """Gradient of ``logits``."""
    result = torch.empty_like(logits)
    _logits_gradient(
        *(logits, targets, outputs, grads, temperature, ignore_index, region, entropy_grad),
        out=result,
    )
    return result


@logits_head_backward.register_fake
def _logits_head_backward_fake(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


def _logits_head_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output)
    ctx.options = inputs[2:]


def _logits_head_grad(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    logits, targets, *outputs = ctx.saved_tensors
    own = list(grads[:NUM_DIFFERENTIABLE])
    return (logits_head_backward(logits, targets, outputs, own, *ctx.options), *[None] * 5)


logits_head.register_autograd(_logits_head_grad, setup_context=_logits_head_setup)


class LogitsHeadInPlace(torch.autograd.Function):
    """``logits_head`` whose backward pass overwrites the logits with their gradient.

    Whatever made the logits must not need their values any more (a linear layer does not).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, ...]:
        """As ``logits_head``, outputs as a tuple."""
        outputs = logits_head(logits, targets, *options)
        ctx.save_for_backward(targets, *outputs)
        ctx.logits, ctx.options = logits.detach(), options
        ctx.mark_non_differentiable(*outputs[NUM_DIFFERENTIABLE:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Fill the logits with their gradient; a second backward raises."""
        if torch.is_grad_enabled():  # once_differentiable lets a constant upstream gradient pass
            raise RuntimeError("inplace_backward=True has no second derivative: no create_graph")
        targets, *outputs = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        if logits is None:
            raise RuntimeError(
                "inplace_backward=True: the logits were overwritten by the first backward pass; "
                "use inplace_backward=False to go through it twice"
            )
        own = list(grads[:NUM_DIFFERENTIABLE])
        _logits_gradient(logits, targets, list(outputs), own, *ctx.options, out=logits)
        return (logits, None, *[None] * len(ctx.options))
