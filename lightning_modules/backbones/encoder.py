"""A Hugging Face encoder (or a decoder read as one) that gives one vector an item."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel

from lightning_modules.backbones.export import stream_weights
from lightning_modules.backbones.loading import add_lora, load_pretrained
from lightning_modules.backbones.sharding import gathered
from lightning_modules.functional.attention_masks import additive, bidirectional_mask
from lightning_modules.options import BackboneOptions, LoraOptions

Attention = Literal["own", "bidirectional"]


class TextEncoder(nn.Module):
    """Wraps a Hugging Face model without a head, or a PEFT model of one.

    Args:
        model: Gives ``last_hidden_state``.
        attention: ``own`` leaves it as the model has it (BERT: everything sees everything; a
            decoder: causal); ``bidirectional`` lets a decoder's tokens see all others.
    """

    def __init__(self, model: Any, attention: Attention = "own") -> None:
        super().__init__()
        self.model = model
        self.attention = attention

    @property
    def base(self) -> Any:
        """The Hugging Face model itself, adapters or not."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether PEFT wraps the model."""
        return hasattr(self.model, "peft_config")

    @property
    def config(self) -> Any:
        """Configuration of the Hugging Face model."""
        return self.base.config

    @cached_property
    def most_tokens(self) -> int | None:
        """Tokens that a table of learned positions (BERT's, RoBERTa's) has room for; None without
        one."""
        tables = [
            part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
            for name, part in self.base.named_modules()
            if name.endswith("position_embeddings") and isinstance(part, nn.Embedding)
        ]
        return min(tables, default=None)

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return int(self.config.get_text_config().hidden_size)

    @contextmanager
    def gathered(self) -> Iterator[bool]:
        """Inside the block a sharded encoder is whole on every rank, where that fits."""
        with gathered(self) as is_whole:
            yield is_whole

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under their Hugging Face names, one at a time; see ``stream_weights``."""
        return stream_weights(self)

    def forward(self, input_ids: Tensor, mask: Tensor, pool: Tensor) -> Tensor:
        """Vectors: the mean of the last hidden states of the pooled tokens.

        Args:
            input_ids: ``(n, L)``, padded on the right.
            mask: ``(n, L)`` bool, True on tokens.
            pool: ``(n, L)`` bool, True on at least one token a row.

        Returns:
            ``(n, d)``, not normalised; float32 or wider.

        Raises:
            ValueError: There are more tokens than learned positions.
        """
        if self.most_tokens is not None and input_ids.shape[1] > self.most_tokens:
            raise ValueError(
                f"a text of {input_ids.shape[1]} tokens, and this backbone has positions for "
                f"{self.most_tokens}: lower data.encoding.max_query_tokens and max_passage_tokens"
            )
        hidden = self.model(**self.inputs(input_ids, mask)).last_hidden_state
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weights = pool.to(wide.dtype)
        return (wide * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)

    def inputs(self, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Keywords of the forward pass.

        Args:
            input_ids: ``(n, L)``.
            mask: ``(n, L)`` bool.
        """
        if self.attention == "own":
            return {"input_ids": input_ids, "attention_mask": mask.long()}
        return {
            "input_ids": input_ids,
            "attention_mask": additive(bidirectional_mask(mask), self.base.dtype),
            "position_ids": torch.arange(mask.shape[1], device=mask.device)[None],
            "use_cache": False,
        }


def load_encoder(
    options: BackboneOptions, lora: LoraOptions | None = None, *, attention: Attention = "own"
) -> TextEncoder:
    """Load a folder or hub name without its head, put adapters on it where asked.

    Args:
        options: Of the backbone.
        lora: Of the adapters; None trains all parameters.
        attention: See ``TextEncoder``.

    Raises:
        ValueError: The folder is missing or has no model that ``AutoModel`` knows.
    """
    with _without_pooler(options) as extra:
        model = load_pretrained(AutoModel, options, "an encoder", **extra)
    if attention == "bidirectional":
        model.config.is_causal = False  # exported, so that transformers reads it as we do
    if lora is not None:
        model = add_lora(model, lora, "FEATURE_EXTRACTION")
    return TextEncoder(model, attention).train()  # transformers loads in eval mode


@contextmanager
def _without_pooler(options: BackboneOptions) -> Iterator[dict[str, Any]]:
    """What makes BERT and its kin come without a pooling layer, of no use here, and in silence."""
    cls = _class_of(options)
    if cls is None or "add_pooling_layer" not in inspect.signature(cls).parameters:
        yield {}
        return
    before = cls._keys_to_ignore_on_load_unexpected
    cls._keys_to_ignore_on_load_unexpected = [*(before or []), r"(^|\.)pooler\."]
    try:
        yield {"add_pooling_layer": False}
    finally:
        cls._keys_to_ignore_on_load_unexpected = before


def _class_of(options: BackboneOptions) -> Any:
    """The class that ``AutoModel`` would load; None where there is no one such."""
    try:
        config = AutoConfig.from_pretrained(
            options.path,
            trust_remote_code=options.trust_remote_code,
            revision=options.revision or "main",
        )
        cls: Any = MODEL_MAPPING[type(config)]
    except (OSError, ValueError, KeyError):
        return None  # loading says what is wrong
    return cls if inspect.isclass(cls) else None
