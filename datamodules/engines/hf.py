"""The embedded engine: completions of the live policy, decoded by its own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from datamodules.engines.base import Engine, Sampling, sample_seed
from datamodules.engines.decode import (
    CandidateLog,
    Decoded,
    choose_with_candidates,
    decode,
    supports_buffered_cache,
    uniforms,
)
from datamodules.engines.policies import Ranks, eos_ids
from datamodules.experience import Completion, FinishReason, Prompt


class HFEngine(Engine):
    """Decodes with the policy that trains, in this process: nothing is copied on ``sync``.

    Args:
        max_sequences: Most completions decoded at once (the samples of one prompt stay together).
        max_cached_tokens: Most tokens (prompt and new) in the KV cache at once.
        decoder: ``loop`` is our decode loop, ``generate`` Hugging Face's; the tokens are equal.

    Raises:
        ValueError: ``max_sequences`` below 1 or an unknown ``decoder``.
    """

    def __init__(
        self,
        *,
        max_sequences: int = 512,
        max_cached_tokens: int = 131072,
        decoder: Literal["loop", "generate"] = "loop",
    ) -> None:
        if max_sequences < 1 or max_cached_tokens < 1:
            raise ValueError(
                f"engine.max_sequences={max_sequences} and engine.max_cached_tokens="
                f"{max_cached_tokens} must be at least 1"
            )
        if decoder not in ("loop", "generate"):
            raise ValueError(f"engine.decoder={decoder!r} is unknown; use 'loop' or 'generate'")
        self.max_sequences, self.max_cached_tokens = max_sequences, max_cached_tokens
        self.decoder = decoder
        self._policy: Any = None

    def sync(self, policy: Any, version: int) -> None:
        """Keep a reference to the live policy."""
        self._policy = policy
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Complete the prompts in batches of like length. See ``Engine.generate``."""
        if self._policy is None:
            raise RuntimeError("the engine has no weights yet: call sync(policy, version) first")
        policy = self._policy
        gathered = getattr(policy, "gathered", None)  # of a sharded policy: whole for the rollout
        with gathered() if gathered is not None else nullcontext():
            return self._generate(policy, prompts, sampling)

    def _generate(
        self, policy: Any, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[list[Completion]]:
        config = policy.config
        parameter = next(policy.parameters())
        collective = Ranks(policy, parameter.device)
        limits = [
            min(sampling.max_new_tokens, prompt.max_new_tokens or sampling.max_new_tokens)
            for prompt in prompts
        ]
        chunks = self._chunks(prompts, limits, sampling.samples)
        steps = collective.maximum(max(limits, default=1))
        result: list[list[Completion]] = [[] for _ in prompts]
        end_ids = eos_ids(policy)
        stops = list(dict.fromkeys([*end_ids, *sampling.stop_ids]))
        pad_id = config.pad_token_id if config.pad_token_id is not None else end_ids[0]
        was_training = policy.training
        policy.eval()
        try:
            for index in range(collective.maximum(len(chunks))):
                # a rank without work left still takes part in every collective of the forward
                chunk = chunks[index] if index < len(chunks) else []
                decoded = self._decode(
                    policy,
                    [prompts[i].token_ids for i in chunk] or [(end_ids[0],)],
                    sampling,
                    [self._seeds(prompts[i], sampling) for i in chunk] or [[0] * sampling.samples],
                    eos_ids=stops,
                    pad_id=pad_id,
                    limits=[limits[i] for i in chunk] or [1],
                    device=parameter.device,
                    steps=steps if collective.is_sharded else None,
                    any_rank=collective.any,
                )
                for i, group in zip(chunk, decoded, strict=False):
                    result[i] = [self._completion(one) for one in group]
        finally:
            policy.train(was_training)
        return result

    def _chunks(
        self, prompts: Sequence[Prompt], limits: Sequence[int], samples: int
    ) -> list[list[int]]:
        """Indexes of prompts decoded together: of like length, within both bounds."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        chunks: list[list[int]] = []
        bound = 0  # new tokens of the open chunk
        for i in order:
            bound = max(bound, limits[i])
            size = (len(chunks[-1]) + 1) * samples if chunks else 0
            tokens = size * (len(prompts[i].token_ids) + bound)
            if not chunks or size > self.max_sequences or tokens > self.max_cached_tokens:
                chunks.append([])
                bound = limits[i]
            chunks[-1].append(i)
        return chunks

    def _seeds(self, prompt: Prompt, sampling: Sampling) -> list[int]:
        return [sample_seed(self.key, prompt.uid, index) for index in range(sampling.samples)]

    def _completion(self, decoded: Decoded) -> Completion:
        reason = FinishReason.STOP if decoded.is_finished else FinishReason.LENGTH
        ids, logprobs = tuple(decoded.token_ids), tuple(decoded.logprobs)
        return Completion(ids, logprobs, reason, self.policy_version, decoded.candidates)

    def _decode(
        self,
        policy: Any,
        prompts: list[tuple[int, ...]],
        sampling: Sampling,
        seeds: list[list[int]],
        **options: Any,
    ) -> list[list[Decoded]]:
        if self.decoder == "generate":
            return _decode_with_generate(policy, prompts, sampling, seeds, **options)
        buffered = supports_buffered_cache(policy.config)
        with torch.inference_mode(options["steps"] is None and _has_fixed_rope(policy.config)):
            return decode(policy, prompts, sampling, seeds, buffered=buffered, **options)


def _has_fixed_rope(config: Any) -> bool:
    """Whether a forward pass leaves no tensor behind in the model, as dynamic rope types do.

    Inference mode saves a few per cent of a decoding step, but a tensor that it makes must never be
    met by a later training pass; sharded parameters are gathered into such tensors, too.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("rope_type", "unknown") == "default"


class _Chooser(LogitsProcessor):
    """Makes ``generate`` take our token: everything else gets minus infinity."""

    def __init__(self, sampling: Sampling, noise: torch.Tensor | None, log: CandidateLog) -> None:
        self.sampling, self.noise, self.step, self.log = sampling, noise, 0, log
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = None if self.noise is None else self.noise[:, self.step].to(scores.device)
        tokens, logprobs, candidates = choose_with_candidates(scores, self.sampling, uniform)
        self.logprobs.append(logprobs.cpu())
        self.log.write(torch.arange(len(scores)), self.step, candidates)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@torch.no_grad()
def _decode_with_generate(
    policy: Any,
    prompts: list[tuple[int, ...]],
    sampling: Sampling,
    seeds: list[list[int]],
    *,
    eos_ids: list[int],
    pad_id: int,
    limits: list[int],
    device: torch.device,
    steps: int | None,
    any_rank: Any,
) -> list[list[Decoded]]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    repeat = sampling.samples
    noise = None
    if sampling.temperature > 0:
        noise = uniforms([seed for group in seeds for seed in group], max(limits))
    log = CandidateLog(len(prompts) * repeat, max(limits))
    chooser = _Chooser(sampling, noise, log)
    output = policy.generate(
        input_ids=ids.repeat_interleave(repeat, 0).to(device),
        attention_mask=mask.repeat_interleave(repeat, 0).to(device),
        generation_config=GenerationConfig(
            max_new_tokens=max(limits), do_sample=False, pad_token_id=pad_id, eos_token_id=eos_ids
        ),
        logits_processor=LogitsProcessorList([chooser]),
        synced_gpus=steps is not None,
    )
    logprobs = torch.stack(chooser.logprobs, dim=1)
    rows, ends = [], frozenset(eos_ids)
    for row, tokens in enumerate(output[:, longest:].tolist()):
        tokens = tokens[: limits[row // repeat]]
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        length = len(tokens) if end is None else end + 1
        values = logprobs[row, :length].tolist()
        rows.append(Decoded(tokens[:length], values, end is not None, log.of(row, length)))
    return [rows[start : start + repeat] for start in range(0, len(rows), repeat)]
