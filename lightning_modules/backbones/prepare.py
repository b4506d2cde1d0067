"""The backbone that a run starts from: a folder or hub name, or a tiny one made here.

A tiny random model cannot be trained by RL, so it is first fitted to the task's demonstrations (the
warm start) where the task has any. The folder is cached under the hash of everything that made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoTokenizer

from datamodules.demonstrations import DemonstrationDataModule
from datamodules.prepared import prepare
from datamodules.tasks.base import Task
from lightning_modules.backbones.export import export_hf
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.options import OptimizerOptions, read_options
from lightning_modules.sft import SFT


@dataclass
class WarmStartOptions:
    """Supervised fit of a tiny backbone to a task's demonstrations.

    Args:
        steps: Optimizer steps; 0 switches it off.
        batch_size: Sequences a step, fresh every step.
        max_tokens: Fewer sequences a step where they are long: tokens a step at most.
        gradient_clip: Norm of the gradient at most.
        optimizer: As everywhere.
    """

    steps: int = 1000
    batch_size: int = 64
    max_tokens: int = 4096
    gradient_clip: float = 1.0
    optimizer: dict[str, Any] = field(default_factory=dict)


def prepare_tiny(
    task: Task,
    *,
    tiny: Mapping[str, Any] | TinyOptions | None,
    warm_start: Mapping[str, Any] | WarmStartOptions | None,
    task_settings: Any,
    seed: int,
    cache_dir: str | Path,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Folder of a tiny backbone for ``task``, made at most once.

    Args:
        task: Gives the vocabulary and the demonstrations.
        tiny: Shape of the model.
        warm_start: How to fit it; None for not at all.
        task_settings: Plain values that identify the task.
        seed: Of weights and demonstrations.
        cache_dir: Where prepared folders live.
        callbacks: Of the warm start's own Trainer, such as a progress bar.
    """
    shape = read_options(TinyOptions, tiny, "backbone.tiny")
    fit = None
    if warm_start is not None:
        fit = read_options(WarmStartOptions, warm_start, "backbone.warm_start")
    words = task.vocabulary()
    rows = task.embeddings(shape.hidden_size)
    material = {
        "format": 1,
        "vocabulary": words,
        "task": task_settings if fit and fit.steps else task.name,
        "tiny": asdict(shape),
        "warm_start": asdict(fit) if fit else None,
        "seed": seed,
    }

    if rows:
        material["embeddings"] = _digest(rows)

    def build(folder: Path) -> None:
        build_tiny(folder, words, shape, seed, rows)
        if fit is None or not fit.steps:
            return
        tokenizer = AutoTokenizer.from_pretrained(folder)
        task.bind(tokenizer)
        if task.demonstrations(seed, 0, 2):
            _fit(folder, task, tokenizer, fit, seed, callbacks)

    return prepare(cache_dir, "backbone", material, build)


def _fit(
    folder: Path,
    task: Task,
    tokenizer: Any,
    fit: WarmStartOptions,
    seed: int,
    callbacks: Sequence[Any],
) -> None:
    options = read_options(OptimizerOptions, fit.optimizer, "backbone.warm_start.optimizer")
    module = SFT(
        backbone={"path": str(folder)},
        optimizer=asdict(options),
        progress={"loss": "train/loss"},
    )
    examples = task.demonstrations(seed, 0, fit.batch_size)
    longest = max(len(one.prompt_ids) + len(one.completion_ids) for one in examples)
    size = max(2, min(fit.batch_size, fit.max_tokens // longest))
    data = DemonstrationDataModule(task, steps=fit.steps, batch_size=size, seed=seed)
    fit_tiny(module, data, steps=fit.steps, clip=fit.gradient_clip, seed=seed, callbacks=callbacks)
    assert module.policy is not None
    export_hf(module.policy.cpu(), tokenizer, folder, info={"task": task.name})


def fit_tiny(
    module: Any, data: Any, *, steps: int, clip: float, seed: int, callbacks: Sequence[Any]
) -> None:
    """Train a warm start with a Trainer of its own, in one process.

    Args:
        module: What is fitted.
        data: What to.
        steps: Optimizer steps.
        clip: Norm of the gradient at most.
        seed: Of what is drawn while training.
        callbacks: Such as a progress bar; [] trains quietly.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            enable_progress_bar=bool(callbacks),
            gradient_clip_val=clip,
            use_distributed_sampler=False,
            limit_val_batches=0,
            barebones=False,
            plugins=_single_process(),
        )
        trainer.fit(module, datamodule=data)


def _digest(rows: Mapping[str, Tensor]) -> str:
    values = [(word, row.tolist()) for word, row in sorted(rows.items())]
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def _single_process() -> list[Any]:
    """The warm start runs in one process even under torchrun; the other ranks wait for its lock."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    return [LightningEnvironment()]
