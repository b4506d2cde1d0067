"""What engines ask of a policy: its end tokens, whether it is sharded, its weights by name."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def eos_ids(policy: Any) -> list[int]:
    """Tokens that end a completion: of the generation defaults, else of the configuration.

    Args:
        policy: A Hugging Face causal LM or a wrapper of one.

    Raises:
        ValueError: There are none.
    """
    generation = getattr(policy, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = policy.config.eos_token_id if eos is None else eos
    if eos is None:
        raise ValueError("the backbone has no end token: set eos_token_id in its config.json")
    return [int(token) for token in eos] if isinstance(eos, (list, tuple)) else [int(eos)]


class Ranks:
    """Agreement between ranks, needed only where the policy's parameters are sharded.

    Args:
        policy: Whose parameters.
        device: Where they are.
        always: Agree also where every rank holds the whole policy.
    """

    def __init__(self, policy: Any, device: torch.device, *, always: bool = False) -> None:
        sharded = any(hasattr(parameter, "full_tensor") for parameter in policy.parameters())
        self.is_sharded = (sharded or always) and dist.is_available() and dist.is_initialized()
        self.device = device

    def maximum(self, value: int) -> int:
        """Largest value of any rank."""
        if not self.is_sharded:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.maximum(int(flag)))


def named_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """Whole weights under their Hugging Face names, one at a time.

    Wrappers say how (``CausalLM.named_weights`` gathers shards and merges adapters); a plain
    Hugging Face model is its own state dict.
    """
    own = getattr(policy, "named_weights", None)
    if own is not None:
        yield from own()
        return
    for name, value in policy.state_dict().items():
        yield name, value.detach()


class Stamp:
    """Tells whether a policy's weights may have changed since it was last looked at.

    Optimizer steps are counted by their number; ``torch`` counts writes in place, which finds
    weights that were loaded or merged between two steps.
    """

    def __init__(self) -> None:
        self._policy: Any = None
        self._seen: tuple[int, int] | None = None

    def of(self, policy: Any, version: int) -> tuple[int, int]:
        """Number of steps and of writes."""
        return version, sum(int(parameter._version) for parameter in policy.parameters())

    def differs(self, policy: Any, version: int) -> bool:
        """Whether this is another policy, or other weights, than those last kept."""
        same = self._policy is not None and self._policy() is policy
        return not same or self._seen != self.of(policy, version)

    def keep(self, policy: Any, version: int) -> None:
        """Remember these weights."""
        self._policy, self._seen = weakref.ref(policy), self.of(policy, version)
