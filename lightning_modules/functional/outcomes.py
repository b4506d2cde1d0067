"""What came back of one evaluation set of contexts: kept for figures and for paired tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datamodules.tasks.compression import Context

#: Set that the twins of minimal pairs are in.
TWIN_SET = "pc"


@dataclass(frozen=True)
class SetOutcome:
    """N contexts and what their memories held, rows in the order of the set.

    Args:
        name: Of the set: ``pc``, ``cf``, ``sw``, ``neu`` or ``neg`` in PriorWorld.
        contexts: N sources with their facts.
        decoded: N texts that the decoder wrote on its own (greedy).
        values: N mappings, slot key -> decoded value, None or absent where the fact is lost.
        memory: ``(N, m, d)`` float32 on the CPU: Z, what the decoder reads; ``(0, 0, 0)`` where
            contexts have different m (long texts in segments).
        entropy_slot: ``(n_slots,)`` entropies of the decoder on tokens of facts (nats).
        twins: N places of the minimal pair's other half in the set ``pc``, -1 for none; empty is
            the same as -1 throughout.

    Raises:
        ValueError: Fields are not of N rows.
    """

    name: str
    contexts: list[Context]
    decoded: list[str]
    values: list[Mapping[str, str | None]]
    memory: Tensor
    entropy_slot: Tensor = field(default_factory=lambda: torch.empty(0))
    twins: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = {
            "decoded": len(self.decoded),
            "values": len(self.values),
            "memory": len(self.memory) or len(self.contexts),
            "twins": len(self.twins) or len(self.contexts),
        }
        wrong = [f"{size} of {name}" for name, size in sizes.items() if size != len(self.contexts)]
        if wrong:
            raise ValueError(
                f"the outcome of {self.name!r} has {len(self.contexts)} contexts but "
                f"{', '.join(wrong)}"
            )
        if self.memory.dim() != 3:
            raise ValueError(f"memory must be (N, m, d), got {tuple(self.memory.shape)}")
