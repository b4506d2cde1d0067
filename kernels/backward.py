"""The backward pass: slices of the vocabulary, each recomputed, used and forgotten.

For a slice of the weight's rows its gradient is one product over all tokens, complete at once: no
running sum in a low precision, and no float32 buffer of the weight's size. Only the gradient of the
hidden states is summed over slices, in float32 (6.3 of our notes; token chunks, as others use,
need one or the other).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Coefficients, Problem, RowStats
from .regions import TopK, TopP
from .torch_backend import block_rows, matmul_into

Fill = Callable[[Problem, RowStats, Coefficients, int, int, int, int, Tensor], None]


@dataclass
class Upstream:
    """Gradients ``(N,)`` that reach the outputs of each row.

    Args:
        lse: Of the log-sum-exp.
        logprob: Of the target's log-prob.
        entropy: Of the entropy, or None where none is wanted.
        mean_logprob: Of the mean log-prob over the vocabulary, or None.
        region: Of the scaled region entropy, or None.
    """

    lse: Tensor
    logprob: Tensor
    entropy: Tensor | None
    mean_logprob: Tensor | None
    region: Tensor | None


@dataclass
class Gradients:
    """Gradients of the inputs; None where not wanted."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    side_hidden: Tensor | None = None
    side_weight: Tensor | None = None


def region_scale(problem: Problem, size: Tensor) -> Tensor | float:
    """Factor ``s`` between ``H_S`` and what is returned, constant under differentiation."""
    region = problem.region
    if region is None or region.scale == "none" or region == TopK(1, preserve_mass=False):
        return 1.0
    if isinstance(region, TopK) and region.k == 1:
        return 1.0
    log_size = size.to(problem.dtype).log()
    log_vocab = torch.tensor(float(problem.vocab_limit), dtype=problem.dtype).log().item()
    return torch.where(size > 1, log_vocab / log_size, 0.0)


def coefficients(problem: Problem, stats: RowStats, grads: Upstream) -> Coefficients:
    """Row scalars of the gradient of every logit; see ``Coefficients``.

    With ``z`` the scaled logits: ``d logprob = 1_t - p``, ``d entropy = -p (log p + H)``,
    ``d lse = p``, ``d mean_logprob = 1/V' - p``, and inside the region
    ``d (s H_S) = -s q (log q + H_S - tilt)``, ``q = p / mass``.
    """
    scale = 1.0 / problem.temperature
    flat = grads.lse - grads.logprob
    tilted = everywhere = members = region_flat = region_tilted = None
    if grads.entropy is not None:
        flat = flat - grads.entropy * stats.entropy
        tilted = -scale * grads.entropy
    if grads.mean_logprob is not None:
        flat = flat - grads.mean_logprob
        everywhere = scale * grads.mean_logprob / problem.vocab_limit
    if grads.region is not None and stats.region is not None:
        own = stats.region
        strength = grads.region * region_scale(problem, own.size)
        if isinstance(problem.region, TopP):
            log_mass = own.log_sum - stats.log_sum
            region_tilted = -scale * strength * (-log_mass).exp()
            # one token alone has no entropy to change
            region_tilted = torch.where(own.size > 1, region_tilted, 0.0)
            region_flat = region_tilted * (own.entropy - own.tilt - log_mass)
        elif own.ids.shape[1] == 1:
            flat = flat + grads.region
            members = -scale * grads.region[:, None]
        else:
            log_q = own.values - own.log_sum[:, None]
            q = log_q.exp()
            slope = q * (log_q + (own.entropy - own.tilt)[:, None])
            members = -scale * strength[:, None] * torch.where(q > 0, slope, 0.0)
    return Coefficients(
        flat=scale * flat,
        tilted=tilted,
        at_target=scale * grads.logprob,
        everywhere=everywhere,
        region_flat=region_flat,
        region_tilted=region_tilted,
        members=members,
    )


def slices(problem: Problem, element_size: int) -> tuple[int, int]:
    """Width of a slice of the vocabulary and rows of a block, bounded by the workspace."""
    budget = max(1, problem.workspace // element_size)
    least, most = (4096, 32768) if problem.hidden.is_cuda else (1024, 8192)
    width = min(max(budget // max(1, problem.num_rows), least), most, problem.vocab_limit)
    if width < problem.vocab_limit:
        width = max(128, width // 128 * 128)
    return width, block_rows(problem, width, budget // width)


def backward(
    problem: Problem, stats: RowStats, coefs: Coefficients, needs: list[bool], fill: Fill
) -> Gradients:
    """Gradients of the inputs.

    Args:
        problem: The inputs.
        stats: Of the forward.
        coefs: Of the upstream gradients.
        needs: Whether hidden, weight, bias, side_hidden and side_weight want theirs.
        fill: Writes the gradient of a block of logits; see ``torch_backend.fill``.
    """
    accumulator = problem.dtype
    working = problem.hidden.dtype if problem.hidden.is_cuda else accumulator
    found = Gradients()
    hidden = side = None
    if needs[0]:
        hidden = torch.zeros_like(problem.hidden, dtype=accumulator)
    if needs[1]:
        found.weight = torch.empty_like(problem.weight)
        found.weight[problem.vocab_limit :] = 0
    if needs[2] and problem.bias is not None:
        found.bias = torch.zeros_like(problem.bias)
    if needs[3] and problem.side_hidden is not None:
        side = torch.zeros_like(problem.side_hidden, dtype=accumulator)
    if needs[4] and problem.side_weight is not None:
        found.side_weight = torch.zeros_like(problem.side_weight)
    width, rows = slices(problem, torch.finfo(working).bits // 8)
    space = torch.empty(rows * width, dtype=working, device=problem.hidden.device)
    for v0 in range(0, problem.vocab_limit, width):
        v1 = min(v0 + width, problem.vocab_limit)
        sums = _Sums(problem, found, v0, v1, is_whole=rows >= problem.num_rows)
        for start in range(0, problem.num_rows, rows):
            stop = min(start + rows, problem.num_rows)
            block = space[: (stop - start) * (v1 - v0)].view(stop - start, v1 - v0)
            fill(problem, stats, coefs, start, stop, v0, v1, block)
            add_members(coefs, stats, start, stop, v0, block)
            if hidden is not None:
                _accumulate(hidden[start:stop], block, problem.weight[v0:v1])
            if side is not None and problem.side_weight is not None:
                _accumulate(side[start:stop], block, problem.side_weight[v0:v1])
            sums.add(block, start, stop)
        sums.store()
    found.hidden = None if hidden is None else hidden.to(problem.hidden.dtype)
    if side is not None and problem.side_hidden is not None:
        found.side_hidden = side.to(problem.side_hidden.dtype)
    return found


def add_members(
    coefs: Coefficients, stats: RowStats, start: int, stop: int, v0: int, block: Tensor
) -> None:
    """Add the terms of a TopK region; a token is a member once, so the order cannot matter."""
    if coefs.members is None or stats.region is None:
        return
    column = stats.region.ids[start:stop] - v0
    row, rank = ((column >= 0) & (column < block.shape[1])).nonzero(as_tuple=True)
    block[row, column[row, rank]] += coefs.members[start:stop][row, rank].to(block.dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with ``total`` in the accumulators' dtype."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and left.dtype == right.dtype:
        total.copy_(torch.addmm(total, left, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _Sums:
    """Gradients of the rows ``v0:v1`` of the weight, the bias and the side weight.

    One block holds all tokens: straight into the output. Several: a sum in the accumulators' dtype,
    in the output itself where it has that, so that nothing is added up in a low precision.
    """

    def __init__(
        self, problem: Problem, found: Gradients, v0: int, v1: int, *, is_whole: bool
    ) -> None:
        outputs = (
            (found.weight, problem.hidden),
            (found.side_weight, problem.side_hidden),
        )
        self.pairs = []
        for output, source in outputs:
            if output is not None and source is not None:
                own = output[v0:v1]
                is_exact = is_whole or own.dtype == problem.dtype
                total = own if is_exact else torch.empty_like(own, dtype=problem.dtype)
                if not is_whole:
                    total.zero_()
                self.pairs.append((own, total, source))
        self.bias = None if found.bias is None else found.bias[v0:v1]
        self.bias_total = (
            None if self.bias is None else torch.zeros_like(self.bias, dtype=problem.dtype)
        )
        self.is_whole = is_whole

    def add(self, block: Tensor, start: int, stop: int) -> None:
        for own, total, source in self.pairs:
            if not self.is_whole:
                _accumulate(total, block.T, source[start:stop])
            elif own.dtype == block.dtype == source.dtype:
                torch.mm(block.T, source, out=own)
            else:
                result = torch.empty_like(own, dtype=torch.promote_types(block.dtype, own.dtype))
                matmul_into(block.T, source.to(block.dtype), result)
                own.copy_(result)
        if self.bias_total is not None:
            self.bias_total += block.sum(0, dtype=self.bias_total.dtype)

    def store(self) -> None:
        for own, total, _ in self.pairs:
            if total is not own:
                own.copy_(total)
        if self.bias is not None and self.bias_total is not None:
            self.bias.copy_(self.bias_total)
