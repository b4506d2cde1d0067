"""Rows of all ranks with a gradient, and the scale that makes ranks equal to one process.

The rule, for trainers that take the *mean* of the ranks' gradients (DDP, FSDP). Let ``S_r`` be the
summed loss of rank r's own rows against the candidates of all ranks, n_r their number, W the number
of ranks. The loss of one process with the joined batch is ``sum_r S_r / sum_r n_r``.

- ``gather_with_grad`` sends back to each rank the *sum* over ranks of the gradients of its rows. So
  rank r's parameters get ``d(sum_k S_k)`` along the paths through its own rows, and the sum over
  ranks is the whole gradient.
- The trainer divides that sum by W. So each rank returns ``W S_r / sum_k n_k``
  (``joined_mean``): the mean of the gradients is then exactly the joined one.
- With equal n_r that factor is ``1 / n_r``: the plain mean over the own rows. Ranks that each take
  the whole mean over all rows return it as it is, too: every rank's copy adds its gradient, and the
  trainer divides by their number. Nothing is multiplied by W then; that factor belongs to code that
  takes the whole loss on every rank and lets only the own slice have a gradient (CoCoA [code]).

Under gradient accumulation Lightning divides by the number of micro-batches: the result is the mean
of the micro-batches' means.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.functional.contrastive import PairInfo


class Gathered(NamedTuple):
    """Rows of all ranks.

    Args:
        tensors: In the order given, each with the rows of rank 0, then rank 1, and so on.
        rows: Where this rank's own rows are.
    """

    tensors: tuple[Tensor, ...]
    rows: slice


def gather_with_grad(*tensors: Tensor, group: Any = None) -> Gathered:
    """Join the rows of all ranks; gradients flow back to the rank that owns a row, summed.

    All tensors travel in one collective, forward and backward, so that no order of the backward can
    make ranks wait for each other. Ranks may have different numbers of rows, even none. Without a
    process group the tensors come back as they are. Every rank must call it, and run the backward
    through it or not, alike; a rank without rows has a loss of 0 *with* a graph.

    Args:
        *tensors: ``(n, ...)`` each, of one n, floating dtype and device; shapes behind n as on the
            other ranks.
        group: Process group; None for the default one.

    Raises:
        ValueError: On every rank, if the tensors do not fit together or between ranks.
    """
    first = tensors[0]
    if any(len(x) != len(first) or x.dtype != first.dtype for x in tensors):
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors)
        raise ValueError(f"tensors gathered together must share rows and dtype, got {shapes}")
    if _world_size(group) == 1:
        return Gathered(tensors, slice(0, len(first)))
    widths = [x[0].numel() if len(x) else x.flatten(1).shape[1] for x in tensors]
    flat = torch.cat(
        [x.reshape(len(x), width) for x, width in zip(tensors, widths, strict=True)], 1
    )
    counts = _counts(flat, group)
    joined: Tensor = _Gather.apply(flat, counts, group)  # type: ignore[no-untyped-call]
    parts = joined.split(widths, dim=1)
    whole = [part.reshape(-1, *x.shape[1:]) for part, x in zip(parts, tensors, strict=True)]
    return Gathered(tuple(whole), _own(counts, group))


def gather_rows(rows: Tensor, *, fill: int = -1, group: Any = None) -> Tensor:
    """Join rows of numbers without a gradient, such as text ids; columns are filled up.

    Args:
        rows: ``(n,)`` or ``(n, K)`` integers or booleans; n and K may differ between ranks.
        fill: What missing columns hold.
        group: Process group; None for the default one.

    Returns:
        ``(N,)`` or ``(N, max K)``, the rows of rank 0 first; dtype as given.
    """
    if _world_size(group) == 1:
        return rows
    wide = rows.to(torch.int64)
    if rows.dim() == 2:
        columns = torch.tensor(rows.shape[1], device=rows.device)
        dist.all_reduce(columns, op=dist.ReduceOp.MAX, group=group)
        wide = torch.nn.functional.pad(wide, (0, int(columns) - rows.shape[1]), value=fill)
    flat = wide.reshape(len(wide), -1) if len(wide) else wide.flatten(1) if wide.dim() > 1 else None
    flat = wide.new_zeros(0, 1) if flat is None else flat
    joined = _joined(flat, _counts(flat, group), group)
    return (joined.squeeze(1) if rows.dim() == 1 else joined).to(rows.dtype)


def gather_info(info: PairInfo, *, group: Any = None) -> PairInfo:
    """``PairInfo`` of the rows of all ranks; the same fields must be given on each.

    Args:
        info: Of this rank's rows.
        group: Process group; None for the default one.

    Raises:
        ValueError: On every rank, if they give different fields.
    """
    if _world_size(group) == 1:
        return info
    names = [field.name for field in fields(info)]
    given = {name: getattr(info, name) for name in names}
    everyone: list[Any] = [None] * _world_size(group)
    dist.all_gather_object(everyone, [n for n in names if given[n] is not None], group=group)
    if any(other != everyone[0] for other in everyone):
        raise ValueError(f"ranks know different things about their rows: {everyone}")
    return PairInfo(**{n: gather_rows(given[n], group=group) for n in everyone[0]})


def joined_mean(loss_sum: Tensor, num_rows: int, *, group: Any = None) -> Tensor:
    """Loss whose gradients, averaged over the ranks, are those of the joined batch's mean.

    ``W S_r / sum_k n_k``, see the top of this file; in one process simply the mean.

    Args:
        loss_sum: 0-d sum over this rank's own rows.
        num_rows: Their number; 0 gives 0 with a graph.
        group: Process group; None for the default one.
    """
    total, world_size = num_rows, _world_size(group)
    if world_size > 1:
        counts = torch.tensor(num_rows, device=loss_sum.device)
        dist.all_reduce(counts, group=group)
        total = int(counts)
    return loss_sum * (world_size / max(total, 1))


class _Gather(torch.autograd.Function):
    """Concatenation over ranks; backward adds the ranks' gradients and keeps the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.own, ctx.group = _own(counts, group), group
        return _joined(rows, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # in float32 or wider: the sum over many ranks would lose in half precision
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(wide, group=ctx.group)
        return wide[ctx.own].to(grad.dtype), None, None


def _world_size(group: Any) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _own(counts: list[int], group: Any) -> slice:
    rank = dist.get_rank(group)
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def _counts(flat: Tensor, group: Any) -> list[int]:
    """Rows of each rank; refuses other widths or dtypes on all ranks alike."""
    mine = torch.tensor([*flat.shape, flat.element_size()], device=flat.device)
    shapes = [torch.empty_like(mine) for _ in range(_world_size(group))]
    dist.all_gather(shapes, mine, group=group)
    found = torch.stack(shapes).tolist()
    if any(shape[1:] != found[0][1:] for shape in found):
        raise ValueError(f"ranks gather rows of different widths or dtypes: {found}")
    return [shape[0] for shape in found]


def _joined(flat: Tensor, counts: list[int], group: Any) -> Tensor:
    """Rows ``(n_r, width)`` of all ranks; shorter ranks are filled up on the way."""
    padded = flat.new_zeros(max(counts), flat.shape[1])
    padded[: len(flat)] = flat
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
