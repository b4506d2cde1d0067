"""The fused head as a custom operator: opaque to ``torch.compile``, with its own backward.

``litpost::linear_head`` gives, for every row, quantities that gradients flow through (``lse``,
``logprob``, ``entropy``, ``mean_logprob``, ``region_entropy``) and what the backward pass needs to
find the same region again. Ignored rows are left out before anything is multiplied; they may hold
NaN.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import torch_backend, vocab_shards
from .backward import Gradients, backward, coefficients
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


def _backend(name: str) -> tuple[Any, Any]:
    """Functions ``forward(problem)`` and ``fill`` of a back end."""
    if name == "torch":
        return torch_backend.forward, torch_backend.fill
    from . import triton_backend

    interpret = name == "interpret"
    return (
        partial(triton_backend.forward, interpret=interpret),
        partial(triton_backend.fill, interpret=interpret),
    )


@torch.library.custom_op("litpost::linear_head", mutates_args=())
def linear_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side_hidden: Tensor | None,
    side_weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_limit: int,
    region: str,
    entropy_grad: bool,
    with_mean: bool,
    with_argmax: bool,
    workspace: int,
    backend: str,
    group: str,
    vocab_start: int,
) -> list[Tensor]:
    """Row quantities of ``FIELDS`` from ``hidden (N, H)`` and ``weight (V, H)``.

    With ``group`` (its name) the weight is this rank's rows, from token ``vocab_start`` on.

    Raises:
        IndexError: A target is outside the vocabulary (not checked on CUDA, which would wait).
    """
    problem = make_problem(
        *(hidden, weight, targets, bias, side_hidden, side_weight, temperature, vocab_limit),
        *(region, with_mean, with_argmax, workspace),
    )
    rows = kept_rows(targets, ignore_index)
    part = problem if rows is None else problem.rows(rows)
    forward = _backend(backend)[0]
    if group:
        ranks = vocab_shards.find_group(group)
        own, is_mine, vocabulary = vocab_shards.own_columns(part, vocab_start, ranks)
        check_targets(part.targets, vocabulary, vocabulary)
        stats = vocab_shards.merge(forward(own), part, is_mine, vocab_start, vocabulary, ranks)
        part.vocab_limit = vocabulary
    else:
        check_targets(part.targets, vocab_limit, weight.shape[0])
        stats = forward(part)
    blank = empty_outputs(targets, part.dtype, region, with_mean, with_argmax)
    return spread(outputs_of(part, stats), rows, blank)


@linear_head.register_fake
def _linear_head_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side_hidden: Tensor | None,
    side_weight: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_limit: int,
    region: str,
    entropy_grad: bool,
    with_mean: bool,
    with_argmax: bool,
    workspace: int,
    backend: str,
    group: str,
    vocab_start: int,
) -> list[Tensor]:
    return empty_outputs(targets, accumulator_dtype(hidden), region, with_mean, with_argmax)


@torch.library.custom_op("litpost::linear_head_backward", mutates_args=())
def linear_head_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side_hidden: Tensor | None,
    side_weight: Tensor | None,
    outputs: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
    temperature: float,
    ignore_index: int,
    vocab_limit: int,
    region: str,
    entropy_grad: bool,
    with_mean: bool,
    workspace: int,
    backend: str,
    group: str,
    vocab_start: int,
) -> list[Tensor]:
    """Gradients of the five tensor inputs; empty where ``needs`` says False."""
    problem = make_problem(
        *(hidden, weight, targets, bias, side_hidden, side_weight, temperature, vocab_limit),
        *(region, with_mean, False, workspace),
    )
    inputs = [hidden, weight, bias, side_hidden, side_weight]
    rows = kept_rows(targets, ignore_index)
    if targets.numel() == 0 or (rows is not None and len(rows) == 0):
        found = Gradients()
    else:
        if rows is not None:
            n = hidden.shape[0]
            problem = problem.rows(rows)
            outputs = [v[rows] if v.shape[0] == n else v for v in outputs]
            grads = [v[rows] if v.shape[0] == n else v for v in grads]
        stats = stats_of(outputs, problem)
        upstream = upstream_of(grads, entropy_grad, with_mean, region)
        fill = _backend(backend)[1]
        if group:
            ranks = vocab_shards.find_group(group)
            found = vocab_shards.backward_of_rank(
                problem, stats, upstream, needs, fill, vocab_start, ranks
            )
        else:
            coefs = coefficients(problem, stats, upstream)
            found = backward(problem, stats, coefs, needs, fill)
    results = []
    for index, (need, given, value) in enumerate(
        zip(needs, inputs, vars(found).values(), strict=True)
    ):
        if not need or given is None:
            results.append(hidden.new_empty(0))
        elif value is None:
            results.append(torch.zeros_like(given))
        elif index in (0, 3) and rows is not None:
            results.append(torch.zeros_like(given).index_copy_(0, rows, value))
        else:
            results.append(value)
    return results


@linear_head_backward.register_fake
def _linear_head_backward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side_hidden: Tensor | None,
    side_weight: Tensor | None,
    outputs: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
    *rest: Any,
) -> list[Tensor]:
    inputs = [hidden, weight, bias, side_hidden, side_weight]
    return [
        torch.empty_like(given) if need and given is not None else hidden.new_empty(0)
        for need, given in zip(needs, inputs, strict=True)
    ]


def _linear_head_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, targets, bias, side_hidden, side_weight = inputs[:6]
    ctx.save_for_backward(hidden, weight, targets, bias, side_hidden, side_weight, *output)
    ctx.options = inputs[6:]


def _linear_head_grad(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    hidden, weight, targets, bias, side_hidden, side_weight, *outputs = ctx.saved_tensors
    temperature, ignore_index, limit, region, entropy_grad, with_mean, _, *rest = ctx.options
    needed = ctx.needs_input_grad
    needs = [needed[0], needed[1], needed[3], needed[4], needed[5]]
    found = linear_head_backward(
        *(hidden, weight, targets, bias, side_hidden, side_weight, outputs),
        *(list(grads[:NUM_DIFFERENTIABLE]), needs, temperature, ignore_index, limit, region),
        *(entropy_grad, with_mean, *rest),
    )
    own = [value if need else None for value, need in zip(found, needs, strict=True)]
    return (own[0], own[1], None, *own[2:], *[None] * len(ctx.options))


linear_head.register_autograd(_linear_head_grad, setup_context=_linear_head_setup)
