"""Small pairs of real Qwen3 models with different widths, depths and vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from datamodules.contexts import ContextDataModule
from datamodules.tasks.compression import CompressionTask
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.backbones.tiny_pair import prepare_tiny_pair
from lightning_modules.compressor.base import CompressorModule
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions, Training
from lightning_modules.compressor.pair import Pair
from lightning_modules.options import BackboneOptions, LoraOptions

NARROW = TinyOptions(
    hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16
)
WIDE = TinyOptions(
    hidden_size=48, intermediate_size=96, num_layers=2, num_heads=3, num_kv_heads=3, head_dim=16
)
#: Words of the compressor's and of the decoder's tokenizer; ids start with <pad>, <unk>, <eos>.
SOURCE_WORDS = [f"s{i}" for i in range(37)]
TARGET_WORDS = [f"t{i}" for i in range(50)]
EOS = 2


def build_folders(folder: Path) -> Path:
    """Write ``compressor`` and ``decoder`` below a folder."""
    build_tiny(folder / "compressor", SOURCE_WORDS, NARROW, seed=0)
    build_tiny(folder / "decoder", TARGET_WORDS, WIDE, seed=1)
    return folder


def make_pair(
    folder: Path,
    *,
    decoder: str = "decoder",
    lora: LoraOptions | None = None,
    train: Training = "frozen",
    projector: dict[str, Any] | None = None,
    **memory: Any,
) -> Pair:
    """A pair of the two folders; two memory tokens unless said otherwise."""
    options = MemoryOptions(**{"tokens": 2, **memory})
    parts = [
        load_causal_lm(BackboneOptions(str(folder / name))) for name in ("compressor", decoder)
    ]
    if lora is not None:
        parts[0] = load_causal_lm(BackboneOptions(str(folder / "compressor")), lora)
    return Pair(parts[0], parts[1], options, ProjectorOptions(**(projector or {})), train)


def overfit(task: CompressionTask, folder: Path, steps: int, **options: Any) -> CompressorModule:
    """A pair of width 32 with a decoder of its own that learns eight texts by heart, then its test.

    Args:
        task: Its world; eight training texts.
        folder: Of the pair and of prepared data.
        steps: Of training.
        **options: Of the module; ``memory`` with ``tokens``.
    """
    bridge = {"rank": None, "noise": None, "memory_tokens": options["memory"]["tokens"]}
    path = prepare_tiny_pair(
        task, tiny={"hidden_size": 32, "decoder_width": 32, **bridge}, warm_start=None,
        task_settings={}, seed=0, cache_dir=folder,
    )  # fmt: skip
    data = ContextDataModule(task=task, batch_size=8, eval_batch_size=3)
    data.prepare(str(path), folder)
    module = CompressorModule(
        backbone={"path": str(path)}, decoder={"train": "full"}, projector={"kind": "linear"},
        optimizer={"lr": 3e-3, "weight_decay": 0.0}, **options,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, max_steps=steps, max_epochs=-1,
        limit_val_batches=0, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return module


def tokens(lengths: list[int], words: int, *, seed: int = 0, left: bool = False) -> list[Tensor]:
    """Random ids and mask of texts, padded with EOS (which must not matter) on one side."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), EOS)
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if left else slice(length)
        ids[row, place] = torch.randint(3, 3 + words, (length,), generator=generator)
        mask[row, place] = True
    return [ids, mask]


def source(lengths: list[int], **options: Any) -> list[Tensor]:
    """Texts for the compressor."""
    return tokens(lengths, len(SOURCE_WORDS), **options)


def targets(lengths: list[int], **options: Any) -> list[Tensor]:
    """Texts for the decoder, the last token of each EOS; ``lengths`` count it."""
    ids, mask = tokens(lengths, len(TARGET_WORDS), **options)
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = EOS
    return [ids, mask]
