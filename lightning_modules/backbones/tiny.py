"""Tiny backbones built in code: ordinary architectures, so plain tools load what we export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from datamodules.word_tokenizer import byte_tokenizer as byte_tokenizer
from datamodules.word_tokenizer import word_tokenizer as word_tokenizer


@dataclass
class TinyOptions:
    """Shape of a small Qwen3.

    Args:
        hidden_size: Width.
        intermediate_size: Width of the MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        max_positions: Longest sequence (tokens).
        tie_embeddings: One matrix for input embeddings and head.
        init_std: Standard deviation of random weights [Qwen3: 0.02].
    """

    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 16
    max_positions: int = 2048
    tie_embeddings: bool = False
    init_std: float = 0.02


def build_tiny(
    folder: str | Path,
    words: Sequence[str] | None,
    options: TinyOptions,
    seed: int,
    embeddings: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a random Qwen3 and its tokenizer as a Hugging Face folder.

    Args:
        folder: Where to.
        words: Vocabulary of a word-level tokenizer; None makes a byte-level one.
        options: Shape.
        seed: Of the weights.
        embeddings: Input-embedding rows ``(hidden_size,)`` that words start from instead of random
            ones, for tasks in which the meaning of words matters.
    """
    tokenizer = byte_tokenizer() if words is None else word_tokenizer(words)
    config: Any = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=options.max_positions,
        tie_word_embeddings=options.tie_embeddings,
        initializer_range=options.init_std,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    table: Any = model.get_input_embeddings().weight.data
    for word, row in (embeddings or {}).items():
        table[tokenizer.convert_tokens_to_ids(word)] = row.to(table)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
