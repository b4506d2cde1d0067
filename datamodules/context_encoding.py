"""From contexts to token ids: for two tokenizers, with slots found by characters, words hidden.

The compressor reads the source with its own tokenizer, the decoder writes the target with its own;
neither side adds special tokens but the one EOS that ends a target. What hides a source token
never touches the target [card, section 9: as RetroMAE masks its encoder].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.tasks.compression import MASK, Context, Probe

LongPolicy = Literal["error", "cut"]
MaskKind = Literal["mask", "random"]
Spans = Sequence[tuple[int, int]]


@dataclass
class CompressionBatch:
    """Sources and targets of B contexts, padded on the right.

    Padding is never to be learned: ``target_mask`` is False on it, also where the padding token is
    the EOS token.

    Args:
        source_ids: ``(B, n)`` for the compressor, some hidden.
        source_mask: ``(B, n)`` bool, True on tokens.
        target_ids: ``(B, t)`` for the decoder: the clean text, then one EOS.
        target_mask: ``(B, t)`` bool, True on tokens, EOS included.
        slot_mask: ``(B, t)`` bool, True on tokens that carry a slot's value.
        uids: B identities.
        hidden: ``(B, n)`` bool, True on source tokens that were replaced.
        probes: Questions of each of the B texts; [] where nobody asks.
    """

    source_ids: Tensor
    source_mask: Tensor
    target_ids: Tensor
    target_mask: Tensor
    slot_mask: Tensor
    uids: list[str]
    hidden: Tensor
    probes: list[tuple[Probe, ...]] = field(default_factory=list)

    def to(self, device: Any, **_: Any) -> CompressionBatch:
        """The same with its tensors on a device."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    @property
    def num_tokens(self) -> int:
        """Tokens of sources and targets."""
        return int(self.source_mask.sum()) + int(self.target_mask.sum())

    def state(self) -> dict[str, Any]:
        """Plain containers: what a bad batch is saved as."""
        return {
            "uids": self.uids,
            "sources": _rows(self.source_ids, self.source_mask),
            "targets": _rows(self.target_ids, self.target_mask),
        }


class ContextEncoding:
    """Tokenises contexts for a compressor and a decoder.

    Args:
        max_tokens: Longest text in tokens of either tokenizer, EOS not counted; None for no bound.
        on_too_long: ``error``, or ``cut`` behind the last token that fits both; facts behind the
            cut are left out.
        source_mask: Probability that a source token that may be hidden is replaced.
        mask_kind: By what: ``mask``, the tokenizer's mask token, else the word ``<mask>``, else
            the unknown or EOS token; or ``random``, a token of any word that may be hidden.
    """

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        on_too_long: LongPolicy = "error",
        source_mask: float = 0.0,
        mask_kind: MaskKind = "mask",
    ) -> None:
        self.max_tokens, self.on_too_long = max_tokens, on_too_long
        self.source_mask, self.mask_kind = source_mask, mask_kind
        #: Texts that were cut, as often as they were encoded.
        self.num_cut = 0
        self.source_tokenizer: Any = None
        self.target_tokenizer: Any = None
        self._words: re.Pattern[str] | None = None
        self._substitutes: list[int] = []

    def bind(self, source: Any, target: Any, hidden_words: Sequence[str]) -> None:
        """Take the tokenizers of compressor and decoder.

        Args:
            source: Fast tokenizer of the compressor.
            target: Fast tokenizer of the decoder; may be the same.
            hidden_words: Words that masking may hide; none for any token.

        Raises:
            ValueError: A tokenizer has no character offsets, no EOS or nothing to hide with.
        """
        for side, tokenizer in (("compressor", source), ("decoder", target)):
            if not tokenizer.is_fast:
                raise ValueError(
                    f"the tokenizer of the {side} ({tokenizer.name_or_path}) knows no character "
                    f"offsets, by which slots are found: use a fast one (tokenizer.json)"
                )
        if target.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of the decoder ({target.name_or_path}) has no EOS token: a "
                f"reconstruction could not end"
            )
        self.source_tokenizer, self.target_tokenizer = source, target
        words = "|".join(re.escape(w) for w in sorted(hidden_words, key=lambda w: (-len(w), w)))
        self._words = re.compile(rf"(?<!\w)(?:{words})(?!\w)") if words else None
        self._substitutes = self._find_substitutes(hidden_words) if self.source_mask else []

    def _find_substitutes(self, hidden_words: Sequence[str]) -> list[int]:
        tokenizer = self.source_tokenizer
        if self.mask_kind == "mask":
            word = tokenizer.get_vocab().get(MASK)
            known = (tokenizer.mask_token_id, word, tokenizer.unk_token_id, tokenizer.eos_token_id)
            found = [number for number in known if number is not None][:1]
            problem = f"no mask token, no word {MASK}, no unknown and no EOS token"
        elif hidden_words:
            text = " ".join(hidden_words)
            ids, offsets = _encode(tokenizer, [text])[0]
            own = [i for i, one in zip(ids, offsets, strict=True) if text[slice(*one)].strip()]
            found, problem = list(dict.fromkeys(own)), "no token for the words to hide"
        else:
            special = set(tokenizer.all_special_ids)
            found = sorted(set(tokenizer.get_vocab().values()) - special)
            problem = "no token that is not special"
        if not found:
            raise ValueError(
                f"data.source_mask={self.source_mask}: the compressor's tokenizer "
                f"({tokenizer.name_or_path}) has {problem}: choose another data.mask_kind, or "
                f"data.source_mask=0"
            )
        return found

    # ---------------------------------------------------------------- length

    def fit(self, contexts: Sequence[Context]) -> list[Context]:
        """The contexts, those that are too long cut.

        Args:
            contexts: Of a split.

        Raises:
            ValueError: A text is too long (``on_too_long=error``), has no token, or holds the EOS
                token inside; its place is named.
        """
        return self._fit(contexts)[0]

    def _fit(
        self, contexts: Sequence[Context]
    ) -> tuple[list[Context], list[_Encoded], list[_Encoded]]:
        """The contexts that fit, as both tokenizers read them."""
        sources, targets = self._both(contexts)
        fitting = [self._fitting(*one) for one in zip(contexts, sources, targets, strict=True)]
        if cut := [i for i, one in enumerate(fitting) if one is not contexts[i]]:
            self.num_cut += len(cut)
            again = self._both([fitting[i] for i in cut])
            for i, source, target in zip(cut, *again, strict=True):
                sources[i], targets[i] = source, target
        return fitting, sources, targets

    def _fitting(self, context: Context, source: _Encoded, target: _Encoded) -> Context:
        where = context.where or context.uid
        if not source[0] or not target[0]:
            raise ValueError(
                f"{where}: the text {context.text[:60]!r} has no token: nothing is left to compress"
            )
        if self.target_tokenizer.eos_token_id in target[0]:
            raise ValueError(
                f"{where}: the text holds the EOS token {self.target_tokenizer.eos_token!r}, at "
                f"which a reconstruction would end; take it out"
            )
        length = max(len(source[0]), len(target[0]))
        if self.max_tokens is None or length <= self.max_tokens:
            return context
        if self.on_too_long == "error":
            raise ValueError(
                f"{where}: the text has {length} tokens, data.max_tokens={self.max_tokens} is the "
                f"most: raise it, compress in segments, or set data.on_too_long=cut"
            )
        return self._cut(context, source, target)

    def _cut(self, context: Context, source: _Encoded, target: _Encoded) -> Context:
        """Shorter until both tokenizers agree: a piece of a text may have other tokens."""
        most = self.max_tokens or 0
        for keep in range(most, 0, -1):
            ends = [side[1][min(keep, len(side[0])) - 1][1] for side in (source, target)]
            text = context.text[: min(ends)].rstrip()
            sizes = [
                len(ids) for side in self._both([replace(context, text=text)]) for ids, _ in side
            ]
            if text and min(sizes) > 0 and max(sizes) <= most:
                return _without_lost_facts(context, text)
        raise ValueError(
            f"{context.where or context.uid}: no beginning of the text fits into "
            f"data.max_tokens={most}: raise it"
        )

    # ---------------------------------------------------------------- batches

    def batch(
        self, contexts: Sequence[Context], keys: Sequence[str] | None = None
    ) -> CompressionBatch:
        """Encode contexts, those that are too long cut.

        Args:
            contexts: B.
            keys: B seeds of what is hidden; None hides nothing (evaluation).

        Raises:
            ValueError: As in ``fit``.
        """
        contexts, sources, targets = self._fit(contexts)
        found = [list(ids) for ids, _ in sources]
        hidden = [[False] * len(ids) for ids in found]
        if keys is not None and self.source_mask:
            for i, key in enumerate(keys):
                found[i], hidden[i] = self._hide(contexts[i].text, *sources[i], key)
        eos = int(self.target_tokenizer.eos_token_id)
        slots = [
            [*_overlaps(offsets, [s for slot in context.slots for s in slot.spans]), False]
            for context, (_, offsets) in zip(contexts, targets, strict=True)
        ]
        return CompressionBatch(
            source_ids=_padded(found, _pad_id(self.source_tokenizer)),
            source_mask=_padded([[True] * len(ids) for ids in found], False),
            target_ids=_padded([[*ids, eos] for ids, _ in targets], _pad_id(self.target_tokenizer)),
            target_mask=_padded([[True] * len(row) for row in slots], False),
            slot_mask=_padded(slots, False),
            uids=[context.uid for context in contexts],
            hidden=_padded(hidden, False),
            probes=[context.probes for context in contexts],
        )

    def _hide(
        self, text: str, ids: list[int], offsets: Spans, key: str
    ) -> tuple[list[int], list[bool]]:
        """Two draws a position, used or not: what is hidden depends on key and position alone."""
        rng, found, hidden = Random(key), list(ids), [False] * len(ids)
        spans = None if self._words is None else [m.span() for m in self._words.finditer(text)]
        allowed = [True] * len(ids) if spans is None else _overlaps(offsets, spans)
        for place, is_allowed in enumerate(allowed):
            chance, which = rng.random(), rng.random()
            if is_allowed and chance < self.source_mask:
                found[place] = self._substitutes[int(which * len(self._substitutes))]
                hidden[place] = True
        return found, hidden

    def _both(self, contexts: Sequence[Context]) -> tuple[list[_Encoded], list[_Encoded]]:
        texts = [context.text for context in contexts]
        source = _encode(self.source_tokenizer, texts)
        is_same = self.source_tokenizer is self.target_tokenizer
        return source, list(source) if is_same else _encode(self.target_tokenizer, texts)


_Encoded = tuple[list[int], list[tuple[int, int]]]


def _encode(tokenizer: Any, texts: list[str]) -> list[_Encoded]:
    """Ids and character offsets of each text, without special tokens."""
    made = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(zip(made["input_ids"], made["offset_mapping"], strict=True))


def _overlaps(offsets: Spans, spans: Spans) -> list[bool]:
    """Which tokens share a character with one of the spans."""
    if not spans:
        return [False] * len(offsets)
    marked = bytearray(max(last for _, last in spans))
    for first, last in spans:
        marked[first:last] = b"\x01" * (last - first)
    return [1 in marked[start:end] for start, end in offsets]


def _without_lost_facts(context: Context, text: str) -> Context:
    """The context of a shorter text: facts and questions behind its end are gone."""
    inside = [s for s in context.slots if s.spans and all(e <= len(text) for _, e in s.spans)]
    keys = {"", *(slot.key for slot in inside)}
    probes = tuple(probe for probe in context.probes if probe.key in keys)
    return replace(context, text=text, slots=tuple(inside), probes=probes)


def _pad_id(tokenizer: Any) -> int:
    """What fills up; any id does, since it is masked."""
    known = tokenizer.pad_token_id, tokenizer.eos_token_id, 0
    return int(next(number for number in known if number is not None))


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
