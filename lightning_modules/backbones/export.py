"""A trained policy as a plain Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_modules.backbones.causal_lm import CausalLM


def full_state(policy: CausalLM) -> dict[str, Tensor]:
    """State dict of the Hugging Face model on the CPU, sharded weights gathered, adapters merged.

    Under sharding every rank must call it; each tensor is gathered and moved before the next.
    """
    deltas: dict[str, Tensor] = {}
    base = policy.base
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter).detach()
                key = f"{name}.weight"
                deltas[key] = deltas[key] + delta if key in deltas else delta
    state: dict[str, Tensor] = {}
    for name, value in base.state_dict().items():
        if "lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        value = value.detach()
        if name in deltas:
            value = value + deltas[name].to(value.dtype)
        gather = getattr(value, "full_tensor", None)
        state[name] = (gather() if gather is not None else value).cpu().clone()
    return state


def backbone_files(path: str) -> dict[str, str]:
    """Texts of a backbone's tokenizer and generation defaults, by file name.

    Args:
        path: Folder or hub name.
    """
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
        defaults = Path(path, "generation_config.json")
        if defaults.is_file():
            shutil.copy(defaults, folder)
        files = [file for file in Path(folder).iterdir() if file.is_file()]
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(files)}


def export_hf(
    policy: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    info: dict[str, Any] | None = None,
    is_writer: bool = True,
) -> None:
    """Write weights, configuration and tokenizer; plain ``transformers`` reloads the folder.

    Args:
        policy: What to export.
        tokenizer: Goes along.
        folder: Replaced as a whole once everything is written.
        info: Written to ``litpost.json``: what the model was trained on.
        is_writer: Whether this rank writes (all ranks must call under sharding).
    """
    state = full_state(policy)
    if not is_writer:
        return
    target = Path(folder)
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    policy.base.save_pretrained(unfinished, state_dict=state)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "litpost.json").write_text(json.dumps(info or {}, indent=1) + "\n")
    if target.exists():
        shutil.rmtree(target)
    os.replace(unfinished, target)
