"""CoCoA's losses over rows that two ranks share unevenly, by DDP.

``cocoa_worker.py <backbone folder> <output folder>`` writes ``<case>.<rank>.pt`` for each case; a
script for torchrun. ``found`` in one process gives what the joined batch gives.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datamodules.image_text import ImageTextDataModule
from datamodules.pairs import PairBatch, PairSource
from tests.lightning_modules.embedding.small_cocoa import batch, cocoa, scenes

ROWS = 8
#: Stage and the rows of rank 0; rank 1 has the others.
CASES: dict[str, tuple[str, list[int]]] = {
    "warmup": ("warmup", [0, 1, 2, 3, 4]),
    "bridge": ("bridge", [0, 4, 5]),
    "bridge_without_images": ("bridge", []),  # rank 1 has texts only: see ``rows_of``
    "contrastive": ("contrastive", [0, 1, 2, 3, 4]),
}


class Step(nn.Module):
    """A loss as a forward pass, so that DDP sees all of it."""

    def __init__(self, folder: Path, data: ImageTextDataModule) -> None:
        super().__init__()
        self.module = cocoa(folder, data)

    def forward(self, stage: str, given: Any) -> Tensor:
        """The loss of a batch."""
        if stage == "contrastive":
            items = [*given.queries, *given.passages]
            return self.module.contrast(self.module.encode(self.module.padded(items)), given)
        return (
            self.module.warmup_loss(given) if stage == "warmup" else self.module.bridge_loss(given)
        )


def rows_of(name: str, whole: Any, rank: int) -> list[int]:
    """Numbers of a rank's rows."""
    mine = CASES[name][1]
    if name == "bridge_without_images":
        mine = [row for row in range(ROWS) if whole.items[row].image is not None]
        assert 0 < len(mine) < ROWS
    return mine if rank == 0 else [row for row in range(ROWS) if row not in mine]


def part(data: ImageTextDataModule, whole: Any, rows: list[int]) -> Any:
    """Some rows of a batch."""
    if isinstance(whole, PairBatch):
        pairs = data.training_sets()[0]
        known = {row.uid: row for row in pairs.rows}
        chosen = [(pairs, known[whole.uids[row]], None) for row in rows]
        return PairSource(data, batches=[]).collate(chosen, len(chosen))
    names = ("items", "spans", "bridges", "seeds", "uids")
    return replace(whole, **{name: [getattr(whole, name)[row] for row in rows] for name in names})


def found(name: str, folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Gradients, and this rank's metrics as sums and counts."""
    torch.manual_seed(0)  # the head of the image decoder
    stage = CASES[name][0]
    data = scenes(folder, batch_size=ROWS)
    step = Step(folder, data)
    model: Any = DistributedDataParallel(step) if world_size == 2 else step
    whole = batch(data, stage)
    own = list(range(ROWS)) if world_size == 1 else rows_of(name, whole, rank)
    model(stage, part(data, whole, own)).backward()
    gradients = {n: p.grad.clone() for n, p in step.module.named_parameters() if p.grad is not None}
    metrics = {tag: (float(a), float(b)) for tag, (a, b) in step.module._window.items()}
    return {"gradients": gradients, "metrics": metrics, "rows": own}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    backbone, output, me = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    for case in CASES:
        torch.save(found(case, backbone, me, 2), output / f"{case}.{me}.pt")
    dist.destroy_process_group()
