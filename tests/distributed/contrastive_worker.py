"""Contrastive losses over the rows of all ranks, plainly and with cached gradients, by DDP.

``contrastive_worker.py <output folder> <case> ...`` writes ``<case>.<rank>.pt`` for each case; a
script for torchrun. ``found`` in one process gives what the joined batch gives.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.embedding.gathering import (
    gather_info,
    gather_rows,
    gather_with_grad,
    joined_mean,
)
from lightning_modules.embedding.grad_cache import cached_step
from lightning_modules.functional.contrastive import (
    ContrastiveLoss,
    PairInfo,
    info_nce,
    matryoshka_info_nce,
)

ROWS, GROUP, WIDTH = 8, 3, 6


class Case(NamedTuple):
    """One way to come to the same gradient.

    Args:
        split: Rows of rank 0; rank 1 has the others.
        options: Of the loss.
        informed: Whether ids, masks and rows without in-batch negatives are given.
        keep: Graphs kept by cached gradients; None for an ordinary step.
        way: ``own``: each rank's own rows; ``whole``: every rank takes the mean over all rows.
        inside: Whether the step is inside DDP's forward, as Lightning's ``training_step`` is.
    """

    split: int = 4
    options: dict[str, Any] = {}  # noqa: RUF012
    informed: bool = False
    keep: int | None = None
    way: str = "own"
    inside: bool = False


BOTH = {"symmetric": True}
CASES = {
    "equal": Case(),
    "unequal": Case(5, BOTH),
    "empty_rank": Case(8, BOTH),
    "informed": Case(5, BOTH | {"margin": -0.3}, informed=True),
    "matryoshka": Case(3, BOTH | {"dims": [2, 4]}),
    "whole": Case(5, BOTH, way="whole"),
    "cached_none_kept": Case(5, BOTH, keep=0),
    "cached_one_kept": Case(5, BOTH, informed=True, keep=1),
    "cached_all_kept": Case(5, BOTH, keep=9),
    "inside_none_kept": Case(4, BOTH, keep=0, inside=True),
    "inside_one_kept": Case(4, BOTH, keep=1, inside=True),
    "inside_all_kept": Case(4, BOTH, keep=9, inside=True),
}


class Encoder(nn.Module):
    """Two layers in float64 behind a forward that can also be a whole step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    def forward(self, x: Tensor, step: Callable[..., Tensor] | None = None) -> Tensor:
        """Vectors of ``x``, or what ``step(layers, x)`` gives."""
        return self.layers(x) if step is None else step(self.layers, x)


def data(rows: slice) -> tuple[Tensor, PairInfo]:
    """Inputs ``(n, 1 + GROUP, WIDTH)`` and what is known of some rows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 1 + GROUP, WIDTH, generator=generator, dtype=torch.float64)
    texts = torch.randint(0, 12, (ROWS, GROUP), generator=generator)
    known = torch.stack([texts[:, 0], torch.randint(0, 12, (ROWS,), generator=generator)], 1)
    first = rows.start == 0
    info = PairInfo(
        in_batch=torch.tensor([True, True, False, True, True, True, False, True])[rows],
        counted=torch.tensor([True] * 6 + [True, False])[rows],
        passage_mask=(texts % 5 > 0)[rows].index_fill(1, torch.tensor([0]), True),
        text_ids=texts[rows],
        query_ids=torch.tensor([0, 1, 2, 3, 0, 5, 6, 1])[rows],
        # ranks fill up to different widths
        known_positives=torch.cat([known, torch.full((ROWS, 1), -1)], 1)[rows] if first else
        known[rows],
    )  # fmt: skip
    return x[rows], info


def loss_of(vectors: Tensor, info: PairInfo, case: Case) -> tuple[Tensor, ContrastiveLoss]:
    """Loss that a rank returns, and what it was made of; ``vectors`` are ``(n, 1 + GROUP, 4)``."""
    (queries, passages), rows = gather_with_grad(vectors[:, 0], vectors[:, 1:])
    everything = gather_info(info) if case.informed else None
    function: Any = matryoshka_info_nce if "dims" in case.options else info_nce
    own = None if case.way == "whole" else rows
    made = function(queries, passages, temperature=0.2, info=everything, rows=own, **case.options)
    if case.way == "whole":
        return made.loss_sum / made.num_rows, made
    return joined_mean(made.loss_sum, made.num_rows), made


def found(case: Case, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Gradients, and this rank's metrics."""
    rows = slice(0, ROWS)
    if world_size == 2:
        rows = slice(0, case.split) if rank == 0 else slice(case.split, ROWS)
    x, info = data(rows)
    encoder = Encoder()
    model: Any = DistributedDataParallel(encoder) if world_size == 2 else encoder
    kept: list[ContrastiveLoss] = []

    def loss_fn(vectors: list[Tensor]) -> Tensor:
        loss, made = loss_of(torch.cat(vectors), info, case)
        kept.append(made)
        return loss

    def step(encode: Any, x: Tensor) -> Tensor:
        if case.keep is None:
            return loss_fn([encode(x)])
        no_sync = model.no_sync if world_size == 2 and not case.inside else nullcontext
        return cached_step(
            encode, list(x.split(2)), loss_fn, keep=case.keep, no_sync=no_sync,
            defer_last=case.inside,
        ).loss  # fmt: skip

    loss = model(x, step) if case.inside else step(model, x)
    if case.keep is None or case.inside:
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in encoder.parameters()]  # type: ignore
    metrics = {name: (float(a), float(b)) for name, (a, b) in kept[0].metrics.items()}
    return {"gradients": gradients, "metrics": metrics, "num_rows": kept[0].num_rows}


def refused(rank: int) -> list[str]:
    """What ranks that disagree are told."""
    messages = []
    for attempt in (
        lambda: gather_with_grad(torch.zeros(2, 3 + rank)),
        lambda: gather_with_grad(torch.zeros(2, 3, dtype=(torch.float32, torch.float64)[rank])),
        lambda: gather_info(PairInfo(query_ids=torch.zeros(2).long()) if rank else PairInfo()),
    ):
        try:
            attempt()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def half(rank: int) -> Tensor:
    """Gradient of bfloat16 rows: 4 from rank 0 and 1 from rank 1."""
    x = torch.ones(1 + rank, 2, dtype=torch.bfloat16, requires_grad=True)
    (joined,), _ = gather_with_grad(x)
    (joined.float().sum() * (4.0 if rank == 0 else 1.0)).backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    return x.grad.float()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name in sys.argv[2:]:
        torch.save(found(CASES[name], rank, 2), folder / f"{name}.{rank}.pt")
    ids = gather_rows(torch.arange(rank * 3).reshape(rank, 3))
    flags = gather_rows(torch.tensor([True, False][rank:]))
    others = {"refused": refused(rank), "half": half(rank), "ids": ids, "flags": flags}
    torch.save(others, folder / f"others.{rank}.pt")
    dist.destroy_process_group()
