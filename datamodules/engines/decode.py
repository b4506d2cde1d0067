"""A decode loop over the model's own KV cache.

Three things make it faster than ``generate`` for groups of samples: a prompt is read once however
many samples it gets (its cache rows are repeated afterwards), the cache is one buffer that is
written in place, and rows that have ended leave the batch. The tokens are those of ``generate``
under the same per-sample random numbers (tested).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from datamodules.engines.base import Sampling
from datamodules.experience import Candidates


@dataclass
class Decoded:
    """Token ids and log-probs of one completion; ``is_finished`` where the end token came.

    ``candidates`` holds the most probable tokens at every position, where they were asked for.
    """

    token_ids: list[int]
    logprobs: list[float]
    is_finished: bool
    candidates: Candidates | None = None


class _BufferedLayer(DynamicLayer):
    """One layer's cache as a buffer with room for the new tokens, written in place."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.used = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = list(key_states.shape)
            shape[2] += self.room
            self.keys = key_states.new_empty(shape)
            shape[3] = value_states.shape[3]
            self.values = value_states.new_empty(shape)
        end = self.used + key_states.shape[2]
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        keys[:, :, self.used : end] = key_states
        values[:, :, self.used : end] = value_states
        self.used = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.used


def supports_buffered_cache(config: Any) -> bool:
    """Whether every layer is full attention, which is what the buffered cache stands for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None)
    plain = kinds is not None and all(kind == "full_attention" for kind in kinds)
    return plain and getattr(text, "sliding_window", None) is None


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """``(len(seeds), count)`` float64 numbers in [0, 1), one independent stream a seed."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count, dtype=torch.float64)


def choose_tokens(
    logits: Tensor, sampling: Sampling, uniform: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function.

    Args:
        logits: ``(R, V)``.
        sampling: Temperature and filters.
        uniform: ``(R,)`` numbers in [0, 1); None decodes greedily.

    Returns:
        Token ids ``(R,)`` and their log-probs (nats, fp32) under the distribution drawn from;
        greedy decoding reports the log-probs of the model itself (temperature 1).
    """
    tokens, logprobs = _choose(logits, sampling, uniform)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def choose_with_candidates(
    logits: Tensor, sampling: Sampling, uniform: Tensor | None
) -> tuple[Tensor, Tensor, Candidates | None]:
    """As ``choose_tokens``, with the ``sampling.candidates`` most probable tokens a row.

    Returns:
        Token ids ``(R,)``, their log-probs ``(R,)``, and candidates ``(R, C)`` under the same
        distribution (C at most the vocabulary); None where none are asked for.
    """
    tokens, logprobs = _choose(logits, sampling, uniform)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    if not sampling.candidates:
        return tokens, own, None
    values, ids = logprobs.topk(min(sampling.candidates, logprobs.shape[-1]))
    return tokens, own, Candidates(ids.cpu(), values.cpu())


def _choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens ``(R,)`` and the log-probs ``(R, V)`` that they were drawn from."""
    logits = logits.float()
    if uniform is None:
        return logits.argmax(-1), logits.log_softmax(-1)
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.top_k:
        floor = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        drop = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -torch.inf)
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.exp().double().cumsum(-1)
    point = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    # right=True: a token of probability zero spans an empty interval and is never chosen
    tokens = torch.searchsorted(cumulative, point, right=True)[:, 0]
    return tokens.clamp_(max=logits.shape[-1] - 1), logprobs


class CandidateLog:
    """Candidates of every row and step of a decoding loop; holds nothing where none are asked for.

    Args:
        rows: Sequences.
        steps: Most new tokens.
    """

    def __init__(self, rows: int, steps: int) -> None:
        self.shape = (rows, steps)
        self._ids: Tensor | None = None
        self._logprobs: Tensor | None = None

    def write(self, rows: Tensor, step: int, candidates: Candidates | None) -> None:
        """Keep the candidates ``(R, C)`` of ``rows`` ``(R,)`` at ``step``."""
        if candidates is None:
            return
        if self._ids is None or self._logprobs is None:
            shape = (*self.shape, candidates.ids.shape[1])
            self._ids, self._logprobs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        self._ids[rows, step] = candidates.ids
        self._logprobs[rows, step] = candidates.logprobs

    def of(self, row: int, length: int) -> Candidates | None:
        """The first ``length`` positions of one row, as tensors of their own."""
        if self._ids is None or self._logprobs is None:
            return None
        return Candidates(self._ids[row, :length].clone(), self._logprobs[row, :length].clone())


@torch.no_grad()
def decode(
    policy: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    limits: Sequence[int],
    device: torch.device,
    buffered: bool = True,
    steps: int | None = None,
    any_rank: Callable[[bool], bool] = bool,
) -> list[list[Decoded]]:
    """Complete every prompt ``sampling.samples`` times.

    Args:
        policy: A causal LM (see ``Engine.sync``).
        prompts: Token ids; they are left-padded to one length.
        sampling: Temperature and filters.
        seeds: One seed a prompt and sample.
        eos_ids: Tokens that end a completion; the end token is part of it.
        pad_id: Token of the padding.
        limits: Most new tokens a prompt.
        device: Where the model is.
        buffered: Write the cache in place (full attention only).
        steps: Room in the cache where more than ``max(limits)`` is needed (sharding).
        any_rank: Whether any rank still runs; under sharding all ranks make equally many steps.

    Returns:
        For every prompt its samples.
    """
    loop = _Loop(policy, prompts, sampling, max(steps or 0, *limits), pad_id, device, buffered)
    rows = torch.arange(len(prompts)).repeat_interleave(sampling.samples)
    flat_seeds = [seed for group in seeds for seed in group]
    noise = uniforms(flat_seeds, max(limits)) if sampling.temperature > 0 else None
    limit = torch.tensor(list(limits))[rows]
    ends = torch.tensor(list(eos_ids), device=device)
    tokens = torch.full((len(rows), max(limits)), pad_id, dtype=torch.long)
    logprobs = torch.zeros(len(rows), max(limits))
    log = CandidateLog(len(rows), max(limits))
    lengths = torch.zeros(len(rows), dtype=torch.long)
    finished = torch.zeros(len(rows), dtype=torch.bool)
    alive = torch.arange(len(rows))  # rows that are still written, as indexes of ``rows``
    logits = loop.start(rows.to(device))
    step = 0
    while True:
        if len(alive):
            uniform = None if noise is None else noise[alive, step].to(device)
            chosen, chosen_logprobs, candidates = choose_with_candidates(
                logits[loop.live], sampling, uniform
            )
            log.write(alive, step, candidates)
            tokens[alive, step] = chosen.cpu()
            logprobs[alive, step] = chosen_logprobs.cpu()
            lengths[alive] = step + 1
            ended = torch.isin(chosen, ends).cpu()
            finished[alive] = ended
            keep = ~ended & (limit[alive] > step + 1)
            alive = alive[keep]
        else:
            chosen, keep = loop.idle_tokens()
        step += 1
        if not any_rank(bool(len(alive))):
            break
        logits = loop.advance(chosen, keep.to(device))
    flat = [
        Decoded(ids[:n].tolist(), values[:n].tolist(), bool(end), log.of(row, n))
        for row, (ids, values, n, end) in enumerate(
            zip(tokens, logprobs, lengths.tolist(), finished, strict=True)
        )
    ]
    size = sampling.samples
    return [flat[start : start + size] for start in range(0, len(flat), size)]


class _Loop:
    """The model's side of decoding: the cache, the mask and which rows still matter."""

    def __init__(
        self,
        policy: Callable[..., Any],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        steps: int,
        pad_id: int,
        device: torch.device,
        buffered: bool,
    ) -> None:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
        mask = torch.zeros((len(prompts), longest + steps), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self.is_padded = not bool(mask.all())
        self.policy, self.ids = policy, ids.to(device)
        self.mask = mask.to(device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp_(min=0)
        self.length = longest
        layer: Any = partial(_BufferedLayer, steps) if buffered else DynamicLayer
        self.cache = Cache(layer_class_to_replicate=layer)
        self.live: Tensor | slice = slice(None)

    def _forward(self, ids: Tensor, start: int, end: int) -> Tensor:
        output = self.policy(
            input_ids=ids,
            attention_mask=self.mask[:, :end] if self.is_padded else None,
            position_ids=self.positions[:, start:end] if self.is_padded else None,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def start(self, rows: Tensor) -> Tensor:
        """Read each prompt once, then repeat its row for every sample. Logits ``(R, V)``."""
        logits = self._forward(self.ids, 0, self.length)
        self._select(rows)
        return logits.index_select(0, rows)

    def _select(self, rows: Tensor) -> None:
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.keys = layer.keys.index_select(0, rows)
            layer.values = layer.values.index_select(0, rows)
        self.mask = self.mask.index_select(0, rows)
        self.positions = self.positions.index_select(0, rows)
        self.width = len(rows)

    def idle_tokens(self) -> tuple[Tensor, Tensor]:
        """What a rank feeds that has nothing left to write while others go on."""
        self.live = torch.zeros(0, dtype=torch.long, device=self.ids.device)
        return self.live, torch.zeros(0, dtype=torch.bool)

    def advance(self, chosen: Tensor, keep: Tensor) -> Tensor:
        """Feed the chosen tokens of the live rows; ended rows stay until a tenth is idle."""
        fed = torch.zeros(self.width, dtype=torch.long, device=chosen.device)
        fed[self.live] = chosen
        live = torch.arange(self.width, device=chosen.device)[self.live][keep]
        if 0 < len(live) < 0.9 * self.width:
            self._select(live)
            fed, live = fed.index_select(0, live), torch.arange(len(live), device=live.device)
        self.live = live if len(live) < self.width else slice(None)
        self.length += 1
        return self._forward(fed[:, None], self.length - 1, self.length)
