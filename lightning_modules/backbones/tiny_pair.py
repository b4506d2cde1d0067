"""A tiny compressor and decoder that a run of ``model=compressor`` starts from, as one folder.

Two fits come before the run [card, section 9, second trial], each cached by itself:

===== ================================================ ========================================
stage what is fitted                                   to what
===== ================================================ ========================================
0     decoder and bridge, together with a compressor   reconstruction of neutral texts, nothing
      that is thrown away                              hidden: it reads any fact, expects none;
                                                       with ``qa_ratio`` also answers to questions
1     the run's compressor, as a language model        texts of the world: it knows the priors
===== ================================================ ========================================

Stage 0 does not know the run's compressor, so a sweep of widths has one decoder a seed.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from datamodules.context_encoding import CompressionBatch
from datamodules.contexts import ContextDataModule
from datamodules.engines.base import sample_seed
from datamodules.prepared import digest, prepare
from datamodules.sources import stable_hash
from datamodules.tasks.compression import (
    CompressionTask,
    Context,
    ContextSet,
    DrawnContexts,
    Split,
)
from lightning_modules.backbones.prepare import WarmStartOptions, fit_tiny, prepare_tiny
from lightning_modules.backbones.tiny import build_tiny
from lightning_modules.backbones.tiny_pair_options import PairWarmStart as PairWarmStart
from lightning_modules.backbones.tiny_pair_options import Texts
from lightning_modules.backbones.tiny_pair_options import TinyPairOptions as TinyPairOptions
from lightning_modules.compressor.folders import OPTIONS_FILE, UNFITTED, export_pair
from lightning_modules.compressor.pair import Pair
from lightning_modules.compressor.projector import BRIDGE_FILE
from lightning_modules.compressor.training import ask
from lightning_modules.options import read_options

#: Fresh texts on which a fitted decoder is measured, and the share of them that it must read.
NUM_CHECKED, ENOUGH = 256, 0.9
#: First texts of a fit that tell it from others.
NUM_HASHED = 512


class FittingTexts(CompressionTask):
    """Neutral texts of a task, or those with its priors, as what is trained on.

    Text ``i`` is the first of step ``i``, a pure function of the seed.

    Args:
        task: Whose texts.
        texts: Which.
        count: How many, from the first on.
        seed: Of the texts.
    """

    def __init__(self, task: CompressionTask, texts: Texts, count: int, seed: int) -> None:
        self.task, self.name = task, task.name
        self.count, self.seed = count, seed
        self._write = _writer(task, texts)

    def vocabulary(self) -> list[str] | None:
        """That of the task."""
        return self.task.vocabulary()

    def text(self, number: int) -> Context:
        """Text ``number``, of any size: those from ``count`` on are never trained on."""
        found = self._write(self.seed, number, 1)
        return replace(found[0], uid=f"{self.name}/fit/{number}")

    def contexts(self, split: Split) -> Sequence[Context]:
        """The texts, for training only."""
        return DrawnContexts(self.count, self.text) if split == "train" else []

    def evaluations(self, split: Split) -> list[ContextSet]:
        """None."""
        return []

    def read(self, context: Context, text: str) -> Mapping[str, str | None]:
        """As the task reads."""
        return self.task.read(context, text)


def prepare_tiny_pair(
    task: CompressionTask,
    *,
    tiny: Mapping[str, Any] | TinyPairOptions | None,
    warm_start: Mapping[str, Any] | PairWarmStart | None,
    task_settings: Any,
    seed: int,
    cache_dir: str | Path,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Folder of a tiny pair for ``task``, made at most once; its stages are cached by themselves.

    The folder has the form of an exported pair, but its bridge holds only the parts that fit every
    width of the compressor (``TinyPairOptions.shared_parts``), for ``start_bridge``.

    Args:
        task: Gives the vocabulary and the texts; a task without a vocabulary gets random models.
        tiny: Shape of both models and of the bridge.
        warm_start: How to fit them; None for not at all.
        task_settings: Not used: settings of a task that do not change what is fitted, such as
            ``p_cf``, share one fit; its texts identify it.
        seed: Of weights and texts.
        cache_dir: Where prepared folders live.
        callbacks: Of the Trainers of both stages, such as a progress bar.

    Returns:
        The folder. Its ``litpost.json`` says what share of fresh texts the decoder reads without
        any error (``exact_match``, None where it was not fitted), and of what share it answers a
        question (``answered``, where ``warm_start.qa_ratio`` is above 0).

    Raises:
        ValueError: An option is not allowed, or the task has no texts to compress.
    """
    shape = read_options(TinyPairOptions, tiny, "backbone.tiny")
    asked = _read_warm_start(warm_start)
    fit = _with_texts(task, asked, seed)
    common: dict[str, Any] = {"seed": seed, "cache_dir": cache_dir, "callbacks": callbacks}
    decoder = prepare_tiny_decoder(task, tiny=shape, warm_start=fit, task_settings=None, **common)
    stage = WarmStartOptions(
        steps=fit.steps,
        batch_size=fit.batch_size,
        max_tokens=fit.batch_size * shape.max_positions,
        gradient_clip=fit.gradient_clip,
        optimizer=asdict(fit.optimizer_of(shape.hidden_size, is_decoder=False)),
    )
    compressor = prepare_tiny(
        task,
        tiny=shape.compressor,
        warm_start=stage if stage.steps else None,
        task_settings=_identity(task, "prior", seed),
        **common,
    )
    material: dict[str, Any] = {"format": 1}
    material |= {"compressor": compressor.name, "decoder": decoder.name}
    if is_left_out := bool(asked.decoder_steps) and not fit.decoder_steps:
        material[UNFITTED] = task.name

    def build(folder: Path) -> None:
        _join(folder, compressor, decoder, shape.shared_parts)
        if is_left_out:
            info = json.loads((folder / "litpost.json").read_text()) | {UNFITTED: task.name}
            (folder / "litpost.json").write_text(json.dumps(info, indent=1) + "\n")

    return prepare(cache_dir, "pair", material, build)


def prepare_tiny_decoder(
    task: CompressionTask,
    *,
    tiny: Mapping[str, Any] | TinyPairOptions | None,
    warm_start: Mapping[str, Any] | PairWarmStart | None,
    task_settings: Any,
    seed: int,
    cache_dir: str | Path,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Folder of a decoder with the bridge and the compressor it was fitted with: stage 0.

    Args:
        task: As in ``prepare_tiny_pair``, and so are all others.
        tiny: The shape of the run's compressor does not matter.
        warm_start: Stage 1 does not matter.
        task_settings: Not used.
        seed: Of weights and texts.
        cache_dir: Where prepared folders live.
        callbacks: Of the Trainer.

    Returns:
        An exported pair, see ``load_pair``.
    """
    shape = read_options(TinyPairOptions, tiny, "backbone.tiny")
    fit = _with_texts(task, _read_warm_start(warm_start), seed)
    optimizer = asdict(fit.optimizer_of(shape.decoder_width, is_decoder=True))
    is_fitted, words = fit.decoder_steps > 0, task.vocabulary()
    material = {
        "format": 1,
        "vocabulary": words,
        "task": _identity(task, fit.decoder_texts, seed) if is_fitted else task.name,
        "decoder": asdict(shape.decoder),
        "memory": asdict(shape.memory),
        "projector": asdict(shape.projector),
        "fit": fit_material(fit, optimizer) if is_fitted else None,
        "seed": seed,
    }

    def build(folder: Path) -> None:
        for place, side in ((folder, "compressor"), (folder / "decoder", "decoder")):
            build_tiny(place, words, shape.decoder, stable_hash("tiny_pair", side, seed))
        _fit_decoder(folder, task, shape, replace(fit, optimizer=optimizer), seed, callbacks)

    return prepare(cache_dir, "decoder", material, build)


def _fit_decoder(
    folder: Path,
    task: CompressionTask,
    shape: TinyPairOptions,
    fit: PairWarmStart,
    seed: int,
    callbacks: Sequence[Any],
) -> None:
    """Train the pair of a folder, or only give it a bridge where there are no steps."""
    from lightning_modules.compressor.base import CompressorModule  # loads backbones itself

    module = CompressorModule(
        backbone={"path": str(folder)},
        decoder={"train": "full"},
        memory=asdict(shape.memory),
        projector=asdict(shape.projector),
        optimizer=fit.optimizer,
        qa_ratio=fit.qa_ratio,
        qa_start=fit.decoder_steps // 3,
        controls=[],
        progress={"loss": "train/loss"},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    info: dict[str, Any] = {"task": task.name, "exact_match": None}
    if fit.decoder_steps:
        texts = FittingTexts(task, fit.decoder_texts, fit.decoder_steps * fit.batch_size, seed)
        data = ContextDataModule(task=texts, batch_size=fit.batch_size, seed=seed)
        data.bind(tokenizer)
        steps, clip = fit.decoder_steps, fit.gradient_clip
        fit_tiny(module, data, steps=steps, clip=clip, seed=seed, callbacks=callbacks)
        fresh = [texts.text(texts.count + i) for i in range(NUM_CHECKED)]
        batch = data.evaluation_batch(fresh)
        info["exact_match"] = read_share(module.policy.cpu(), batch)
        _warn_if_unread("reads", info["exact_match"], "texts", fit.decoder_steps)
        if fit.qa_ratio:
            _, asked, question = ask(batch, tokenizer, "fresh")
            info["answered"] = read_share(module.policy, asked, prompt="qa", question=question)
            _warn_if_unread("answers", info["answered"], "questions", fit.decoder_steps)
    else:
        module.build()
    export_pair(module.policy, tokenizer, tokenizer, folder, info=info)


@torch.no_grad()
def read_share(pair: Pair, batch: CompressionBatch, **options: Any) -> float:
    """Share of the texts that a pair's decoder reads without an error.

    Under teacher forcing: without any error is what greedy decoding then writes too.

    Args:
        pair: Is put into evaluation mode.
        batch: B texts on the pair's device.
        **options: Of ``Pair.score``, such as a question for each of the texts.
    """
    pair.eval()
    seeds = [sample_seed("read_share", uid, 0) for uid in batch.uids]
    source, target = (batch.source_ids, batch.source_mask), (batch.target_ids, batch.target_mask)
    _, scores = pair(*source, *target, noise_seeds=seeds, **options)
    is_right = (scores.correct > 0) | ~batch.target_mask
    return float(is_right.all(1).float().mean())


def _join(folder: Path, compressor: Path, decoder: Path, parts: Sequence[str]) -> None:
    """The compressor of one folder, the decoder of the other, and the parts of its bridge."""
    shutil.copytree(compressor, folder, dirs_exist_ok=True)
    shutil.copytree(decoder / "decoder", folder / "decoder")
    for name in (OPTIONS_FILE, "litpost.json"):
        shutil.copy(decoder / name, folder / name)
    state = load_file(decoder / BRIDGE_FILE)
    kept = {k: v for k, v in state.items() if any(f"{k}.".startswith(f"{p}.") for p in parts)}
    save_file(kept, folder / BRIDGE_FILE)


def _identity(task: CompressionTask, texts: Texts, seed: int) -> dict[str, str]:
    """What tells the texts of one fit from those of another."""
    first = [context.text for context in _writer(task, texts)(seed, 0, NUM_HASHED)]
    return {"name": task.name, "texts": digest({"texts": first})}


def _writer(task: CompressionTask, texts: Texts) -> Callable[[int, int, int], list[Context]]:
    return task.neutral_contexts if texts == "neutral" else task.pretraining_contexts


def _read_warm_start(values: Mapping[str, Any] | PairWarmStart | None) -> PairWarmStart:
    given = {"steps": 0, "decoder_steps": 0} if values is None else values
    return read_options(PairWarmStart, given, "backbone.warm_start")


def _with_texts(task: CompressionTask, fit: PairWarmStart, seed: int) -> PairWarmStart:
    """The stages that the task has texts for; warns of those that it has none for.

    Raises:
        ValueError: It is no task of texts to compress.
    """
    if not isinstance(task, CompressionTask):
        raise ValueError(
            f"backbone.family='pair' needs a task of texts to compress, such as data=twin_nouns: "
            f"data.task is {type(task).__name__}"
        )
    if task.vocabulary() is None:
        return replace(fit, steps=0, decoder_steps=0)
    kinds: dict[str, Texts] = {"steps": "prior", "decoder_steps": fit.decoder_texts}
    left_out: dict[str, Any] = {}
    for name, kind in kinds.items():
        if getattr(fit, name) and not _writer(task, kind)(seed, 0, 1):
            left_out[name] = 0
            warnings.warn(
                f"task '{task.name}' has no {kind} texts: backbone.warm_start.{name}="
                f"{getattr(fit, name)} is left out, and that model stays random",
                stacklevel=3,
            )
    return replace(fit, **left_out)


def fit_material(fit: PairWarmStart, optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """What a fitted decoder depends on; questions count where some are asked.

    Args:
        fit: Of which stage 1 does not count.
        optimizer: Of stage 0, filled in.
    """
    values = {**asdict(fit), "steps": 0, "optimizer": optimizer}
    return {name: value for name, value in values.items() if name != "qa_ratio" or value}


def _warn_if_unread(does: str, share: float, what: str, steps: int) -> None:
    if share < ENOUGH:
        warnings.warn(
            f"the tiny decoder {does} only {share:.0%} of fresh {what} without an error after "
            f"backbone.warm_start.decoder_steps={steps}: what a run loses is then not the "
            f"compressor's doing alone; give it more steps, memory (model.memory.tokens) or rank",
            stacklevel=2,
        )
