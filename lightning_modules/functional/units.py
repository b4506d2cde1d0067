"""Which parameters form one unit of gradient surgery, read off their names.

A unit is what gets one weight a domain (Modular Gradient Surgery, arXiv 2602.02301):

    tensor  every parameter tensor [code: what the release does; the default]
    module  attention and MLP of each layer with their input norms, embedding, final norm, head
            [paper: functional blocks]
    layer   a whole decoder layer; what stands outside of layers as in ``module``
    global  everything: ordinary PCGrad

Our choices: the A and B of one adapter are one unit (either alone depends on their gauge, and B = 0
makes A's first gradient exactly zero); tensors of fewer than ``min_elements`` numbers join the
tensor that is nearest by name (two scalars in conflict have cosine -1, which freezes both); a
matrix that is neither attention, embedding, norm nor head counts as ``mlp``. Names decide, as
``named_parameters`` gives them, so a tied embedding and head are one entry, the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from lightning_modules.functional.choices import check_choice

Granularity = Literal["tensor", "module", "layer", "global"]
Kind = Literal["attn", "mlp", "embed", "norm", "head"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Norms that open the attention block although their name does not say so.
_ATTENTION_NORMS = ("input_layernorm", "ln_1", "norm1", "layernorm_before")
_WRAPPERS = ("base_layer", "weight", "bias")


class Place(NamedTuple):
    """Where a parameter stands.

    Args:
        layer: Name of its layer up to the number, such as ``model.layers.3``; empty outside.
        kind: What it is.
        block: Which block of the layer it belongs to: as ``kind``, but norms inside a layer count
            to the attention or MLP that they open.
    """

    layer: str
    kind: Kind
    block: Kind


class Units(NamedTuple):
    """A partition of ``P`` parameters.

    Args:
        names: Of the ``U`` units.
        unit_of: ``P`` indices into ``names``.
        cells: Distinct (layer, kind) of the parameters, for pictures and means.
        cell_of: ``P`` indices into ``cells``.
    """

    names: list[str]
    unit_of: list[int]
    cells: list[tuple[str, Kind]]
    cell_of: list[int]


def place_of(name: str) -> Place:
    """Layer, kind and block of a parameter.

    Args:
        name: As ``named_parameters`` gives it.

    Returns:
        The place.

    Example:
        >>> place_of("model.layers.3.input_layernorm.weight")
        Place(layer='model.layers.3', kind='norm', block='attn')
    """
    parts = _without_adapter(name).split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    layer = ".".join(parts[: numbers[0] + 1]) if numbers else ""
    inner = parts[numbers[0] + 1 :] if numbers else parts
    words = [part.lower() for part in inner if part not in _WRAPPERS]
    is_norm = bool(words) and ("norm" in words[-1] or re.fullmatch(r"ln(_\w+)?", words[-1]))
    in_attention = any("attn" in word or "attention" in word for word in words[: -1 or None])
    if not layer:
        kind = "norm" if is_norm else _kind_outside(words)
        return Place(layer, kind, kind)
    if is_norm:
        opens = words[-1] in _ATTENTION_NORMS or re.fullmatch(r"att\w*_norm", words[-1])
        return Place(layer, "norm", "attn" if in_attention or opens else "mlp")
    in_attention = in_attention or any("attn" in word or "attention" in word for word in words)
    return Place(layer, "attn", "attn") if in_attention else Place(layer, "mlp", "mlp")


def _kind_outside(words: Sequence[str]) -> Kind:
    last = words[-1] if words else ""
    if any("embed" in word or word in ("wte", "wpe") for word in words):
        return "embed"
    return "head" if "head" in last or last in ("score", "classifier") else "mlp"


def _without_adapter(name: str) -> str:
    return re.sub(r"\.lora_\w+(\..*)?$", ".weight", name)


def partition(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    granularity: Granularity = "tensor",
    min_elements: int = 16,
) -> Units:
    """Group parameters into units.

    Args:
        names: ``P`` names, without repetition.
        sizes: ``P`` numbers of elements, of whole (unsharded) tensors.
        granularity: ``tensor``, ``module``, ``layer`` or ``global``.
        min_elements: Smaller tensors join another one (``tensor`` only).

    Returns:
        The partition; units in the order of their first parameter.

    Raises:
        ValueError: The granularity is not known.

    Example:
        >>> partition(["layers.0.mlp.up.weight", "layers.0.mlp.up.bias"], [64, 8]).names
        ['layers.0.mlp.up.weight']
    """
    check_choice("granularity", granularity, get_args(Granularity))
    places = [place_of(name) for name in names]
    keys = [_key(name, place, granularity) for name, place in zip(names, places, strict=True)]
    if granularity == "tensor":
        keys = _join_tiny(keys, places, sizes, min_elements)
    units = list(dict.fromkeys(keys))
    of_key = {key: index for index, key in enumerate(units)}
    cells = list(dict.fromkeys((place.layer, place.kind) for place in places))
    cell_of = [cells.index((place.layer, place.kind)) for place in places]
    return Units(units, [of_key[key] for key in keys], cells, cell_of)


def _key(name: str, place: Place, granularity: Granularity) -> str:
    if granularity == "global":
        return "global"
    if granularity == "tensor":
        return _without_adapter(name)
    if granularity == "layer" and place.layer:
        return place.layer
    return f"{place.layer}.{place.block}" if place.layer else place.block


def _join_tiny(
    keys: list[str], places: Sequence[Place], sizes: Sequence[int], min_elements: int
) -> list[str]:
    """Units that are too small take the key of the nearest large unit of their own block."""
    totals: dict[str, int] = {}
    blocks: dict[str, tuple[str, str]] = {}
    for key, place, size in zip(keys, places, sizes, strict=True):
        totals[key] = totals.get(key, 0) + size
        blocks[key] = (place.layer, place.block)
    joined = {}
    for key, total in totals.items():
        hosts = [k for k in totals if blocks[k] == blocks[key] and totals[k] >= min_elements]
        if total < min_elements and hosts:
            joined[key] = max(hosts, key=lambda host: (_shared(host, key), totals[host]))
    return [joined.get(key, key) for key in keys]


def _shared(one: str, other: str) -> int:
    """Leading components that two names have in common."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
