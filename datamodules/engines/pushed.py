"""Engines that hold a copy of the weights: when to push, and what is asked of them."""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.engines.base import Engine, Sampling, sample_seed
from datamodules.engines.policies import Ranks, Stamp, eos_ids, named_weights
from datamodules.experience import Candidates, Completion, FinishReason, Prompt

#: How vLLM names the end of a completion; anything else is an error.
REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(frozen=True)
class Request:
    """One completion to be written: each sample is a request with a seed of its own.

    Args:
        prompt_ids: Token ids.
        parameters: Of vLLM's ``SamplingParams``.
    """

    prompt_ids: list[int]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        token_ids: The end token included.
        logprobs: Under the distribution that was sampled from.
        finish_reason: As vLLM names it.
        labels: Of the weights that wrote the tokens.
        candidates: The most probable tokens at every position, where they were asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    labels: frozenset[str]
    candidates: Candidates | None = None


def top_candidates(positions: Sequence[Mapping[int, float]], count: int) -> Candidates | None:
    """Candidates of one answer; vLLM reports the sampled token as well, whatever its rank.

    Args:
        positions: Log-prob by token id at every position, at least ``count`` of them.
        count: Most probable tokens wanted; 0 for none.

    Returns:
        ``(L, count)`` ids and log-probs, ties by token id.

    Raises:
        ValueError: A position reports fewer tokens.
    """
    if not count:
        return None
    rows = [sorted(one.items(), key=lambda pair: (-pair[1], pair[0]))[:count] for one in positions]
    if any(len(row) < count for row in rows):
        raise ValueError(
            f"{count} candidates a position were asked for and vLLM reports fewer: the "
            f"vocabulary or its max_logprobs is smaller (model.num_candidates)"
        )
    pairs = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), count, 2)
    return Candidates(pairs[..., 0].long(), pairs[..., 1].float())


class PushedEngine(Engine):
    """Pushes weights when they changed, and checks that completions come from them.

    Args:
        sync_every: Optimizer steps between pushes during training; evaluations always get the
            current weights.
        max_model_len: Longest sequence (prompt and completion); None takes the model's own bound.
    """

    #: Whether the ranks share one engine, so that they push together.
    is_shared = False

    def __init__(self, *, sync_every: int = 1, max_model_len: int | None = None) -> None:
        problems = []
        if sync_every < 1:
            problems.append(f"engine.sync_every={sync_every} must be at least 1")
        if max_model_len is not None and max_model_len < 2:
            problems.append(f"engine.max_model_len={max_model_len} must be at least 2, or null")
        if problems:
            raise ValueError("; ".join(problems))
        self.sync_every, self.max_model_len = sync_every, max_model_len
        self.num_pushes = 0
        self.label = ""  # of the weights last pushed, as the engine knows them
        self._nonce = secrets.token_hex(4)
        self._stamp = Stamp()
        self._end_ids: list[int] = []
        self._bound = self._vocabulary = 0

    # ------------------------------------------------------------------ what a kind of engine adds

    @abstractmethod
    def start(self, policy: Any) -> None:
        """Make sure that the engine runs; its weights may be anything."""

    @abstractmethod
    def push(self, weights: Iterator[tuple[str, Tensor]], label: str) -> None:
        """Load weights, forget cached prefixes, then take the label."""

    @abstractmethod
    def served_label(self) -> str:
        """Label of the weights that the engine holds; an empty string if it is not there."""

    @abstractmethod
    def complete(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests."""

    def agreed(self, label: str) -> str:
        """The label that all ranks of a shared engine use."""
        return label

    # ------------------------------------------------------------------ weights

    def sync(self, policy: Any, version: int) -> None:
        """Push the weights if they changed. See ``Engine.sync``.

        With sharded weights every rank must call it.

        Raises:
            RuntimeError: The engine does not hold the weights after the push.
        """
        device = next(policy.parameters()).device
        ranks = Ranks(policy, device, always=self.is_shared)
        if not ranks.any(self._is_due(policy, version)):
            return
        self.policy_version = -1  # weights that were pushed by half are nobody's
        self.start(policy)
        config = policy.config.get_text_config()
        self._vocabulary = int(config.vocab_size)
        # vLLM refuses end tokens that no model could write
        self._end_ids = [token for token in eos_ids(policy) if token < config.vocab_size]
        known = getattr(config, "max_position_embeddings", None)
        self._bound = self.max_model_len or int(known or 0)
        self.num_pushes += 1
        label = self.agreed(f"{self._nonce}-{self.num_pushes}-{version}")
        with torch.no_grad():
            self.push(named_weights(policy), label)
        if self.is_shared:
            ranks.maximum(0)  # nobody asks before everything is there
        self.label = label
        self._check_label(self.served_label())
        self._stamp.keep(policy, version)
        self.policy_version = version

    def _is_due(self, policy: Any, version: int) -> bool:
        if not self.is_ready or self.served_label() != self.label:
            return True
        if not self._stamp.differs(policy, version):
            return False
        steps = version - self.policy_version
        return not policy.training or not 0 < steps < self.sync_every

    def _check_label(self, *labels: str) -> None:
        if set(labels) != {self.label}:
            self.policy_version = -1
            raise RuntimeError(
                f"the engine answers with other weights than the policy's: it has "
                f"{', '.join(sorted(labels)) or 'none'}, expected {self.label}. Does another run "
                f"use the same endpoint? Resume with resume=auto"
            )

    # ------------------------------------------------------------------ completions

    @property
    def bound(self) -> int:
        """Longest sequence (prompt and completion) in tokens; 0 where it is not known."""
        return self._bound

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Complete the prompts. See ``Engine.generate``.

        Raises:
            RuntimeError: No weights yet, or the engine answers with other weights.
            ValueError: A prompt fills ``max_model_len``.
        """
        if not self.is_ready:
            raise RuntimeError("the engine has no weights yet: call sync(policy, version) first")
        requests = [request for prompt in prompts for request in self.requests(prompt, sampling)]
        answers = self.complete(requests) if requests else []
        if answers:
            self._check_label(*frozenset.union(*(answer.labels for answer in answers)))
        flat = [self._completion(answer) for answer in answers]
        size = sampling.samples
        return [flat[start : start + size] for start in range(0, len(flat), size)]

    def requests(self, prompt: Prompt, sampling: Sampling) -> list[Request]:
        """One request a sample, seeded by (key, prompt, sample): batching changes nothing."""
        limit = min(sampling.max_new_tokens, prompt.max_new_tokens or sampling.max_new_tokens)
        if self._bound:
            room = self._bound - len(prompt.token_ids)
            if room < 1:
                raise ValueError(
                    f"engine.max_model_len={self._bound}: prompt {prompt.uid!r} has "
                    f"{len(prompt.token_ids)} tokens, which leaves no room for an answer; raise "
                    f"engine.max_model_len or shorten the prompts"
                )
            limit = min(limit, room)
        shared = {
            "temperature": sampling.temperature,
            "max_tokens": limit,
            "stop_token_ids": self._stops(sampling),
            "ignore_eos": True,  # the configuration's own, where the generation defaults differ
            "logprobs": sampling.candidates,  # 0: of the sampled token alone
            "detokenize": False,
        }
        if sampling.temperature > 0:
            shared |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        ids = list(prompt.token_ids)
        requests = []
        for sample in range(sampling.samples):
            own: dict[str, Any] = {}
            if sampling.temperature > 0:
                # vLLM takes signed 64-bit seeds, and -1 for none
                own["seed"] = sample_seed(self.key, prompt.uid, sample) >> 1
            requests.append(Request(ids, shared | own))
        return requests

    def _stops(self, sampling: Sampling) -> list[int]:
        """End tokens and those of the sampling, each once; vLLM keeps them in the answer."""
        own = [token for token in sampling.stop_ids if token < self._vocabulary]
        return list(dict.fromkeys([*self._end_ids, *own])) if own else self._end_ids

    def _completion(self, answer: Answer) -> Completion:
        reason = REASONS.get(answer.finish_reason or "", FinishReason.ERROR)
        ids, logprobs = answer.token_ids, answer.logprobs
        return Completion(ids, logprobs, reason, self.policy_version, answer.candidates)
