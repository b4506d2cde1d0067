"""Compressor, bridge and decoder as one module.

One module, because sharded parameters are gathered by the hooks of its methods: after
``fully_shard(pair)`` call ``register_fsdp_forward_method(pair, name)`` for each name of
``Pair.forward_methods``.

======== ================================= =============================================
form     the decoder reads                 what predicts the first token of the text
======== ================================= =============================================
embeds   ``[Z; prompt; question; text]``   the last vector before it (the prompt)
kv       ``[BOS; question; text]`` behind  the last token before it (BOS, at position M)
         the cache of M
======== ================================= =============================================

Both contexts are M + 1 long [code: ICAE v2 and 500xCompressor]. Labels are on the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.backbones.causal_lm import CausalLM, spread
from lightning_modules.backbones.sharding import decoder_layers, gathered
from lightning_modules.compressor.memory import Memory
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions, Training
from lightning_modules.compressor.projector import Bridge, Prompt
from lightning_modules.compressor.reading import (
    Read,
    body_of,
    has_full_attention,
    read,
    start_token,
)
from lightning_modules.compressor.segments import Segments, cut, pack

Question = tuple[Tensor, Tensor]


class TokenScores(NamedTuple):
    """What the decoder says of every label, ``(B, t)`` each and zero off the labels, in nats.

    Args:
        loss: Cross-entropy, smoothed where that was asked for; carries gradients.
        logprob: Of the label; carries gradients unless the loss is smoothed.
        entropy: Of the prediction; carries gradients where that was asked for.
        correct: 1.0 where the label is the most probable token.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    correct: Tensor


class Pair(nn.Module):
    """A compressor, its memory tokens and projector, and the decoder that reads the memory.

    Args:
        compressor: Any causal LM, adapters or not. Its own head is frozen, for nothing uses it.
        decoder: Any causal LM, with a tokenizer of its own.
        memory: Of the memory.
        projector: Of the projector; no use with ``form=kv``.
        train: Whether the decoder learns: ``frozen`` freezes it; ``lora`` and ``full`` leave its
            parameters as they were loaded.

    Raises:
        ValueError: ``form=kv`` between models that are not of one architecture.
    """

    #: Methods that run parameters; see above.
    forward_methods = ("compress", "score", "logits", "begin", "advance")

    def __init__(
        self,
        compressor: CausalLM,
        decoder: CausalLM,
        memory: MemoryOptions,
        projector: ProjectorOptions,
        train: Training = "frozen",
    ) -> None:
        super().__init__()
        if memory.form == "kv":
            check_same_architecture(compressor, decoder)
        self.options, self.projector_options = memory, projector
        self.compressor, self.decoder = compressor, decoder
        self.bridge = Bridge(_vectors(compressor), _vectors(decoder), memory, projector)
        self.is_decoder_frozen = train == "frozen"
        if self.is_decoder_frozen:
            decoder.requires_grad_(False)
        _freeze_head(compressor)

    @property
    def base(self) -> nn.Module:
        """The compressor's Hugging Face model."""
        return self.compressor.base

    @property
    def config(self) -> Any:
        """Its configuration."""
        return self.compressor.config

    @property
    def blocks(self) -> list[nn.Module]:
        """Decoder layers of both models, the units of sharding."""
        return [*decoder_layers(self.compressor), *decoder_layers(self.decoder)]

    @contextmanager
    def gathered(self) -> Iterator[bool]:
        """Inside the block a sharded pair is whole on every rank, where that fits."""
        with gathered(self) as is_whole:
            yield is_whole

    def train(self, mode: bool = True) -> Pair:
        """As usual, but a frozen decoder stays without dropout."""
        super().train(mode)
        # transformers checkpoints activations in training mode only
        if self.is_decoder_frozen and not body_of(self.decoder).is_gradient_checkpointing:
            self.decoder.eval()
        return self

    def compress(
        self, source_ids: Tensor, source_mask: Tensor, noise_seeds: Sequence[int] | None = None
    ) -> Memory:
        """Texts to memory.

        Args:
            source_ids: ``(B, n)`` of the compressor's tokenizer, padded on any side.
            source_mask: ``(B, n)`` True on tokens.
            noise_seeds: One a text, where the projector adds noise.

        Raises:
            ValueError: An empty text; one shorter than its memory, unless that is only counted; or
                one longer than the compressor has positions for.
        """
        segments = cut(source_mask, self.options.segment_tokens)
        num_short = self._count_short(segments)
        hidden, cache, places = self._run_compressor(source_ids, segments)
        width = self.options.tokens
        mask = segments.joined_mask(width)
        states = segments.join(hidden.take_along_dim(places[:, :, None], 1))
        if cache is None:
            embeds = self.bridge(states.to(self.bridge.tokens.dtype), noise_seeds)
            embeds = embeds.where(mask[:, :, None], 0.0)
            return Memory(states, mask, embeds=embeds, num_short=num_short)
        # the last layer's output feeds no key: without this DDP waits for its gradients for ever
        anchor = 0.0 * states.sum()
        keys = (_of_memory(layer.keys, places, segments) + anchor for layer in cache.layers)
        values = (_of_memory(layer.values, places, segments) for layer in cache.layers)
        pairs = tuple(zip(keys, values, strict=True))
        return Memory(states, mask, keys_values=pairs, num_short=num_short)

    def score(
        self,
        memory: Memory,
        target_ids: Tensor,
        target_mask: Tensor,
        *,
        prompt: Prompt = "ae",
        question: Question | None = None,
        label_smoothing: float = 0.0,
        entropy_grad: bool = False,
        temperature: float = 1.0,
    ) -> TokenScores:
        """Read texts under teacher forcing; logits are never kept.

        Args:
            memory: Of B texts.
            target_ids: ``(B, t)`` of the decoder's tokenizer, EOS included.
            target_mask: ``(B, t)`` True on labels; padding is none, whatever its id.
            prompt: ``ae`` for the text itself, ``lm`` for what follows it, ``qa`` for an answer.
            question: Ids and mask ``(B, q)`` between the prompt and the targets.
            label_smoothing: In [0, 1).
            entropy_grad: Whether gradients flow through the entropy; a second pass of the head.
            temperature: Of the softmax.
        """
        hidden, labels = self._predictors(memory, target_ids, target_mask, prompt, question)
        head = self.decoder.base.get_output_embeddings()
        loss, stats = head(
            hidden,
            labels,
            mode="ce",
            reduction="none",
            label_smoothing=label_smoothing,
            temperature=temperature,
            return_stats=True,
        )
        entropy = stats.entropy
        if entropy_grad:
            entropy = head(hidden, labels, temperature=temperature, entropy_grad=True).entropy
        logprob = -stats.nll if label_smoothing else -loss
        live = target_mask.bool()
        return TokenScores(*(spread(v, live) for v in (loss, logprob, entropy, stats.accuracy)))

    def logits(
        self,
        memory: Memory,
        target_ids: Tensor,
        target_mask: Tensor,
        where: Tensor,
        *,
        prompt: Prompt = "ae",
        question: Question | None = None,
    ) -> Tensor:
        """Logits ``(K, V)`` at a few labels (slots), for margins and alternatives.

        Args:
            memory: As in ``score``; so are the next two.
            target_ids: Labels.
            target_mask: Which are labels.
            where: ``(B, t)`` True on the K labels that are wanted; their order is row by row.
            prompt: As in ``score``.
            question: As in ``score``.
        """
        hidden, _ = self._predictors(memory, target_ids, target_mask, prompt, question)
        wanted = where.bool()[target_mask.bool()]
        return self.decoder.base.get_output_embeddings()(hidden[wanted])

    def begin(
        self, memory: Memory, prompt: Prompt, question: Question | None
    ) -> tuple[Tensor, Read]:
        """Read the context of a free-running decode: logits ``(B, V)`` of the first token."""
        context = read(
            self.decoder, memory, self._context(memory, prompt, question), use_cache=True
        )
        return self._next_logits(context.last()), context

    def advance(self, context: Read, token_ids: Tensor) -> Tensor:
        """Feed one token ``(B,)`` a row: logits ``(B, V)`` of the next."""
        embeds = self._embed(self.decoder, token_ids[:, None])
        return self._next_logits(context.step(self.decoder, embeds))

    def _next_logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.base.get_output_embeddings()(hidden)

    def forward(
        self,
        source_ids: Tensor,
        source_mask: Tensor,
        target_ids: Tensor,
        target_mask: Tensor,
        *,
        noise_seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[Memory, TokenScores]:
        """``compress`` and ``score`` in one, for a training step.

        Args:
            source_ids: As in ``compress``; so are the next one and ``noise_seeds``.
            source_mask: Which are tokens.
            target_ids: As in ``score``, and so are all others.
            target_mask: Which are labels.
            noise_seeds: One a text.
            **options: Of ``score``.
        """
        memory = self.compress(source_ids, source_mask, noise_seeds)
        return memory, self.score(memory, target_ids, target_mask, **options)

    # ------------------------------------------------------------------ inside

    def _count_short(self, segments: Segments) -> int:
        lengths, most = segments.mask.sum(1), self.options.tokens
        short = (lengths < most).nonzero().flatten()
        if len(short) and self.options.on_short == "refuse":
            row = int(short[0])
            raise ValueError(
                f"text {int(segments.rows[row])} of the batch has a segment of {int(lengths[row])} "
                f"tokens, shorter than its memory (model.memory.tokens={most}): lower that, or "
                f"only count such texts with model.memory.on_short=count"
            )
        return len(short)

    def _run_compressor(self, ids: Tensor, segments: Segments) -> tuple[Tensor, Any, Tensor]:
        """Hidden states of ``[x; M]`` of every segment, the cache, and where M is ``(R, m)``."""
        texts = self._embed(self.compressor, ids[segments.rows[:, None], segments.columns])
        tokens = self.bridge.tokens.to(texts.dtype).expand(len(texts), -1, -1)
        packed = pack([(texts, segments.mask), (tokens, tokens.new_ones(tokens.shape[:2]))])
        _check_length(self.compressor, packed.embeds.shape[1])
        behind = torch.arange(self.options.tokens, device=ids.device)
        places = packed.starts[1][:, None] + behind
        positions = None
        if self.options.form == "kv" and self.options.kv_positions == "memory":
            # rotary attention sees differences only, so the text may have negative positions
            first = segments.numbers * self.options.tokens - packed.starts[1]
            positions = first[:, None] + torch.arange(packed.embeds.shape[1], device=ids.device)
        output = body_of(self.compressor)(
            inputs_embeds=packed.embeds, position_ids=positions, use_cache=self.options.form == "kv"
        )
        cache = output.past_key_values if self.options.form == "kv" else None
        return output.last_hidden_state, cache, places

    def _context(
        self, memory: Memory, prompt: Prompt, question: Question | None
    ) -> list[tuple[Tensor, Tensor]]:
        """What the decoder reads before the text."""
        rows = len(memory)
        if memory.embeds is None:
            start = torch.full((rows, 1), start_token(self.decoder), device=memory.mask.device)
            parts = [(self._embed(self.decoder, start), torch.ones_like(start))]
        else:
            vector = self.bridge.prompt(prompt, rows)
            ones = memory.mask.new_ones(vector.shape[:2])
            parts = [(memory.embeds, memory.mask), (vector, ones)]
        if question is not None:
            parts.append((self._embed(self.decoder, question[0]), question[1]))
        return parts

    def _predictors(
        self,
        memory: Memory,
        target_ids: Tensor,
        target_mask: Tensor,
        prompt: Prompt,
        question: Question | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``(K, d)`` that predict the K labels, row by row, and the labels."""
        live = target_mask.bool()
        parts = self._context(memory, prompt, question)
        parts.append((self._embed(self.decoder, target_ids[:, :-1]), live[:, :-1]))
        result = read(self.decoder, memory, parts)
        rows, columns = live.nonzero(as_tuple=True)
        number = live.cumsum(1)[rows, columns] - 1
        hidden = result.hidden[rows, result.packed.starts[-1][rows] - 1 + number]
        return hidden, target_ids[rows, columns]

    @staticmethod
    def _embed(model: CausalLM, ids: Tensor) -> Tensor:
        table: Any = model.base.get_input_embeddings()
        return table(ids)


def check_same_architecture(compressor: CausalLM, decoder: CausalLM) -> None:
    """Refuse ``form=kv`` where the decoder cannot attend to the compressor's keys and values.

    Raises:
        ValueError: Names every difference.
    """
    configs = [part.config.get_text_config() for part in (compressor, decoder)]
    names = (
        "model_type",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
    )
    problems = []
    for name in names:
        first, second = (getattr(config, name, None) for config in configs)
        if first != second:
            problems.append(f"{name} is {first} in the compressor and {second} in the decoder")
    for name, part in (("compressor", compressor), ("decoder", decoder)):
        body = body_of(part)
        if not has_full_attention(part.config) or not hasattr(body, "rotary_emb"):
            problems.append(f"the {name} has layers without full rotary attention")
        if body.is_gradient_checkpointing:
            problems.append(f"the {name} recomputes activations (gradient_checkpointing=true)")
    if problems:
        raise ValueError(
            f"model.memory.form='kv' needs two models of one architecture: {'; '.join(problems)}; "
            f"use form='embeds'"
        )


@torch.no_grad()
def _vectors(model: CausalLM, most: int = 4096) -> Tensor:
    """Input embeddings ``(K, d)`` of tokens all over the vocabulary, as its layers see them."""
    table: Any = model.base.get_input_embeddings()
    size = table.weight.shape[0]
    ids = torch.arange(0, size, -(-size // most), device=table.weight.device)
    return table(ids)  # some families scale them inside the module


def _freeze_head(compressor: CausalLM) -> None:
    head, table = compressor.base.get_output_embeddings(), compressor.base.get_input_embeddings()
    if head.weight is not table.weight:
        head.requires_grad_(False)


def _check_length(compressor: CausalLM, length: int) -> None:
    most = getattr(compressor.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(
            f"a text and its memory are {length} tokens, and the compressor has positions for "
            f"{most}: cut texts with model.memory.segment_tokens, or lower data.max_tokens"
        )


def _of_memory(values: Tensor, places: Tensor, segments: Segments) -> Tensor:
    """Keys or values ``(R, heads, L, d)`` of the memory tokens as ``(B, heads, M, d)``."""
    chosen = values.take_along_dim(places[:, None, :, None], 2).transpose(1, 2)
    # no view, which the hooks of fully_shard warn of
    return segments.join(chosen).transpose(1, 2).contiguous()
