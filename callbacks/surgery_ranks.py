"""Gradients over ranks: shards and their parts, averages in a few large messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

#: Numbers in one message.
BUCKET = 2**24


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other as it is, without its graph.

    Args:
        tensor: Any.

    Returns:
        A plain tensor that shares memory with it.

    Example:
        >>> local_part(torch.ones(2))
        tensor([1., 1.])
    """
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """The inverse of ``local_part``: a tensor that is sharded as the parameter is.

    Args:
        parameter: Sharded or not.
        part: This rank's shard, or the whole.

    Returns:
        A tensor of the parameter's shape.

    Example:
        >>> like(torch.zeros(2), torch.ones(2))
        tensor([1., 1.])
    """
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        device_mesh=parameter.device_mesh,
        placements=parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def num_copies(parameter: Tensor) -> int:
    """On how many ranks each number of a parameter lies.

    Args:
        parameter: Sharded or not; a process group must exist.

    Returns:
        The number of ranks, divided by the number of shards.
    """
    shards = 1
    if isinstance(parameter, DTensor):
        sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
        for size, placement in sizes:
            shards *= size if isinstance(placement, Shard) else 1
    return dist.get_world_size() // shards


def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the ranks, in place.

    Args:
        tensors: Of the same shapes and in the same order on every rank.
    """
    world = dist.get_world_size()
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        pieces = flat.div_(world).split([tensor.numel() for tensor in bucket])
        for tensor, piece in zip(bucket, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
