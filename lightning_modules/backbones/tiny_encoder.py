"""A tiny BERT built in code and fitted to pairs: an ordinary folder, so plain tools load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from datamodules.pair_schedule import Schedule
from datamodules.pairs import PairDataModule
from datamodules.prepared import prepare
from datamodules.tasks.embedding import EmbeddingTask, EvalSet, PairSet
from datamodules.texts import TextEncoding
from lightning_modules.backbones.export import export_hf
from lightning_modules.backbones.prepare import fit_tiny
from lightning_modules.backbones.tiny import byte_tokenizer, word_tokenizer
from lightning_modules.options import OptimizerOptions, read_options


@dataclass
class TinyEncoderOptions:
    """Shape of a small BERT; vectors are means of its last hidden states.

    Args:
        hidden_size: Width, and dimensions of a vector.
        intermediate_size: Width of the MLP.
        num_layers: Layers.
        num_heads: Attention heads.
        max_positions: Longest text (tokens).
        dropout: Of hidden states and attention.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_positions: int = 512
    dropout: float = 0.0


@dataclass
class PairWarmStartOptions:
    """Contrastive fit of a tiny encoder to pairs of its own: a weak "pre-trained" start.

    Args:
        epochs: Passes over the task's warm-start pairs; 0 switches it off.
        steps: Optimizer steps at most; None for those of all passes, 0 switches it off.
        batch_size: Pairs a step.
        temperature: tau.
        gradient_clip: Norm of the gradient at most.
        optimizer: As everywhere.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    temperature: float = 0.05
    gradient_clip: float = 1.0
    optimizer: dict[str, Any] = field(default_factory=dict)


class WarmStartPairs(EmbeddingTask):
    """The warm-start pairs of a task as what is trained on.

    Args:
        task: Whose pairs.
    """

    def __init__(self, task: EmbeddingTask) -> None:
        self.task, self.name = task, task.name

    def vocabulary(self) -> list[str] | None:
        """That of the task."""
        return self.task.vocabulary()

    def pairs(self, split: Any) -> list[PairSet]:
        """The warm-start pairs, for training only."""
        return self.task.warm_start_pairs() if split == "train" else []

    def evaluations(self, split: Any) -> list[EvalSet]:
        """None."""
        return []


def build_tiny_encoder(
    folder: str | Path, words: Sequence[str] | None, options: TinyEncoderOptions, seed: int
) -> None:
    """Write a random BERT and its tokenizer as a Hugging Face folder.

    Args:
        folder: Where to.
        words: Vocabulary of a word-level tokenizer; None makes a byte-level one.
        options: Shape.
        seed: Of the weights.
    """
    tokenizer = byte_tokenizer() if words is None else word_tokenizer(words)
    tokenizer.model_max_length = options.max_positions
    config: Any = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=options.max_positions,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare_tiny_encoder(
    task: EmbeddingTask,
    *,
    tiny: Mapping[str, Any] | TinyEncoderOptions | None,
    warm_start: Mapping[str, Any] | PairWarmStartOptions | None,
    task_settings: Any,
    seed: int,
    cache_dir: str | Path,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Folder of a tiny encoder for ``task``, made at most once.

    Args:
        task: Gives the vocabulary and the pairs.
        tiny: Shape of the model.
        warm_start: How to fit it; None for not at all.
        task_settings: Plain values that identify the task.
        seed: Of weights and order.
        cache_dir: Where prepared folders live.
        callbacks: Of the warm start's own Trainer, such as a progress bar.
    """
    shape = read_options(TinyEncoderOptions, tiny, "backbone.tiny")
    fit = None
    if warm_start is not None:
        fit = read_options(PairWarmStartOptions, warm_start, "backbone.warm_start")
    words = task.vocabulary()
    is_fitted = fit is not None and fit.epochs > 0 and fit.steps != 0
    material = {
        "format": 1,
        "vocabulary": words,
        "task": task_settings if is_fitted else task.name,
        "tiny_encoder": asdict(shape),
        "warm_start": asdict(fit) if fit else None,
        "seed": seed,
    }

    def build(folder: Path) -> None:
        build_tiny_encoder(folder, words, shape, seed)
        if fit is not None and is_fitted and task.warm_start_pairs():
            _fit(folder, task, fit, seed, callbacks)

    return prepare(cache_dir, "encoder", material, build)


def _fit(
    folder: Path, task: EmbeddingTask, fit: PairWarmStartOptions, seed: int, callbacks: Any
) -> None:
    from lightning_modules.embedding.base import EmbeddingModule  # loads backbones itself

    options = read_options(OptimizerOptions, fit.optimizer, "backbone.warm_start.optimizer")
    data = PairDataModule(
        task=WarmStartPairs(task),
        encoding=TextEncoding(),
        schedule=Schedule(epochs=fit.epochs),
        batch_size=fit.batch_size,
        seed=seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data.bind(tokenizer)
    module = EmbeddingModule(
        backbone={"path": str(folder)},
        optimizer=asdict(options),
        temperature=fit.temperature,
        gather=False,
        progress={"loss": "train/loss"},
    )
    steps = sum(data.stage_steps)
    steps = steps if fit.steps is None else min(steps, fit.steps)
    fit_tiny(module, data, steps=steps, clip=fit.gradient_clip, seed=seed, callbacks=callbacks)
    export_hf(module.policy.cpu(), tokenizer, folder, info={"task": task.name})
