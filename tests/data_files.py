"""Small files of every shape that a ``data=..._file`` option reads, and a tiny reward model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Qwen3Config, Qwen3ForSequenceClassification

from lightning_modules.backbones.tiny import byte_tokenizer

ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "preference_file": lambda i: {
        "question": f"{i}?", "response_A": "a", "response_B": "b", "label": "AB"[i % 2],
    },
    "gsm8k_file": lambda i: {"question": f"What is {i} + 1?", "answer": f"Add.\n#### {i + 1}"},
    "countdown_file": lambda i: {"nums": [i, 2, 3], "target": i + 5},
    "chat_file": lambda i: {"prompt": f"Tell me about the number {i}."},
    "instruction_file": lambda i: {
        "prompt": f"Write {i} words without a comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
}  # fmt: skip


def write_rows(folder: Path, kind: str, count: int = 60) -> Path:
    """A JSON-lines file of a shape, large enough that every split has a row."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(ROWS[kind](i)) + "\n" for i in range(1, count + 1)))
    return path


def data_options(folder: Path, option: str) -> list[str]:
    """Overrides that a ``data=`` option needs; empty for one that needs no file."""
    if option in ROWS:
        return [f"data.path={write_rows(folder, option)}"]
    if option == "mixture_files":
        kinds = {"math": "gsm8k_file", "chat": "chat_file", "if": "instruction_file"}
        return [
            f"data.task.tasks.{domain}.path={write_rows(folder, kind)}"
            for domain, kind in kinds.items()
        ]
    return []


def write_reward_model(folder: Path) -> Path:
    """A random sequence-classification Qwen3 with a byte-level tokenizer."""
    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
