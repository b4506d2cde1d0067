"""Exported folders merged into one: experts of single domains become one model.

Weights are read from safetensors and written in shards, one tensor of every model at a time;
nothing is unpickled. Configuration and tokenizer are those of the first folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.prepared import fingerprint, prepare
from lightning_modules.functional.merging import merge_tensors, normalized_weights
from lightning_modules.options import MergeOptions, read_options

_INDEX = "model.safetensors.index.json"
_OWN_FILES = ("litpost.json", "prepared.json", _INDEX)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def merge_folders(
    folders: Sequence[str | Path],
    output: str | Path,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    *,
    max_shard_bytes: int = 4 * 2**30,
) -> Path:
    """Merge Hugging Face folders of one architecture into a new folder.

    Args:
        folders: Exports to merge, e.g. ``outputs/mgs/s0/arms/only_math/export``.
        output: The new folder; one that holds files is refused.
        method: A name of ``functional.merging.METHODS``.
        weights: One a folder, in any proportion; None for equal ones.
        max_shard_bytes: Bytes of a file of weights at most (a larger tensor has its own).

    Returns:
        ``output``.

    Raises:
        ValueError: Fewer than two folders, one without safetensors, different architectures,
            tensors or shapes (the first is named), or ``output`` holds files.

    Example:
        >>> merge_folders(["math/export", "chat/export"], "merged")  # doctest: +SKIP
    """
    paths, target = [Path(folder) for folder in folders], Path(output)
    if len(paths) < 2:
        raise ValueError(f"backbone.merge names {len(paths)} folders; two or more are needed")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and is not empty; name a new folder")
    shares = normalized_weights(weights, len(paths))
    indexes = [_index(path) for path in paths]
    _check_alike(paths, indexes)
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in sorted(paths[0].iterdir()):
        if file.is_file() and file.suffix not in _WEIGHTS and file.name not in _OWN_FILES:
            shutil.copy(file, unfinished)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(model: int, name: str) -> Tensor:
            file = indexes[model][name]
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            tensor: Tensor = opened[file].get_tensor(name)
            return tensor

        merged = merge_tensors(sorted(indexes[0]), read, len(paths), method=method, weights=shares)
        _write(merged, unfinished, max_shard_bytes)
    info = {"merged": [str(path) for path in paths], "method": method, "weights": shares}
    (unfinished / "litpost.json").write_text(json.dumps(info, indent=1) + "\n")
    os.replace(unfinished, target)  # an empty folder in its place is replaced too
    return target


def prepare_merge(options: Mapping[str, Any], cache_dir: str | Path) -> Path:
    """Folder of the merge that ``backbone.merge`` asks for, made at most once.

    Args:
        options: ``folders``, and where wanted ``method`` and ``weights``.
        cache_dir: Where prepared folders live.

    Raises:
        ValueError: An unknown key, no folders, or folders that cannot be merged.
    """
    asked = read_options(MergeOptions, options, "backbone.merge")
    folders, method, weights = [str(one) for one in asked.folders], asked.method, asked.weights
    if missing := [folder for folder in folders if not Path(folder, "config.json").is_file()]:
        raise ValueError(
            f"backbone.merge.folders: {missing[0]} is no exported model; train it first (a run's "
            f"export/ folder)"
        )
    material = {"folders": [fingerprint(f) for f in folders], "method": method, "weights": weights}

    def build(folder: Path) -> None:
        merge_folders(folders, folder, method, weights)

    return prepare(cache_dir, "merged", material, build)


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no exported model (it has no config.json)")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: it has no safetensors; other weights are not read")
    index: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                index |= dict.fromkeys(handle.keys(), file)
        except Exception as error:  # safetensors has exceptions of its own
            raise ValueError(f"{file}: no readable safetensors ({error})") from error
    return index


def _check_alike(paths: Sequence[Path], indexes: Sequence[dict[str, Path]]) -> None:
    """Refuse other architectures, tensors or shapes before anything is written."""
    architectures = [
        json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures")
        for path in paths
    ]
    shapes = [_shapes(index) for index in indexes]
    for path, architecture, own in zip(paths[1:], architectures[1:], shapes[1:], strict=True):
        what = f"{path} cannot be merged with {paths[0]}"
        if architecture != architectures[0]:
            raise ValueError(f"{what}: its architecture is {architecture}, not {architectures[0]}")
        for name in sorted(shapes[0].keys() | own.keys()):
            if own.get(name) != shapes[0].get(name):
                first, second = (s.get(name, "missing") for s in (shapes[0], own))
                raise ValueError(f"{what}: {name} is {second} there and {first} here")


def _shapes(index: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in dict.fromkeys(index.values()):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                shapes[name] = tuple(handle.get_slice(name).get_shape())
    return shapes


def _write(merged: Any, folder: Path, max_bytes: int) -> None:
    """Shards of at most ``max_bytes``, named and indexed as ``transformers`` reads them."""
    shards: list[list[str]] = []
    open_shard: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        nonlocal open_shard, size
        save_file(open_shard, folder / f"part-{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(open_shard))
        open_shard, size = {}, 0

    for name, tensor in merged:
        bytes_here = tensor.numel() * tensor.element_size()
        if open_shard and size + bytes_here > max_bytes:
            close()
        open_shard[name] = tensor.contiguous()
        size, total = size + bytes_here, total + bytes_here
    close()
    if len(shards) == 1:
        os.replace(folder / "part-0.safetensors", folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for place, names in enumerate(shards):
        file = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"part-{place}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
