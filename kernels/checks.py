"""What is refused before anything is computed, and what to do instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .regions import Region, TopK, TopP

Side = tuple[Tensor, Tensor]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_region(region: Region | None, vocabulary: int) -> None:
    """Refuse a region that does not fit the vocabulary.

    Raises:
        ValueError: ``TopK(k)`` is larger than the vocabulary.
    """
    if isinstance(region, TopK) and region.k > vocabulary:
        raise ValueError(
            f"TopK(k={region.k}) is larger than the vocabulary of {vocabulary} tokens: give k from "
            f"1 to {vocabulary}"
        )


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side: Side | None,
    temperature: float,
    region: Region | None,
    process_group: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Side | None]:
    """Refuse what cannot be right; under autocast cast to its dtype.

    Returns:
        hidden, weight, bias and side in one dtype.

    Raises:
        TypeError: Different or unsupported dtypes, or a ``DTensor``.
        ValueError: Shapes that do not fit, or a value out of range.
        NotImplementedError: TopP with a process group.
    """
    if process_group is not None and isinstance(region, TopP):
        raise NotImplementedError(
            "TopP with process_group: a nucleus over a vocabulary shared among ranks is not built; "
            "use TopK, or shard the head with fully_shard and call it through FusedLMHead"
        )
    tensors = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is not None and type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor, one rank's shard: call the head's own forward with targets "
                f"(FusedLMHead; fuse_lm_head(model) puts it in), where fully_shard has gathered "
                f"the weight, instead of reading model.lm_head.weight"
            )
    problems = _shape_problems(hidden, weight, targets, bias, side)
    if not temperature > 0.0:
        problems.append(f"temperature={temperature}: give a value above 0")
    if problems:
        raise ValueError("; ".join(problems))
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        side = None if side is None else (side[0].to(dtype), side[1].to(dtype))
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}: cast one of them "
            f"(hidden.to(weight.dtype)) or run under torch.autocast"
        )
    _check_dtypes(hidden, targets)
    if side is not None and {side[0].dtype, side[1].dtype} != {hidden.dtype}:
        raise TypeError(
            f"side is {side[0].dtype} and {side[1].dtype} but hidden is {hidden.dtype}: cast both "
            f"to {hidden.dtype}"
        )
    return hidden, weight, bias, side


def _shape_problems(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side: Side | None,
) -> list[str]:
    problems = []
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[-1]:
        return [
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: give "
            f"(..., H) and (V, H)"
        ]
    vocabulary = weight.shape[0]
    if hidden.shape[:-1] != targets.shape:
        problems.append(
            f"targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}: give one id "
            f"for each of {tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != (vocabulary,):
        problems.append(f"bias {tuple(bias.shape)}: give ({vocabulary},)")
    if side is not None:
        rank = side[1].shape[-1]
        wanted = (*hidden.shape[:-1], rank), (vocabulary, rank)
        given = tuple(side[0].shape), tuple(side[1].shape)
        if given != wanted:
            problems.append(f"side {given[0]}, {given[1]}: give {wanted[0]}, {wanted[1]}")
    return problems


def own_limit(vocab_limit: int | None, num_rows: int, vocab_start: int | None = None) -> int:
    """Columns of the weight's rows that exist.

    Args:
        vocab_limit: Columns of the whole vocabulary that exist, or None for all.
        num_rows: Rows of the weight.
        vocab_start: Token of this rank's first row, or None where the weight holds all rows.

    Raises:
        ValueError: None exists, or more than there are.
    """
    if vocab_limit is None:
        return num_rows
    if vocab_start is None:
        if not 1 <= vocab_limit <= num_rows:
            raise ValueError(f"vocab_limit={vocab_limit}: give 1 to {num_rows}")
        return vocab_limit
    own = vocab_limit - vocab_start
    if own < 1:
        raise ValueError(
            f"vocab_limit={vocab_limit} leaves nothing of the rows from vocab_start={vocab_start} "
            f"on: give every rank at least one token"
        )
    return min(own, num_rows)


def check_logits(logits: Tensor, targets: Tensor, temperature: float) -> None:
    """Refuse logits and targets that cannot be right.

    Raises:
        TypeError: Unsupported dtypes.
        ValueError: Shapes that do not fit, or a temperature out of range.
    """
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit: give "
            f"(..., V) and targets of the shape {tuple(logits.shape[:-1])}"
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature}: give a value above 0")
    _check_dtypes(logits, targets)


def _check_dtypes(values: Tensor, targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}: give int64 token ids (targets.long())")
    if values.dtype not in FLOATS:
        raise TypeError(
            f"{values.dtype} is not supported: use one of {', '.join(map(str, FLOATS))}"
        )
