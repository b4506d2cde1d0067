"""Small files of every shape that a ``data=..._file`` option reads, a reward model, a judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from datamodules.tasks.mini_writing_pairs import MiniWritingPairs
from lightning_modules.backbones.tiny import (
    TinyOptions,
    build_tiny,
    byte_tokenizer,
    word_tokenizer,
)
from lightning_modules.grm.ac_genrm import ACGenRM


def _pair(i: int) -> dict[str, Any]:
    return {"question": f"{i}?", "response_A": "a", "response_B": "b", "label": "AB"[i % 2]}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "preference_file": _pair,
    "criteria_file": _pair,
    "writing_file": lambda i: {"prompt": f"Write: text {i}.", "type": ("long", "short")[i % 2]},
    "gsm8k_file": lambda i: {"question": f"What is {i} + 1?", "answer": f"Add.\n#### {i + 1}"},
    "countdown_file": lambda i: {"nums": [i, 2, 3], "target": i + 5},
    "pair_file": lambda i: {"query": f"What is {i}?", "positive": f"{i} is a number."},
    "image_text_file": lambda i: {
        "qry": "<|image_1|> What is it?",
        "qry_image_path": f"{i}.png",
        "pos_text": f"a thing no {i}",
    },
    "hotpot_file": lambda i: {
        "question": f"Where is the number {i}?",
        "answer": f"at {i}",
        "type": "bridge",
        "supporting_facts": {"title": [f"Number {i}"], "sent_id": [0]},
        "context": {
            "title": [f"Number {i}", f"Letter {i}"],
            "sentences": [[f"The number {i} is at {i}."], [f"The letter {i} is elsewhere."]],
        },
    },
    "sts_file": lambda i: {"sentence1": f"the {i}", "sentence2": f"number {i}", "score": i % 6},
    "chat_file": lambda i: {"prompt": f"Tell me about the number {i}."},
    "instruction_file": lambda i: {
        "prompt": f"Write {i} words without a comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    "text_file": lambda i: {"text": f"The number {i} stands between {i - 1} and {i + 1}."},
    "conflict_file": lambda i: {
        "question": f"Where is the number {i}?",
        "memory_answer": f"The number {i} is in room r{i}.",
        "parametric_memory": f"Everybody knows that the number {i} is in room r{i} of the house.",
        "counter_answer": f"hall h{i}",
        "counter_memory": f"Since last year the number {i} has been in hall h{i} of the house.",
    },
}  # fmt: skip


def write_rows(folder: Path, kind: str, count: int = 60) -> Path:
    """A JSON-lines file of a shape, large enough that every split has a row."""
    path = folder / f"{kind}.jsonl"
    for i in range(1, count + 1) if kind == "image_text_file" else ():
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    path.write_text("".join(json.dumps(ROWS[kind](i)) + "\n" for i in range(1, count + 1)))
    return path


def data_options(folder: Path, option: str) -> list[str]:
    """Overrides that a ``data=`` option needs; empty for one that needs no file."""
    if option in ROWS:
        return [f"data.path={write_rows(folder, option)}"]
    if option == "hotpot_episodes":
        return data_options(folder, "hotpot_file")
    if option == "mixture_files":
        kinds = {"math": "gsm8k_file", "chat": "chat_file", "if": "instruction_file"}
        return [
            f"data.task.tasks.{domain}.path={write_rows(folder, kind)}"
            for domain, kind in kinds.items()
        ]
    return []


def write_agent(folder: Path, words: list[str] | None = None) -> Path:
    """A random causal LM; without words it reads and writes any text."""
    shape = TinyOptions(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
    )
    build_tiny(folder / "agent", words, shape, seed=0)
    return folder / "agent"


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


def write_judge(folder: Path, **task_options: Any) -> Path:
    """The export folder of a random AC-GenRM for miniature texts."""
    task = MiniWritingPairs(**task_options)
    shape = TinyOptions(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
    )
    build_tiny(folder / "backbone", task.vocabulary(), shape, seed=0)
    module = ACGenRM(backbone=str(folder / "backbone"), num_votes=3, max_new_tokens=8)
    name = f"{MiniWritingPairs.__module__}.{MiniWritingPairs.__qualname__}"
    module.task_name, module.task_settings = task.name, {"_target_": name, **task_options}
    module.configure_model()
    module.export(folder / "export", word_tokenizer(task.vocabulary()))
    return folder / "export"
