"""What a training step does with its batch: rebuild, continue or answer; one mean over all ranks.

What a step does goes by its number alone, so it is the same on all ranks, and in a run that was
killed and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.context_encoding import CompressionBatch
from datamodules.engines.base import sample_seed
from datamodules.question_encoding import choose_probes, encode_questions
from lightning_modules.compressor.pair import Question
from lightning_modules.compressor.projector import Prompt

#: Training texts that are looked through before a run without any question is refused.
LOOKED_THROUGH = 1000


class Exercise(NamedTuple):
    """What the decoder is to write, and behind what.

    Args:
        prompt: ``ae`` rebuilds, ``lm`` continues, ``qa`` answers.
        batch: Its targets are what is written.
        question: Ids and mask ``(B, q)``, for ``qa``.
    """

    prompt: Prompt
    batch: CompressionBatch
    question: Question | None = None


def exercise_of(module: Any, batch: CompressionBatch, step: int) -> Exercise:
    """What a step does with its batch.

    A batch to answer in which no text of any rank has a question is rebuilt instead.

    Args:
        module: A ``CompressorModule`` with a trainer.
        batch: Of this rank, on its device.
        step: Of the optimizer; all its micro-batches do the same.

    Raises:
        ValueError: Texts are to be continued, and compressor and decoder have different
            tokenizers; or questions are to be answered, and the training texts have none.
    """
    draw = sample_seed("lm", str(step), 0) / 2**64
    if draw < module.lm_ratio:
        return Exercise("lm", continuation(batch))
    if step >= module.qa_start and draw < module.lm_ratio + module.qa_ratio:
        data = module.trainer.datamodule
        asked = ask(batch, data.encoding.target_tokenizer, f"qa/{step}")
        if float(sum_of_ranks(asked.batch.target_mask.sum())):
            return asked
        if not any(context.probes for context in data.training_contexts()[:LOOKED_THROUGH]):
            raise ValueError(
                f"model.qa_ratio={module.qa_ratio} needs questions, and none of the first "
                f"{LOOKED_THROUGH} training texts has one: set model.qa_ratio=0, or use texts "
                f"with questions, such as data=twin_nouns"
            )
    return Exercise("ae", batch)


def ask(batch: CompressionBatch, tokenizer: Any, key: str) -> Exercise:
    """One of the questions of each text, its answer as what is to be written.

    Args:
        batch: Its sources stay; texts without questions get no label.
        tokenizer: Of the decoder.
        key: Decides which question, with the text's identity.
    """
    probes = choose_probes(batch.probes or [()] * len(batch.uids), batch.uids, key)
    found = encode_questions(tokenizer, probes, batch.uids).to(batch.source_ids.device)
    targets = replace(
        batch,
        target_ids=found.answer_ids,
        target_mask=found.answer_mask,
        slot_mask=found.fact_mask,
    )
    return Exercise("qa", targets, (found.question_ids, found.question_mask))


def ratio_problems(ratios: Mapping[str, float]) -> list[str]:
    """What is wrong with shares of the steps, which must not be more than all.

    Args:
        ratios: Key below ``model`` -> share.
    """
    problems = [
        f"model.{name}={value} must be in [0, 1]"
        for name, value in ratios.items()
        if not 0 <= value <= 1
    ]
    if not problems and sum(ratios.values()) > 1 + 1e-9:
        given = " plus ".join(f"model.{name}={value}" for name, value in ratios.items())
        problems.append(f"{given} must be at most 1")
    return problems


def mean_of_ranks(total: Tensor, weight: Tensor) -> Tensor:
    """Loss whose gradients, averaged over the ranks, are those of the whole batch's weighted mean.

    Args:
        total: 0-d weighted sum of this rank's labels.
        weight: 0-d sum of their weights; 0 on all ranks gives 0 with a graph.
    """
    joined = sum_of_ranks(weight)
    is_joined = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if is_joined else 1
    return total * world_size / torch.where(joined == 0, 1.0, joined)


def sum_of_ranks(value: Tensor) -> Tensor:
    """A number added over the ranks, without gradient.

    Args:
        value: 0-d; not changed.
    """
    joined = value.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(joined)
    return joined


def continuation(batch: CompressionBatch) -> CompressionBatch:
    """The first half of every text as the source, the second as what is to be written.

    Raises:
        ValueError: Compressor and decoder have different tokenizers, so that halves differ.

    Args:
        batch: Whose sources and targets are the same texts.
    """
    lengths = batch.source_mask.sum(1)
    if not torch.equal(lengths, batch.target_mask.sum(1) - 1):
        raise ValueError("model.lm_ratio above 0 needs one tokenizer for compressor and decoder")
    half = (lengths + 1) // 2
    source = torch.arange(batch.source_ids.shape[1], device=half.device)[None] < half[:, None]
    target = torch.arange(batch.target_ids.shape[1], device=half.device)[None] >= half[:, None]
    return CompressionBatch(
        source_ids=batch.source_ids,
        source_mask=batch.source_mask & source,
        target_ids=batch.target_ids,
        target_mask=batch.target_mask & target,
        slot_mask=batch.slot_mask & target,
        uids=batch.uids,
        hidden=batch.hidden & source,
    )
