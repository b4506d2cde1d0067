"""Exported folders merged into one: experts of single domains, or bags of rows, become one model.

Weights are read from safetensors and written in shards, one tensor of every model at a time;
nothing is unpickled. Memory is that of the largest tensor in all models, and of a few copies of it.
Configuration and tokenizer are those of the first folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.prepared import fingerprint, prepare
from lightning_modules.functional.merge_figures import MergeFigures, MergeReport
from lightning_modules.functional.merging import (
    METHODS,
    argument_problems,
    merge_tensors,
    used_weights,
)
from lightning_modules.options import MergeOptions, read_options
from run_tools.merge_output import INDEX, write_shards
from run_tools.merge_sources import WEIGHTS, Source, check_alike, open_source, parts_of

_REPORT = "merge.json"
_OWN_FILES = ("litpost.json", "prepared.json", "pytorch_model.bin.index.json", _REPORT, INDEX)


def merge_folders(
    folders: Sequence[str | Path],
    output: str | Path,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    *,
    base: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    reference: str | Path | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> Path:
    """Merge Hugging Face folders of one architecture into a new folder.

    The folders hold dense weights, as exports do (those of LoRA runs are folded). The figures of
    the merge go to ``merge.json`` in ``output``; ``read_report`` reads them.

    Args:
        folders: Exports to merge, e.g. ``outputs/mgs/s0/arms/only_math/export``.
        output: The new folder; one that holds files is refused.
        method: A name of ``functional.merging.METHODS``.
        weights: One a folder, in any proportion; None for equal ones.
        base: Folder of the model that all started from. Task arithmetic, TIES and DARE need it;
            with one the others merge task vectors too, which changes slerp, multislerp and karcher.
        options: Of the method, such as ``density``, and ``one_d``.
        reference: Folder that the figures measure distances and task vectors from, ``base`` unless
            given; it does not change the merge.
        max_shard_bytes: Bytes of a file of weights at most (a larger tensor has its own).

    Returns:
        ``output``.

    Raises:
        ValueError: Fewer than two folders (one will do where the method needs a base), one without
            safetensors, with adapters or with weights beside its model, different architectures,
            tensors, shapes or tokenizers (the first difference is named), a missing base, an
            unknown option, values that are not finite, or ``output`` holds files.

    Example:
        >>> merge_folders(["math/export", "chat/export"], "merged")  # doctest: +SKIP
    """
    paths, target = [Path(folder) for folder in folders], Path(output)
    if len(paths) < fewest_models(method):
        raise ValueError(f"backbone.merge names {len(paths)} folders; two or more are needed")
    if is_taken(target):
        raise ValueError(f"{target} is there already and is not empty; name a new folder")
    problems = argument_problems(
        method, len(paths), weights=weights, has_base=base is not None, options=options
    )
    if problems:
        raise ValueError("; ".join(problems))
    models = [open_source(path) for path in paths]
    start = None if base is None else open_source(base)
    measured = start if reference is None else open_source(reference)
    check_alike(models, [one for one in (start, measured) if one is not None])
    parts = parts_of(paths[0])
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    info = {
        "merged": [str(path) for path in paths],
        "method": method,
        "weights": used_weights(weights, len(paths), options),
        "base": None if base is None else str(base),
        "options": dict(options or {}),
    }
    try:
        report = _merge(models, start, measured, info, unfinished, max_shard_bytes)
        for file in sorted(paths[0].iterdir()):
            if file.is_file() and file.suffix not in WEIGHTS and file.name not in _OWN_FILES:
                shutil.copy(file, unfinished)
        for part in parts:
            shutil.copytree(paths[0] / part, unfinished / part)
        (unfinished / "litpost.json").write_text(json.dumps(info, indent=1) + "\n")
        told = {"reference": None if measured is None else str(measured.path), **asdict(report)}
        (unfinished / _REPORT).write_text(json.dumps(info | told, indent=1) + "\n")
        os.replace(unfinished, target)  # an empty folder in its place is replaced too
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def fewest_models(method: str) -> int:
    """How many models a merge needs: of task vectors one is enough, to scale or take it away."""
    return 1 if method in METHODS and METHODS[method].needs_base else 2


def is_taken(folder: Path) -> bool:
    """Whether something is there that a new folder would replace."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def read_report(folder: str | Path) -> MergeReport:
    """Figures of a merged folder.

    Args:
        folder: Made by ``merge_folders``.

    Raises:
        FileNotFoundError: It has no ``merge.json``.
    """
    said = json.loads(Path(folder, _REPORT).read_text(encoding="utf-8"))
    return MergeReport(**{name: said[name] for name in asdict(MergeReport())})


def prepare_merge(options: Mapping[str, Any], cache_dir: str | Path) -> Path:
    """Folder of the merge that ``backbone.merge`` asks for, made at most once.

    Args:
        options: ``folders``, and where wanted ``method``, ``weights``, ``base`` and ``options``.
        cache_dir: Where prepared folders live.

    Raises:
        ValueError: An unknown key, no folders, or folders that cannot be merged.
    """
    asked = read_options(MergeOptions, options, "backbone.merge")
    folders, method, weights = [str(one) for one in asked.folders], asked.method, asked.weights
    every = [*folders, *([] if asked.base is None else [asked.base])]
    if missing := [folder for folder in every if not _is_export(Path(folder))]:
        raise ValueError(
            f"backbone.merge.folders: {missing[0]} is no exported model; train it first (a run's "
            f"export/ folder)"
        )
    material: dict[str, Any] = {
        "folders": [fingerprint(f) for f in folders],
        "method": method,
        "weights": weights,
    }
    if asked.base is not None:
        material["base"] = fingerprint(asked.base)
    if asked.options:
        material["options"] = dict(asked.options)

    def build(folder: Path) -> None:
        merge_folders(folders, folder, method, weights, base=asked.base, options=asked.options)

    return prepare(cache_dir, "merged", material, build)


def _is_export(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _merge(
    models: Sequence[Source],
    base: Source | None,
    reference: Source | None,
    info: Mapping[str, Any],
    folder: Path,
    max_shard_bytes: int,
) -> MergeReport:
    """Write the merged weights into ``folder`` and measure them on the way."""
    figures = MergeFigures(info["weights"])

    def observe(
        name: str, tensors: Sequence[Tensor], base_tensor: Tensor | None, merged: Tensor
    ) -> None:
        origin = base_tensor
        if reference is not None and reference is not base:
            origin = reference.read(name)
        figures.add(name, tensors, merged, base=base_tensor, reference=origin)

    def merged(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return merge_tensors(
            names,
            lambda model, name: models[model].read(name),
            len(models),
            method=info["method"],
            weights=info["weights"],
            read_base=None if base is None else base.read,
            options=info["options"],
            observe=observe,
        )

    write_shards(models[0].specs, merged, folder, max_shard_bytes)
    return figures.report()
