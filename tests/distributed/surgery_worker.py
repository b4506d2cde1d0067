"""Two optimizer steps with gradient surgery, by any strategy; a script for torchrun.

``surgery_worker.py <backbone folder> <output folder> <way> ...`` writes ``<way>.pt`` (whole
weights) and ``<way>.<rank>.json`` (the weights of surgery, or the error that the rank met).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.gradient_surgery import GradientSurgery
from datamodules.demonstrations import Supervised
from datamodules.loader import Loader, Source
from lightning_modules.backbones.sharding import FSDP2
from lightning_modules.sft import SFT

ORDER = ("chat", "math", "if", "math")
ROWS, PROMPT, COMPLETION = 4, 3, 5
SGD = {"class_path": "torch.optim.SGD", "lr": 1.0, "warmup_steps": 0}


class Rows(Source):
    """Random sequences of equal length, so that a mean over ranks is the mean over rows.

    Args:
        rank: Takes every ``world``-th row.
        world: Number of ranks.
        order: Domains of a window's micro-batches on this rank; None for a mixed one.
    """

    window = len(ORDER)

    def __init__(self, rank: int, world: int, order: tuple[str | None, ...] = ORDER) -> None:
        self.rank, self.world, self.order = rank, world, order

    def __len__(self) -> int:
        return 2 * self.window

    def batch(self, epoch: int, index: int) -> Supervised:
        """The same on every call."""
        generator = torch.Generator().manual_seed(index)
        domain = self.order[index % self.window]
        low, high = {"chat": (3, 30), "math": (20, 60), "if": (40, 80)}.get(str(domain), (3, 80))
        ids = torch.randint(low, high, (ROWS, PROMPT + COMPLETION), generator=generator)
        # the same prompts go on differently in each domain: that is what conflicts
        ids[:, :PROMPT] = torch.arange(3, 3 + PROMPT)
        rows = torch.arange(self.rank, ROWS, self.world)
        names = ["chat", "if", "math"]
        domains = torch.full((len(rows),), names.index(domain or "chat"))
        domains[0] = names.index(domain or "math")
        return Supervised(
            input_ids=ids[rows],
            prompt_lengths=torch.full((len(rows),), PROMPT),
            mask=torch.ones(len(rows), COMPLETION, dtype=torch.bool),
            domains=domains,
            domain_names=names,
        )


class OneBadRank(SFT):
    """In the first step one domain's loss is not finite on rank 1."""

    def training_step(self, batch: Supervised, batch_idx: int) -> Tensor:
        """Times NaN where the rank is bad."""
        is_bad = self.global_rank == 1 and self.global_step == 0 and batch_idx == ORDER.index("if")
        return super().training_step(batch, batch_idx) * (float("nan") if is_bad else 1.0)


def orders(way: str, rank: int) -> tuple[str | None, ...]:
    """Domains on a rank: rank 1 differs in the ways that must be refused."""
    if rank == 1 and way.endswith("misaligned"):
        return ORDER[::-1]
    return (*ORDER[:2], None, ORDER[3]) if rank == 1 and way.endswith("mixed") else ORDER


def train(folder: str, way: str, rank: int, world: int) -> tuple[Any, GradientSurgery]:
    """Fit two steps."""
    strategy: Any = "auto"
    if way.startswith("ddp"):
        strategy = DDPStrategy(gradient_as_bucket_view="views" in way)
    elif way.startswith("fsdp"):
        strategy = FSDP2()
    lora = {"r": 2, "alpha": 4.0} if "lora" in way else None
    surgery = GradientSurgery(seed=7, method="none" if "none" in way else "pcgrad")
    torch.manual_seed(0)
    cls = OneBadRank if "bad" in way else SFT
    module = cls(backbone=folder, optimizer=SGD, lora=lora)
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=2, max_epochs=-1,
        accumulate_grad_batches=Rows.window, gradient_clip_val=0.5, use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        logger=False, callbacks=[surgery],
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=Loader(Rows(rank, world, orders(way, rank))))
    return module, surgery


def whole(module: Any) -> dict[str, Tensor]:
    """Trainable weights, gathered; every rank must call it."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def one(folder: str, way: str, output: Path, rank: int, world: int) -> None:
    """Train in one way and write what was found."""
    try:
        module, surgery = train(folder, way, rank, world)
    except ValueError as error:
        (output / f"{way}.{rank}.json").write_text(json.dumps({"error": str(error)}))
        return
    assert surgery.weights is not None
    found = {"weights": surgery.weights.tolist(), "logged": module.results, "bad": module.bad_steps}
    (output / f"{way}.{rank}.json").write_text(json.dumps(found))
    weights = whole(module)
    if rank == 0:
        torch.save(weights, output / f"{way}.pt")


def main() -> None:
    """All ways in turn, in one process group."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for way in sys.argv[3:]:
        one(sys.argv[1], way, Path(sys.argv[2]), rank, world)


if __name__ == "__main__":
    main()
