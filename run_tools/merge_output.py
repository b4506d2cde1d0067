"""Weights written as they are made, in the shards that ``transformers`` reads.

A safetensors file is the length of its header, the header (JSON: dtype, shape and place of every
tensor) and the tensors one after the other. All of the header is known before the first tensor is,
so none has to be held back, as the library's own ``save_file`` would need.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8


@dataclass(frozen=True)
class Spec:
    """What a file says of a tensor.

    Args:
        dtype: In the format's own words, such as ``BF16``.
        shape: Of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bytes of an entry."""
        bits = re.search(r"\d+", self.dtype)
        return 1 if bits is None else int(bits.group()) // 8

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.width


def write_shards(
    specs: Mapping[str, Spec],
    make: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]],
    folder: Path,
    max_bytes: int,
) -> None:
    """Write tensors into ``folder`` one at a time.

    Args:
        specs: Of every tensor, by name.
        make: Gives the tensors of the names it gets, in their order.
        folder: Gets ``model.safetensors``, or shards and their index.
        max_bytes: Bytes of a file at most (a larger tensor has its own).

    Raises:
        ValueError: A tensor is not what its ``Spec`` says.
    """
    # wide entries first, so that every tensor begins at a multiple of its entries' width
    names = sorted(specs, key=lambda name: (-specs[name].width, name))
    shards = _split(names, specs, max_bytes)
    tensors = make(names)
    weight_map: dict[str, str] = {}
    for place, shard in enumerate(shards, start=1):
        file = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        _write_file(folder / file, {name: specs[name] for name in shard}, tensors)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(spec.size for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _split(names: Sequence[str], specs: Mapping[str, Spec], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name in names:
        size = specs[name].size
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_file(
    path: Path, specs: Mapping[str, Spec], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """One file; takes from ``tensors`` as many as it has."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        places = [end, end := end + spec.size]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": places}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, spec in specs.items():
            name, tensor = next(tensors)
            bytes_here = tensor.numel() * tensor.element_size()
            if (name, tuple(tensor.shape), bytes_here) != (expected, spec.shape, spec.size):
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not {spec}")
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
