"""Merges of models with one architecture: several tensors in, one out, name by name.

The methods are pure functions of one tensor in each model (``merge_methods``, ``task_vectors``),
listed with what they need in ``METHODS``. ``merge_tensors`` walks the names and reads one tensor of
every model at a time, so that whole models need never be in memory together; ``merge_states`` takes
whole states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from lightning_modules.functional import merge_methods, task_vectors
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.merge_methods import linear as linear

#: ``observe(name, tensors, base, merged)`` sees each tensor of whatever dtype as it is merged.
Observer = Callable[[str, Sequence[Tensor], Tensor | None, Tensor], None]


@dataclass(frozen=True)
class MergeMethod:
    """A way to merge, and what it takes.

    Args:
        merge: ``merge(tensors, weights, base, **options) -> tensor``.
        options: Names of its options; all methods know ``one_d`` besides.
        needs_base: Whether it works on differences from a base only.
        needs_two: Whether it merges exactly two models.
        takes_negative: Whether weights may be below 0.
    """

    merge: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    needs_base: bool = False
    needs_two: bool = False
    takes_negative: bool = False


METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(merge_methods.linear, takes_negative=True),
    "slerp": MergeMethod(merge_methods.slerp, needs_two=True),
    "multislerp": MergeMethod(merge_methods.multislerp),
    "karcher": MergeMethod(merge_methods.karcher, ("iterations", "tolerance")),
    "task_arithmetic": MergeMethod(
        task_vectors.task_arithmetic,
        ("scale", "normalize"),
        needs_base=True,
        takes_negative=True,
    ),
    "ties": MergeMethod(task_vectors.ties, ("density", "scale"), needs_base=True),
    "dare": MergeMethod(
        task_vectors.dare,
        ("density", "scale", "normalize", "rescale", "seed"),
        needs_base=True,
        takes_negative=True,
    ),
}
#: For every method: ``linear`` averages tensors of one dimension or none (gains, biases), where
#: restoring the norm of a few numbers adds noise; ``same`` treats them as all others [our choice].
ONE_D = ("same", "linear")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "density": ("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1),
    "iterations": ("a whole number, 1 or more", lambda value: _is_whole(value) and value >= 1),
    "normalize": ("true or false", lambda value: isinstance(value, bool)),
    "one_d": (" or ".join(ONE_D), lambda value: isinstance(value, str) and value in ONE_D),
    "rescale": ("true or false", lambda value: isinstance(value, bool)),
    "scale": ("a finite number", _is_number),
    "seed": ("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0),
    "tolerance": ("a number above 0", lambda value: _is_number(value) and value > 0),
}


def normalized_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights with a sum of 1.

    Args:
        weights: One a model, in any proportion; None for equal ones.
        count: Models.

    Raises:
        ValueError: Not ``count`` finite numbers, or their sum is not above 0.
    """
    given = _given_weights(weights, count)
    total = sum(given)
    if not total > 0:
        raise ValueError(f"weights={given}: finite numbers with a sum above 0 are needed")
    return [weight / total for weight in given]


def used_weights(
    weights: Sequence[float] | None, count: int, options: Mapping[str, Any] | None = None
) -> list[float]:
    """Weights as the method gets them: a sum of 1, or as they are with ``normalize: false``.

    Args:
        weights: One a model; None for equal ones, which are 1 each where they stay as they are.
        count: Models.
        options: Of the method.

    Raises:
        ValueError: As ``normalized_weights``.
    """
    if (options or {}).get("normalize", True):
        return normalized_weights(weights, count)
    return _given_weights(weights, count)


def _given_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 1:
        raise ValueError("there is no model to merge")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise ValueError(f"weights={given}: {count} numbers are needed, one a model")
    if not all(map(math.isfinite, given)):
        raise ValueError(f"weights={given}: finite numbers with a sum above 0 are needed")
    return given


def argument_problems(
    method: str,
    count: int,
    *,
    weights: Sequence[float] | None = None,
    has_base: bool = False,
    options: Mapping[str, Any] | None = None,
    key: str = "",
) -> list[str]:
    """Everything that is wrong with the arguments of a merge, one line each.

    Args:
        method: A name of ``METHODS``, or what was taken for one.
        count: Models.
        weights: One a model; None for equal ones.
        has_base: Whether there is a base.
        options: Of the method.
        key: Before every name in the messages, such as ``merge.``.

    Example:
        >>> argument_problems("ties", 2, has_base=True, options={"densty": 0.2}, key="merge.")
        ["unknown key 'merge.options.densty' of ties; did you mean 'merge.options.density'?"]
    """
    problems = []
    given = dict(options or {})
    try:
        shares = used_weights(weights, count, given)
    except ValueError as error:
        text = str(error)
        problems.append(f"{key}{text}" if text.startswith("weights") else text)
        shares = []
    try:
        check_choice(f"{key}method", method, tuple(METHODS))
    except ValueError as error:
        return [*problems, str(error)]
    about = METHODS[method]
    if about.needs_two and count != 2:
        problems.append(f"{key}method={method!r} merges 2 models, not {count}")
    if about.needs_base and not has_base:
        problems.append(f"{key}method={method!r} needs {key}base: it works on differences from it")
    if shares and not about.takes_negative and min(shares) < 0:
        problems.append(f"{key}weights={list(weights or [])}: {method} takes none below 0")
    known = [*about.options, "one_d"]
    for name, value in given.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{key}options.{near[0]}'?" if near else f"known: {known}"
            problems.append(f"unknown key '{key}options.{name}' of {method}; {hint}")
            continue
        allowed, is_allowed = _ALLOWED[name]
        if not is_allowed(value):
            problems.append(f"{key}options.{name}={value!r} must be {allowed}")
    return problems


def merge_tensor(
    name: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    method: str = "linear",
    base: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """One tensor of several; see ``merge_tensors``, which checks the arguments of all.

    Tensors of whole numbers must be equal, under every method.

    Args:
        name: Of the tensor: seeds what is drawn at random, and is in messages.
        tensors: One a model.
        weights: One a model, those of ``used_weights``.
        method: A name of ``METHODS``.
        base: The base's tensor, or None.
        options: Of the method, and ``one_d``.

    Raises:
        ValueError: Shapes differ, or the method cannot merge these tensors; names the tensor.
    """
    shapes = [tuple(t.shape) for t in (*tensors, *([] if base is None else [base]))]
    if len(set(shapes)) > 1:
        raise ValueError(f"{name} has different shapes: {', '.join(map(str, shapes))}")
    own = dict(options or {})
    is_small = tensors[0].ndim <= 1 and own.pop("one_d", ONE_D[0]) == "linear"
    own.pop("one_d", None)
    try:
        if not tensors[0].is_floating_point() or is_small:
            return linear(tensors, weights, base)
        if method == "dare":
            own["name"] = name
        return METHODS[method].merge(tensors, weights, base, **own)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def merge_tensors(
    names: Iterable[str],
    read: Callable[[int, str], Tensor],
    count: int,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    read_base: Callable[[str], Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    observe: Observer | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merged tensors by name, one at a time.

    Args:
        names: Of the tensors.
        read: ``read(model, name)`` gives one tensor of one model.
        count: Models.
        method: A name of ``METHODS``.
        weights: One a model, in any proportion; None for equal ones.
        read_base: ``read_base(name)`` gives one tensor of the base; None where there is none.
        options: Of the method, and ``one_d``.
        observe: Called with each tensor of the models, that of the base and the merge.

    Raises:
        ValueError: A wrong argument (all are named), or shapes that differ; names the tensor.
    """
    has_base = read_base is not None
    problems = argument_problems(method, count, weights=weights, has_base=has_base, options=options)
    if problems:
        raise ValueError("; ".join(problems))
    shares = used_weights(weights, count, options)
    for name in names:
        tensors = [read(model, name) for model in range(count)]
        base = read_base(name) if read_base is not None else None
        merged = merge_tensor(name, tensors, shares, method=method, base=base, options=options)
        if observe is not None:
            observe(name, tensors, base, merged)
        yield name, merged
        del tensors, base, merged  # before the next ones are read


def merge_states(
    states: Sequence[Mapping[str, Tensor]],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    observe: Observer | None = None,
) -> dict[str, Tensor]:
    """One state of several with the same names and shapes.

    Names that share a tensor in the first state (tied weights) are merged once and share the
    result.

    Args:
        states: One a model.
        method: A name of ``METHODS``.
        weights: One a model, in any proportion; None for equal ones.
        base: State of the model that all started from, for methods that use one.
        options: Of the method, and ``one_d``.
        observe: Called with each tensor of the models, that of the base and the merge.

    Raises:
        ValueError: Names or shapes differ, weights are tied in one state and differ in another, or
            an argument is not allowed.
    """
    if not states:
        raise ValueError("there is no model to merge")
    others = {f"model {place}": state for place, state in enumerate(states[1:], start=2)}
    if base is not None:
        others["the base"] = base
    for label, state in others.items():
        if odd := sorted(states[0].keys() ^ state.keys()):
            raise ValueError(f"model 1 and {label} have different tensors, such as {odd[0]}")
    tied = _tied(states[0])
    for name, first in tied.items():
        for label, state in others.items():
            if not torch.equal(state[name], state[first]):
                raise ValueError(f"{name} is {first} in model 1 (tied), but not in {label}")
    merged = dict(
        merge_tensors(
            [name for name in states[0] if name not in tied],
            lambda model, name: states[model][name],
            len(states),
            method=method,
            weights=weights,
            read_base=None if base is None else base.__getitem__,
            options=options,
            observe=observe,
        )
    )
    return {name: merged[tied.get(name, name)] for name in states[0]}


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is that of an earlier name, with that name."""
    seen: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        if not tensor.numel() or not tensor.data_ptr():
            continue
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        first = seen.setdefault(place, name)
        if first != name:
            tied[name] = first
    return tied
