"""A small CoCoA with its data: a Qwen-VL of a layer or two, a few scenes, and a real Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from datamodules.image_encoding import ImageTextEncoding
from datamodules.image_text import ImageTextDataModule, StagedSource
from datamodules.tasks.shapes_pairs import ShapesPairs
from lightning_modules.embedding.cocoa import CoCoA

STAGES = ("warmup", "bridge", "contrastive")


def stages(*steps: int) -> list[dict[str, Any]]:
    """Stages in their order, with these steps."""
    return [{"name": name, "steps": number} for name, number in zip(STAGES, steps, strict=True)]


def scenes(folder: Path, **options: Any) -> ImageTextDataModule:
    """Twelve scenes, prepared for a folder."""
    values: dict[str, Any] = {
        "task": ShapesPairs(num_train=12, num_val=4, num_test=4),
        "encoding": ImageTextEncoding(pooling="eos"),
        "stages": stages(1, 1, 1),
        "batch_size": 4,
    }
    data = ImageTextDataModule(**values | options)
    data.prepare(str(folder), "unused")
    return data


def cocoa(folder: Path, data: ImageTextDataModule | None = None, **options: Any) -> CoCoA:
    """A module over a folder, its weights loaded; with data it can encode without a trainer."""
    values: dict[str, Any] = {"temperature": 0.1, "optimizer": {"lr": 1e-3}}
    module = CoCoA(backbone={"path": str(folder)}, **values | options)
    module.configure_model()
    if data is not None:
        module.after_load(data)
    return module


def batch(data: ImageTextDataModule, stage: str, index: int = 0) -> Any:
    """A batch of a stage."""
    first = STAGES.index(stage)
    return StagedSource(data).batch(0, sum(data.stage_steps[:first]) * data.window + index)


def fit(
    module: CoCoA, data: ImageTextDataModule, callbacks: Sequence[Callback] = (), **options: Any
) -> Trainer:
    """Train all stages in this process, without validation."""
    values: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0} | options
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=data.window, gradient_clip_val=1.0,
        callbacks=list(callbacks), use_distributed_sampler=False, **values,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


@contextmanager
def caught(module: CoCoA, *, cut_at: Tensor | None = None) -> Iterator[dict[str, Any]]:
    """What the body reads and gives: ``embeddings`` and ``hidden``, both with gradients.

    Args:
        module: Runs once inside.
        cut_at: ``(B,)`` rows of hidden states that go on without their gradient, in every layer.
    """
    body = module.policy.base.model
    found: dict[str, Any] = {}

    def read(layer: Any, inputs: Any, output: Tensor) -> Tensor:
        found["embeddings"] = output.detach().requires_grad_()
        return found["embeddings"]

    def give(layer: Any, inputs: Any, output: Any) -> None:
        found["hidden"] = output.last_hidden_state

    def cut(layer: Any, inputs: Any, output: Tensor) -> Tensor:
        assert cut_at is not None
        is_cut = torch.arange(output.shape[1]) == cut_at[:, None]
        return torch.where(is_cut[..., None], output.detach(), output)

    handles = [body.get_input_embeddings().register_forward_hook(read)]
    handles.append(body.register_forward_hook(give))
    if cut_at is not None:
        handles += [one.register_forward_hook(cut) for one in body.language_model.layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
