"""The decoder's side: a context read behind a memory, once or token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lightning_modules.backbones.causal_lm import CausalLM
from lightning_modules.compressor.memory import Memory
from lightning_modules.compressor.segments import Packed, pack


@dataclass
class Read:
    """A context that a decoder has read, and where it stands.

    Args:
        packed: The vectors that were read.
        hidden: ``(B, L, d)`` last hidden states.
        cache: Keys and values, or None.
        mask: ``(B, L_memory + L)`` True on what the cache holds; None where that is everything.
        positions: ``(B,)`` position of the next token.
    """

    packed: Packed
    hidden: Tensor
    cache: Any
    mask: Tensor | None
    positions: Tensor

    def last(self) -> Tensor:
        """``(B, d)`` hidden states that predict the next token, of a context that goes on."""
        return self.hidden[:, -1]

    def step(self, decoder: CausalLM, embeds: Tensor) -> Tensor:
        """Read one more vector ``(B, 1, d)`` a row: hidden states ``(B, d)`` behind it."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        output = body_of(decoder)(
            inputs_embeds=embeds,
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        return output.last_hidden_state[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, for ``step``."""
        self.cache.batch_select_indices(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        self.positions = self.positions[rows]


def read(
    decoder: CausalLM,
    memory: Memory,
    parts: Sequence[tuple[Tensor, Tensor]],
    *,
    use_cache: bool = False,
) -> Read:
    """Run the decoder's layers over the parts, behind the memory's keys and values if it has some.

    Args:
        decoder: Its body is run, not its head.
        memory: Of the rows.
        parts: As in ``pack``.
        use_cache: Whether one will go on token by token.

    Raises:
        ValueError: More vectors than the decoder has positions for.
    """
    packed = pack(parts, pad_left=use_cache)
    cache, mask = None, packed.mask
    offset = torch.zeros_like(mask.sum(1))
    if memory.keys_values is not None:
        cache, offset = _cache_of(decoder, memory), memory.mask.sum(1)
        mask = torch.cat([memory.mask, packed.mask], 1)
    elif use_cache:
        cache = DynamicCache(config=decoder.config)
    _check_length(decoder, mask.shape[1])
    # causal attention never looks at padding on the right
    hides = mask if use_cache else memory.mask[:, : mask.shape[1] - packed.mask.shape[1]]
    needs_mask = not bool(hides.all())
    positions = offset[:, None] + (packed.mask.cumsum(1) - 1).clamp(min=0)
    output = body_of(decoder)(
        inputs_embeds=packed.embeds,
        attention_mask=mask if needs_mask else None,
        position_ids=positions if needs_mask else None,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    kept = mask if needs_mask else None
    ends = offset + packed.mask.sum(1)
    return Read(packed, output.last_hidden_state, cache, kept, ends)


def body_of(model: CausalLM) -> Any:
    """The Hugging Face model without its head, adapters in place."""
    return model.base.base_model


def has_full_attention(config: Any) -> bool:
    """Whether every layer's tokens see all tokens before them, so that keys can be handed over.

    Example:
        >>> from transformers import LlamaConfig
        >>> has_full_attention(LlamaConfig())
        True
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and getattr(text, "sliding_window", None) is None


def start_token(decoder: CausalLM) -> int:
    """The token that a text starts with where there is no prompt: BOS, or EOS without one.

    Raises:
        ValueError: The model has neither.
    """
    config = decoder.config.get_text_config()
    for value in (config.bos_token_id, config.eos_token_id):
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    raise ValueError("model.memory.form='kv' needs a decoder with a BOS or an EOS token")


def _cache_of(decoder: CausalLM, memory: Memory) -> Any:
    """A new cache that holds the memory; the memory itself stays as it is."""
    cache = DynamicCache(config=decoder.config)
    assert memory.keys_values is not None
    for layer, (keys, values) in enumerate(memory.keys_values):
        cache.update(keys, values, layer)
    return cache


def _check_length(decoder: CausalLM, length: int) -> None:
    most = getattr(decoder.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(
            f"memory, prompt and text are {length} tokens, and the decoder has positions for "
            f"{most}: lower data.max_tokens"
        )
