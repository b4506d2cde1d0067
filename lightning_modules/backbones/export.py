"""A trained policy as a plain Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def stream_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights of the Hugging Face model by name, one at a time: gathered, adapters merged.

    Under sharding every rank must walk all of it. A tensor that needed neither gathering nor
    merging is the live one, so copy what you keep.

    Args:
        policy: A ``CausalLM``, ``TextEncoder`` or whatever else has ``base``.

    Example:
        >>> dict(stream_weights(policy))["lm_head.weight"].shape  # doctest: +SKIP
        torch.Size([83, 64])
    """
    base = policy.base
    adapted = {
        f"{name}.base_layer.weight": module
        for name, module in base.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    for name, value in base.state_dict().items():
        if "lora_" in name:
            continue
        value = value.detach()
        module = adapted.get(name)
        if module is not None:
            for adapter in module.active_adapters:
                value = value + module.get_delta_weight(adapter).detach().to(value.dtype)
        gather = getattr(value, "full_tensor", None)
        yield name.replace(".base_layer.", "."), gather() if gather is not None else value


def backbone_files(path: str) -> dict[str, str]:
    """Texts of a backbone's tokenizer, image processor and generation defaults, by file name.

    Args:
        path: Folder or hub name.
    """
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
        for name in ("generation_config.json", "preprocessor_config.json"):
            if Path(path, name).is_file():
                shutil.copy(Path(path, name), folder)
        files = [file for file in Path(folder).iterdir() if file.is_file()]
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(files)}


def export_hf(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    info: dict[str, Any] | None = None,
    is_writer: bool = True,
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Write weights, configuration and tokenizer; plain ``transformers`` reloads the folder.

    Args:
        policy: What to export.
        tokenizer: Goes along.
        folder: Replaced as a whole once everything is written.
        info: Written to ``litpost.json``: what the model was trained on.
        is_writer: Whether this rank writes (all ranks must call under sharding).
        extras: Adds files before the folder is renamed.
    """
    state = {}
    for name, value in stream_weights(policy):  # every rank takes part in gathering
        if is_writer:
            state[name] = value.cpu().clone()
    if not is_writer:
        return
    target = Path(folder)
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    policy.base.save_pretrained(unfinished, state_dict=state)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "litpost.json").write_text(json.dumps(info or {}, indent=1) + "\n")
    if extras is not None:
        extras(unfinished)
    if target.exists():
        shutil.rmtree(target)
    os.replace(unfinished, target)
