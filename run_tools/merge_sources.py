"""Exported folders to merge: where each tensor is, and whether the folders go together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from run_tools.merge_output import INDEX, Spec

#: Keys of config.json that change what a model computes but no shape; compared where both have one.
_SAME = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
    "rope_theta",
)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
#: Parts of tokenizer.json that its last use has set, and that encode nothing.
_STATE = ("padding", "truncation")


@dataclass
class Source:
    """One folder with dense weights.

    Args:
        path: The folder.
        config: Its ``config.json``.
        index: Tensor name to the file that holds it; of tied weights the first name only.
        specs: Tensor name to dtype and shape.
    """

    path: Path
    config: Mapping[str, Any]
    index: dict[str, Path]
    specs: dict[str, Spec]

    def read(self, name: str) -> Tensor:
        """One tensor.

        The file is opened for it alone: an open one keeps every page that was ever read in memory,
        which would add up to whole models.
        """
        with safe_open(self.index[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_source(folder: str | Path) -> Source:
    """Look into a folder; no tensor stays in memory.

    Exports of LoRA runs are dense: the adapters are folded into the weights as they are written. So
    a folder with adapters comes from elsewhere and is refused: merging ``A`` and ``B`` apart would
    give a product of means.

    Args:
        folder: With ``config.json`` and safetensors.

    Raises:
        ValueError: There is no model, it is an adapter, or its weights cannot be read.
    """
    path = Path(folder)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path}: it holds adapters (adapter_config.json), not a whole model; export it folded "
            f"(export/ of a LoRA run is, elsewhere PEFT's merge_and_unload does it) and merge that"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no exported model (it has no config.json)")
    index: dict[str, Path] = {}
    specs: dict[str, Spec] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    index[name] = file
                    about = handle.get_slice(name)
                    specs[name] = Spec(about.get_dtype(), tuple(about.get_shape()))
        except Exception as error:  # safetensors has exceptions of its own
            raise ValueError(f"{file}: no readable safetensors ({error})") from error
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    source = Source(path, config, index, specs)
    if config.get("tie_word_embeddings"):
        _drop_tied_head(source)
    return source


def check_alike(sources: Sequence[Source], starts: Sequence[Source] = ()) -> None:
    """Refuse models of different architectures, tensors, shapes or tokenizers.

    Args:
        sources: Of models that are to be merged.
        starts: Of the model that they started from, or are measured from. It may hold more than
            they do, such as the pooling layer of a BERT, which exports leave out.

    Raises:
        ValueError: Names the folders, and the first difference.
    """
    first = sources[0]
    for place, source in enumerate([*sources[1:], *starts], start=1):
        what = f"{source.path} cannot be merged with {first.path}"
        architectures = [one.config.get("architectures") for one in (first, source)]
        if architectures[0] != architectures[1]:
            raise ValueError(
                f"{what}: its architecture is {architectures[1]}, not {architectures[0]}"
            )
        more = source.specs.keys() if place < len(sources) else set()
        for name in sorted(first.specs.keys() | more):
            here, there = (_shape(one, name) for one in (first, source))
            if here != there:
                raise ValueError(f"{what}: {name} is {there} there and {here} here")
        for key in _SAME:
            values = [_settings(one.config).get(key) for one in (first, source)]
            if None not in values and values[0] != values[1]:
                raise ValueError(f"{what}: its {key} is {values[1]}, not {values[0]}")
    _check_tokenizers([source.path for source in (*sources, *starts)])


def parts_of(folder: Path) -> list[str]:
    """Sub-folders that ``modules.json`` of sentence-transformers names, such as ``1_Pooling``.

    Args:
        folder: Of a model.

    Raises:
        ValueError: One holds weights: they would not be merged.
    """
    file = folder / "modules.json"
    named = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    parts = [str(one.get("path", "")) for one in named if isinstance(one, dict)]
    own = [part for part in parts if Path(part).name == part and part not in ("", "..")]
    found = [part for part in own if (folder / part).is_dir()]
    for part in found:
        if weights := sorted(one for one in (folder / part).rglob("*") if one.suffix in WEIGHTS):
            raise ValueError(f"{weights[0]}: only the model of a folder is merged, not this part")
    return found


def _shape(source: Source, name: str) -> tuple[int, ...] | str:
    return source.specs[name].shape if name in source.specs else "missing"


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a configuration, with those of its language model and of its rotary embedding."""
    own = {**config, **(config.get("text_config") or {})}
    return {**own, **(own.get("rope_parameters") or {}), "model_type": config.get("model_type")}


def _weight_files(folder: Path) -> list[Path]:
    """The files that ``transformers`` would read, or all safetensors under names of their own."""
    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(named))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: it has no safetensors; other weights are not read")
    return files


def _drop_tied_head(source: Source) -> None:
    """Some tools write a tied head as well as the embeddings: it is merged with these, once."""
    head = "lm_head.weight"
    if head not in source.index:
        return
    for name in source.index:
        is_input = name != head and name.endswith("embed_tokens.weight")
        if is_input and _shape(source, name) == _shape(source, head):
            if not torch.equal(source.read(name), source.read(head)):
                raise ValueError(
                    f"{source.path}: config.json ties {head} to {name}, but they differ"
                )
            del source.index[head], source.specs[head]
            return


def _check_tokenizers(paths: Sequence[Path]) -> None:
    # where all have it, it is what is read, whatever older files lie beside it
    is_fast = all((path / _TOKENIZERS[0]).is_file() for path in paths)
    for file in _TOKENIZERS[:1] if is_fast else _TOKENIZERS:
        groups: dict[str, list[Path]] = {}
        for path in paths:
            groups.setdefault(_content(path / file), []).append(path)
        if len(groups) > 1:
            parts = [
                " and ".join(map(str, dict.fromkeys(group))) + ("" if text else " (which has none)")
                for text, group in groups.items()
            ]
            raise ValueError(
                f"the tokenizers differ in {file}: {'; '.join(parts)}. Rows of the embeddings "
                f"would be averaged over different tokens"
            )


def _content(file: Path) -> str:
    """What a tokenizer's file says; empty if there is none."""
    if not file.is_file():
        return ""
    if file.suffix != ".json":
        return file.read_bytes().hex()
    said = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "tokenizer.json":
        said = {key: value for key, value in said.items() if key not in _STATE}
    return json.dumps(said, sort_keys=True)
