"""What a training step does with its batch: one mean over all ranks, a text's second half."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.context_encoding import CompressionBatch


def mean_of_ranks(total: Tensor, weight: Tensor) -> Tensor:
    """Loss whose gradients, averaged over the ranks, are those of the whole batch's weighted mean.

    Args:
        total: 0-d weighted sum of this rank's labels.
        weight: 0-d sum of their weights; 0 on all ranks gives 0 with a graph.
    """
    joined = sum_of_ranks(weight)
    is_joined = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if is_joined else 1
    return total * world_size / torch.where(joined == 0, 1.0, joined)


def sum_of_ranks(value: Tensor) -> Tensor:
    """A number added over the ranks, without gradient.

    Args:
        value: 0-d; not changed.
    """
    joined = value.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(joined)
    return joined


def continuation(batch: CompressionBatch) -> CompressionBatch:
    """The first half of every text as the source, the second as what is to be written.

    Raises:
        ValueError: Compressor and decoder have different tokenizers, so that halves differ.

    Args:
        batch: Whose sources and targets are the same texts.
    """
    lengths = batch.source_mask.sum(1)
    if not torch.equal(lengths, batch.target_mask.sum(1) - 1):
        raise ValueError("model.lm_ratio above 0 needs one tokenizer for compressor and decoder")
    half = (lengths + 1) // 2
    source = torch.arange(batch.source_ids.shape[1], device=half.device)[None] < half[:, None]
    target = torch.arange(batch.target_ids.shape[1], device=half.device)[None] >= half[:, None]
    return CompressionBatch(
        source_ids=batch.source_ids,
        source_mask=batch.source_mask & source,
        target_ids=batch.target_ids,
        target_mask=batch.target_mask & target,
        slot_mask=batch.slot_mask & target,
        uids=batch.uids,
        hidden=batch.hidden & source,
    )
