"""Agentic-R's losses over rows that two ranks share unevenly, and a validation by an agent, by DDP.

``agentic_worker.py <backbone folder> <output folder>`` writes ``<case>.<rank>.pt`` for each case
and ``validate.<rank>.pt``; a script for torchrun. ``found`` in one process gives what the joined
batch gives.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datamodules.pair_source import known_positives
from datamodules.texts import chunk_of
from datamodules.utility_source import UtilityBatch, UtilitySource
from tests.lightning_modules.agentic_parts import data_of, module_of, trainer_of

#: Options of the module, and the rows of rank 0; rank 1 has the others.
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "contrastive": ({}, [0, 1, 2, 3, 4]),
    "unmasked": ({"false_negative_mask": False}, [0, 2, 3, 4, 5]),  # siblings on two ranks
    "siblings_apart": ({}, [0, 2, 3, 4, 5]),
    "ranked": ({"rank_loss_weight": 0.5}, [0, 2, 4]),
    "rank_only": ({"rank_loss_weight": 1.0}, [1, 2, 3, 6, 7]),
}
ROWS = 8


class Step(nn.Module):
    """A loss as a forward pass in float64, so that DDP sees all of it."""

    def __init__(self, folder: Path, data: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.module = module_of(folder, temperature=0.1, **options)
        self.module.encoding = data.encoding
        self.module.configure_model()
        self.module.double()

    def forward(self, batch: UtilityBatch) -> Tensor:
        """The loss of a batch."""
        items = [*batch.queries, *batch.passages]
        return self.module.contrast(self.module.encode(chunk_of(items, 0)), batch)


def found(name: str, folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Gradients, loss, and this rank's metrics as sums and counts."""
    options, first = CASES[name]
    data = data_of(folder)
    step = Step(folder, data, options)
    model: Any = DistributedDataParallel(step) if world_size == 2 else step
    own = list(range(ROWS))
    if world_size == 2:
        own = first if rank == 0 else [row for row in own if row not in first]
    pairs = data.training_sets()[0]
    known = known_positives(pairs.rows)
    chosen = [(pairs, pairs.rows[row], known) for row in own]
    loss = model(UtilitySource(data).collate(chosen, len(chosen)))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in step.module.named_parameters() if p.grad is not None}
    metrics = {tag: (float(a), float(b)) for tag, (a, b) in step.module._window.items()}
    return {"gradients": gradients, "metrics": metrics, "loss": float(loss)}


def validated(folder: Path, **options: Any) -> dict[str, float]:
    """Metrics of a validation by an agent."""
    module = module_of(folder)
    trainer_of(**options).validate(module, data_of(folder, eval_batch_size=2), verbose=False)
    return module.results


if __name__ == "__main__":
    torch.set_num_threads(1)
    backbone, output, me = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    results = validated(backbone, devices=2, strategy="ddp")
    torch.save(results, output / f"validate.{me}.pt")
    for case in CASES:
        torch.save(found(case, backbone, me, 2), output / f"{case}.{me}.pt")
    dist.destroy_process_group()
