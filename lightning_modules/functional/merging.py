"""Merges of models with one architecture: several tensors in, one out, name by name.

A method is a pure function ``merge(tensors, weights) -> tensor`` under its name in ``METHODS``;
``merge_tensors`` walks the names and reads one tensor of every model at a time, so that whole
models need never be in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_modules.functional.choices import check_choice

TensorMerge = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum, added up in float32 (float64 stays), in the first tensor's dtype.

    Tensors of whole numbers or booleans (buffers such as positions) must be equal.

    Args:
        tensors: One a model, all of one shape.
        weights: One a model; those of ``normalized_weights`` make it an average.

    Raises:
        ValueError: Tensors of whole numbers differ.

    Example:
        >>> linear([torch.zeros(2), torch.ones(2)], [0.75, 0.25])
        tensor([0.2500, 0.2500])
    """
    first = tensors[0]
    if not first.is_floating_point():
        if any(not torch.equal(first, other) for other in tensors[1:]):
            raise ValueError(f"tensors of {first.dtype} differ and cannot be averaged")
        return first.clone()
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = torch.zeros(first.shape, dtype=wide, device=first.device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(wide)
    return total.to(first.dtype)


METHODS: dict[str, TensorMerge] = {"linear": linear}


def normalized_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights with a sum of 1.

    Args:
        weights: One a model, in any proportion; None for equal ones.
        count: Models.

    Raises:
        ValueError: Not ``count`` finite numbers, or their sum is not above 0.
    """
    if count < 1:
        raise ValueError("there is no model to merge")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise ValueError(f"weights={given}: {count} numbers are needed, one a model")
    total = sum(given)
    if not all(map(math.isfinite, given)) or not total > 0:
        raise ValueError(f"weights={given}: finite numbers with a sum above 0 are needed")
    return [weight / total for weight in given]


def merge_tensors(
    names: Iterable[str],
    read: Callable[[int, str], Tensor],
    count: int,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merged tensors by name, one at a time.

    Args:
        names: Of the tensors.
        read: ``read(model, name)`` gives one tensor of one model.
        count: Models.
        method: A name of ``METHODS``.
        weights: One a model, in any proportion; None for equal ones.

    Raises:
        ValueError: An unknown method, bad weights, or shapes that differ; names the tensor.
    """
    check_choice("method", method, tuple(METHODS))
    shares = normalized_weights(weights, count)
    for name in names:
        tensors = [read(model, name) for model in range(count)]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len(set(shapes)) > 1:
            raise ValueError(f"{name} has different shapes: {', '.join(map(str, shapes))}")
        try:
            yield name, METHODS[method](tensors, shares)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def merge_states(
    states: Sequence[Mapping[str, Tensor]],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """One state of several with the same names and shapes.

    Args:
        states: One a model.
        method: A name of ``METHODS``.
        weights: One a model, in any proportion; None for equal ones.

    Raises:
        ValueError: Names or shapes differ, or an argument is not allowed.
    """
    if not states:
        raise ValueError("there is no model to merge")
    for place, state in enumerate(states[1:], start=2):
        if odd := sorted(states[0].keys() ^ state.keys()):
            raise ValueError(f"models 1 and {place} have different tensors, such as {odd[0]}")
    merged = merge_tensors(
        states[0],
        lambda model, name: states[model][name],
        len(states),
        method=method,
        weights=weights,
    )
    return dict(merged)
