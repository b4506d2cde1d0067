"""The vocabulary of rollouts: prompts, completions, rollouts and the tensors made of them.

Shape legend: ``N`` sequences, ``T`` padded length of prompt plus completion, ``B`` prompts,
``G`` samples a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datamodules.tasks.base import Task


class FinishReason(StrEnum):
    """Why a completion ended. Truncated and failed ones are never scored as ordinary text."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True)
class Prompt:
    """One prompt, as engines, verifiers and loggers see it.

    Args:
        uid: Stable identity. Sampling seeds derive from it, so it must not depend on the rank
            or on the position in a batch.
        token_ids: The prompt's token ids, without padding.
        task: Owner of the prompt; its ``verify`` scores completions.
        domain: Short name under which metrics of this kind of prompt are logged, e.g. ``pref``.
        label: Right answer where there is one (for judges 1 or 2).
        record: What the task needs to verify a completion.
        max_new_tokens: Upper bound of completion tokens for this prompt; None leaves the engine's.
    """

    uid: str
    token_ids: tuple[int, ...]
    task: Task = field(repr=False, compare=False)
    domain: str = "default"
    label: int | None = None
    record: Any = field(default=None, repr=False)
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Candidates:
    """The most probable tokens at every position of a completion, most probable first.

    Args:
        ids: ``(L, C)`` int64 token ids.
        logprobs: ``(L, C)`` nats under the distribution that the token was drawn from.
    """

    ids: Tensor
    logprobs: Tensor

    def __len__(self) -> int:
        return int(self.ids.shape[0])


@dataclass(frozen=True)
class Completion:
    """What an engine wrote for one prompt.

    Args:
        token_ids: Completion ids, the end token included when it was sampled.
        logprobs: Log-probability (nats) of each token under the distribution it was drawn from.
        finish_reason: Why it ended.
        policy_version: Optimizer steps the weights had seen when it was sampled.
        candidates: Where ``Sampling.candidates`` asked for them, else None.
        observed: True for tokens that an environment wrote (search results), one a token; None
            where the policy wrote them all. Their log-probs are 0 and nothing trains on them.
        trace: What happened in an episode, for its task; None for a plain completion.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int = 0
    candidates: Candidates | None = field(default=None, repr=False, compare=False)
    observed: tuple[bool, ...] | None = field(default=None, repr=False)
    trace: Any = field(default=None, repr=False, compare=False)

    @property
    def num_written(self) -> int:
        """Tokens that the policy wrote."""
        return len(self.token_ids) - sum(self.observed or ())


@dataclass
class Rollouts:
    """All completions of one draw of prompts, group by group, and what hooks add to them.

    ``reward``, ``parts`` and ``advantages`` are filled by the hooks ``score`` and ``advantages``;
    ``old_logprobs``, ``ref_logprobs`` and ``extra`` by ``annotate``. A hook may also add to
    ``extra`` and ``info`` or set ``is_trained``. Tensors are on the CPU.

    Args:
        prompts: One a completion (a group repeats its prompt), length N.
        completions: Length N.
        groups: ``(N,)`` index of the prompt within this draw.
        num_updates: Optimizer steps that will be taken on these rollouts. With 1 the policy is
            the one that sampled them, and old log-probs need no forward pass of their own.
        index: Number of this draw since the start of the run.
        reward: ``(N,)``.
        parts: Named parts of the reward, each ``(N,)``.
        advantages: ``(N,)`` or ``(N, T)`` with T the longest completion.
        old_logprobs: ``(N, T)`` nats, or None.
        ref_logprobs: ``(N, T)`` nats, or None.
        extra: Further tensors ``(N, T)`` that a method needs in training, by name.
        is_trained: ``(N,)`` False for completions that are scored and logged but not trained on;
            None trains on all.
        info: Anything worth a column in the sample table, each of length N.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    groups: Tensor
    num_updates: int = 1
    index: int = 0
    reward: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    is_trained: Tensor | None = None
    info: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def from_groups(
        cls, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]
    ) -> Rollouts:
        """Flatten an engine's answer: ``groups[i]`` are the completions of ``prompts[i]``."""
        sizes = [len(group) for group in groups]
        return cls(
            prompts=[p for p, size in zip(prompts, sizes, strict=True) for _ in range(size)],
            completions=[completion for group in groups for completion in group],
            groups=torch.arange(len(sizes)).repeat_interleave(
                torch.tensor(sizes, dtype=torch.long)
            ),
        )

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def policy_version(self) -> int:
        """Optimizer steps behind the oldest completion."""
        return min((c.policy_version for c in self.completions), default=0)

    @property
    def mask(self) -> Tensor:
        """``(N, T)`` True on completion tokens, whether they are trained on or not."""
        sizes = torch.tensor([len(c.token_ids) for c in self.completions], dtype=torch.long)
        return torch.arange(int(sizes.max()) if len(sizes) else 0)[None, :] < sizes[:, None]

    @property
    def written_mask(self) -> Tensor:
        """``(N, T)`` True on tokens that the policy wrote: it has gaps where others are between.

        Raises:
            ValueError: A completion whose ``observed`` has another length than its tokens.
        """
        mask = self.mask
        for row, completion in enumerate(self.completions):
            if completion.observed is not None:
                seen = torch.tensor(completion.observed, dtype=torch.bool)
                if len(seen) != len(completion.token_ids):
                    raise ValueError(
                        f"prompt {self.prompts[row].uid!r}: {len(seen)} marks of observed tokens "
                        f"for {len(completion.token_ids)} tokens"
                    )
                mask[row, : len(seen)] &= ~seen
        return mask

    @property
    def trained_mask(self) -> Tensor:
        """``(N, T)`` True on tokens that the policy wrote and that are trained on."""
        mask = self.written_mask
        return mask if self.is_trained is None else mask & self.is_trained[:, None]

    def leave_out(self, rows: Tensor) -> None:
        """Do not train on these rows ``(N,)``; others that were left out stay so."""
        kept = (
            torch.ones(len(self), dtype=torch.bool) if self.is_trained is None else self.is_trained
        )
        self.is_trained = kept & ~rows

    def annotations(self, values: Mapping[str, Tensor | None]) -> None:
        """Keep what the hook ``annotate`` gave: log-probs in fields of their own, others aside."""
        for name, value in values.items():
            if name in ("old_logprobs", "ref_logprobs"):
                setattr(self, name, value)
            elif value is not None:
                self.extra[name] = value

    def batch(self) -> Experience:
        """The tensors that a training step reads, right-padded."""
        return collate(self)


@dataclass
class Experience:
    """Tensors of N rollouts, prompts and completions contiguous, padded on the right.

    Args:
        input_ids: ``(N, L)`` prompt then completion.
        attention_mask: ``(N, L)`` 1 on real tokens.
        prompt_lengths: ``(N,)``.
        mask: ``(N, T)`` True on completion tokens that are trained on; column 0 is the first
            completion token. Observed tokens are gaps in it, and context all the same.
        sampler_logprobs: ``(N, T)`` what the engine reported.
        advantages: ``(N, T)``.
        reward: ``(N,)``.
        groups: ``(N,)`` equal for rows of one prompt.
        domains: ``(N,)`` index into ``domain_names``.
        domain_names: Names of the domains in this batch.
        policy_version: Optimizer steps the sampling policy had seen.
        window_tokens: Completion tokens in the accumulation window this batch belongs to, summed
            over ranks and divided by their number: the denominator of a token mean.
        window_sequences: The same for sequences.
        window_size: Micro-batches in the window (Lightning divides the loss by it).
        old_logprobs: ``(N, T)`` or None (then the policy is the sampler, see ``Rollouts``).
        ref_logprobs: ``(N, T)`` or None.
        extra: Further ``(N, T)`` tensors of the method, by name.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    reward: Tensor
    groups: Tensor
    domains: Tensor
    domain_names: list[str]
    policy_version: int = 0
    window_tokens: float = 0.0
    window_sequences: float = 0.0
    window_size: int = 1
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def domain(self) -> str | None:
        """The one domain of all rows; None where they are of several."""
        present = self.domains.unique().tolist()
        return self.domain_names[present[0]] if len(present) == 1 else None

    def select(self, rows: Tensor) -> Experience:
        """The given rows, trimmed to their longest."""
        lengths = self.attention_mask.index_select(0, rows).sum(1)
        width = int(lengths.max()) if len(rows) else 0
        completion = int(span(self.mask.index_select(0, rows)).max()) if len(rows) else 0
        bound = {"input_ids": width, "attention_mask": width}

        def cut(name: str, value: Tensor) -> Tensor:
            value = value.index_select(0, rows)
            return value[:, : bound.get(name, completion)] if value.ndim == 2 else value

        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            values[item.name] = cut(item.name, value) if isinstance(value, Tensor) else value
        values["extra"] = {name: cut(name, value) for name, value in self.extra.items()}
        return Experience(**values)

    def state(self) -> dict[str, Any]:
        """Plain containers, so that a checkpoint loads with ``weights_only=True``."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def span(mask: Tensor) -> Tensor:
    """``(N,)`` columns up to the last True of each row of a mask ``(N, T)``, gaps included.

    Example:
        >>> span(torch.tensor([[True, False, True, False], [False] * 4])).tolist()
        [3, 0]
    """
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * columns).amax(1) if mask.shape[1] else mask.sum(1)


def collate(rollouts: Rollouts) -> Experience:
    """Pad rollouts into tensors; see ``Experience`` for shapes."""
    prompts, completions = rollouts.prompts, rollouts.completions
    count = len(completions)
    sizes = [len(c.token_ids) for c in completions]
    width = max((len(p.token_ids) + n for p, n in zip(prompts, sizes, strict=True)), default=0)
    longest = max(sizes, default=0)
    ids = torch.zeros(count, width, dtype=torch.long)
    attention = torch.zeros(count, width, dtype=torch.long)
    sampler = torch.zeros(count, longest)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = prompt.token_ids + completion.token_ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
        sampler[row, : sizes[row]] = torch.tensor(completion.logprobs)
    mask = rollouts.trained_mask
    advantages = torch.zeros(count) if rollouts.advantages is None else rollouts.advantages
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(count, longest)
    names = sorted({prompt.domain for prompt in prompts})
    return Experience(
        input_ids=ids,
        attention_mask=attention,
        prompt_lengths=torch.tensor([len(p.token_ids) for p in prompts], dtype=torch.long),
        mask=mask,
        sampler_logprobs=sampler,
        advantages=advantages.float() * mask,
        reward=torch.zeros(count) if rollouts.reward is None else rollouts.reward.float(),
        groups=prompt_groups(rollouts),
        domains=torch.tensor([names.index(p.domain) for p in prompts], dtype=torch.long),
        domain_names=names,
        policy_version=rollouts.policy_version,
        old_logprobs=rollouts.old_logprobs,
        ref_logprobs=rollouts.ref_logprobs,
        extra=rollouts.extra,
    )


def prompt_groups(rollouts: Rollouts) -> Tensor:
    """``(N,)`` equal for rows of one group with the same prompt tokens.

    A group whose rows begin in several ways (forced beginnings, criteria of their own) shares a
    baseline, but no prompt.
    """
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    rows = zip(rollouts.groups.tolist(), rollouts.prompts, strict=True)
    keys = [(group, prompt.token_ids) for group, prompt in rows]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.long)
