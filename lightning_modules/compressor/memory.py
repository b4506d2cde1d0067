"""What a batch of texts was compressed to, and the null models that read another memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Control = Literal["none", "shuffled", "zero"]
KeysValues = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Memory:
    """Memory vectors of B texts; M is the memory of the text with most segments.

    Args:
        hidden: ``(B, M, d_c)`` the compressor's last hidden states, H, zero off the mask.
        mask: ``(B, M)`` True on memory vectors; rows are filled from the left.
        embeds: ``(B, M, d_d)`` what the decoder reads, Z; None with ``form=kv``.
        keys_values: Keys and values ``(B, heads, M, d_head)`` of every layer; None with
            ``form=embeds``.
        num_short: Segments that had fewer tokens than memory vectors.
    """

    hidden: Tensor
    mask: Tensor
    embeds: Tensor | None = None
    keys_values: KeysValues | None = None
    num_short: int = 0

    def __len__(self) -> int:
        return len(self.mask)

    def stacked(self, part: Literal["hidden", "embeds"] = "embeds") -> Tensor:
        """All memory vectors ``(S, d)`` of the batch, for ranks and spectra.

        Args:
            part: ``hidden`` is H, before the projector; ``embeds`` is Z, behind it.

        Raises:
            ValueError: Z of ``form=kv``, which has none.
        """
        values = self.hidden if part == "hidden" else self.embeds
        if values is None:
            raise ValueError(
                "model.memory.form='kv' has no Z behind a projector: use part='hidden'"
            )
        return values[self.mask]

    def select(self, rows: Tensor) -> Memory:
        """The memories of some rows.

        Args:
            rows: ``(R,)`` row numbers.
        """
        pairs = self.keys_values
        return replace(
            self,
            hidden=self.hidden[rows],
            mask=self.mask[rows],
            embeds=None if self.embeds is None else self.embeds[rows],
            keys_values=None if pairs is None else tuple((k[rows], v[rows]) for k, v in pairs),
        )

    def detach(self) -> Memory:
        """The same without gradients."""
        return self._mapped(lambda value: value.detach())

    def zero(self) -> Memory:
        """Zeros in place of everything, as long as before."""
        return self._mapped(lambda value: value.new_zeros(value.shape))

    def _mapped(self, change: Any) -> Memory:
        pairs = self.keys_values
        return replace(
            self,
            hidden=change(self.hidden),
            embeds=None if self.embeds is None else change(self.embeds),
            keys_values=None if pairs is None else tuple((change(k), change(v)) for k, v in pairs),
        )


def controlled(memory: Memory, control: Control) -> Memory:
    """The memory that a null model reads (card, sections 2.1 and 6).

    Args:
        memory: Of a batch.
        control: ``none`` leaves it; ``shuffled`` gives every row the memory of the row after it,
            never its own; ``zero`` gives zeros.

    Raises:
        ValueError: The control is unknown, or a batch of one text is to be shuffled.
    """
    if control == "none":
        return memory
    if control == "zero":
        return memory.zero()
    if control != "shuffled":
        raise ValueError(f"memory_control={control!r}: give one of none, shuffled, zero")
    if len(memory) < 2:
        raise ValueError("memory_control='shuffled' needs at least two texts a batch")
    rows = torch.arange(1, len(memory) + 1, device=memory.mask.device) % len(memory)
    return memory.select(rows)


def head_is_tied(config: Any) -> bool:
    """Whether a model's head is its input embeddings: a size sweep should not mix both kinds.

    Small models of a family often tie them and larger ones do not (card, section 8).

    Args:
        config: Of a Hugging Face model.

    Example:
        >>> from transformers import Qwen3Config
        >>> head_is_tied(Qwen3Config(tie_word_embeddings=True))
        True
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "tie_word_embeddings", False))
