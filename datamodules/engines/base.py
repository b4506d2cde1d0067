"""What an engine is, and how its sampling seeds are made.

Seeds derive from (key, prompt, sample), never from a position in a batch or from a rank, so the
same prompt gets the same tokens after a restart, in another batch, or on another number of ranks
(up to rounding in the model itself).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datamodules.experience import Completion, Prompt


@dataclass(frozen=True)
class Sampling:
    """How to draw completions.

    Args:
        temperature: Softmax temperature; 0 decodes greedily.
        samples: Completions a prompt.
        max_new_tokens: Upper bound of tokens a completion; a prompt's own bound wins if smaller.
        top_p: Nucleus mass, 1 keeps the whole distribution.
        top_k: Number of most probable tokens kept, 0 keeps all.
        candidates: Most probable tokens reported at every position (``Completion.candidates``).
        stop_ids: Tokens that end a completion besides the end tokens; they stay in it, and the
            reason is ``stop``.

    Raises:
        ValueError: A value is out of range.
    """

    temperature: float = 1.0
    samples: int = 1
    max_new_tokens: int = 64
    top_p: float = 1.0
    top_k: int = 0
    candidates: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.samples < 1:
            problems.append(f"samples={self.samples} must be at least 1")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be in (0, 1]")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be 0 (off) or more")
        if self.candidates < 0:
            problems.append(f"candidates={self.candidates} must be 0 (none) or more")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


def sample_seed(key: str, prompt_uid: str, sample: int) -> int:
    """64-bit seed of one completion, equal on every machine and rank."""
    digest = hashlib.blake2b(f"{key}|{prompt_uid}|{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Engine(ABC):
    """Writes completions with the weights it was last given.

    ``key`` names the stream of sampling seeds; the datamodule sets it anew for each rollout, and
    evaluation code sets it with ``keyed``.
    """

    key: str = ""
    policy_version: int = -1

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """``sampling.samples`` completions for every prompt, in the order of the prompts.

        Under sharding every rank must call it equally often, with an empty list if need be.
        """

    @abstractmethod
    def sync(self, policy: Any, version: int) -> None:
        """Take the weights of ``policy`` (any Hugging Face causal LM or a wrapper of one).

        Args:
            policy: Called as ``policy(input_ids=..., attention_mask=..., position_ids=...,
                past_key_values=..., use_cache=..., logits_to_keep=...)``.
            version: Optimizer steps the weights have seen; completions carry it.
        """

    @property
    def is_ready(self) -> bool:
        """Whether weights were given."""
        return self.policy_version >= 0

    def rest(self) -> None:  # noqa: B027
        """Nothing will be generated for a while: an engine may free the device. Does nothing."""

    def close(self) -> None:  # noqa: B027
        """Stop what the engine runs; the next ``sync`` starts it again. Does nothing."""

    @contextmanager
    def keyed(self, key: str) -> Iterator[None]:
        """Use another stream of sampling seeds inside the block."""
        previous, self.key = self.key, key
        try:
            yield
        finally:
            self.key = previous
