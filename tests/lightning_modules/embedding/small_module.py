"""A small embedding module with its data, and a real Trainer that keeps the gradients it saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import AutoTokenizer

from datamodules.pair_schedule import Schedule
from datamodules.pairs import PairDataModule
from datamodules.tasks.concept_topics import ConceptTopics
from datamodules.texts import TextEncoding
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder
from lightning_modules.embedding.base import EmbeddingModule

#: A world of three domains, of which two are trained.
WORLD: dict[str, Any] = {
    "num_domains": 3,
    "train_domains": [0, 1],
    "new_domains": [],
    "num_train": 32,
    "num_pretrain": 0,
    "num_val": 12,
    "num_test": 12,
    "num_concepts": 24,
    "num_topics": 8,
    "concepts_per_topic": 10,
}


def world(**options: Any) -> ConceptTopics:
    """That world, or a changed one."""
    return ConceptTopics(**{**WORLD, **options})


def encoder(folder: Path, **shape: Any) -> Path:
    """A random BERT with the world's words."""
    given = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2} | shape
    build_tiny_encoder(folder, world().vocabulary(), TinyEncoderOptions(**given), seed=0)
    return folder


def pairs(folder: Path, task: Any = None, **options: Any) -> PairDataModule:
    """Pairs bound to the tokenizer of a backbone, two micro-batches a step."""
    given = {"batch_size": 8, "micro_batches": 2, "encoding": TextEncoding(), "seed": 0} | options
    data = PairDataModule(task=task or world(), schedule=Schedule(), **given)
    data.bind(AutoTokenizer.from_pretrained(folder))
    return data


def module(folder: Path, **options: Any) -> EmbeddingModule:
    """An embedding module over a folder."""
    given: dict[str, Any] = {"temperature": 0.1, "optimizer": {"lr": 1e-3}} | options
    return EmbeddingModule(backbone={"path": str(folder)}, **given)


class Gradients(Callback):
    """Keeps the gradients of every optimizer step, by parameter, and the data sets it saw."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.domains: list[list[str]] = []
        self.logged: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, number: int) -> None:
        """Note the data set of the micro-batch."""
        if number % trainer.accumulate_grad_batches == 0:
            self.domains.append([])
        self.domains[-1].append(batch.domain)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Copy them."""
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Copy the newest metrics."""
        self.logged = dict(pl_module.results)


def fit(
    module: EmbeddingModule,
    data: PairDataModule,
    *callbacks: Callback,
    steps: int = 2,
    seed: int = 7,
    **options: Any,
) -> Gradients:
    """Train for some steps; what is returned stands behind ``callbacks``."""
    seen = Gradients()
    given: dict[str, Any] = {
        "max_steps": steps,
        "max_epochs": -1,
        "accumulate_grad_batches": data.window,
        "callbacks": [*callbacks, seen],
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    torch.manual_seed(seed)
    Trainer(**given | options).fit(module, datamodule=data)
    return seen


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-6) -> None:
    """Equal names and nearly equal gradients, none of them zero everywhere."""
    assert one.keys() == other.keys() and one
    for name in one:
        gap = float((one[name] - other[name]).abs().max())
        assert gap <= atol, f"{name} differs by {gap}"
    assert sum(float(value.abs().sum()) for value in one.values()) > 1e-3


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)
