"""What an evaluation set says of a pair: teacher-forced, free-running, and with null memories.

Each rank measures its share of a set's rows; sums and counts are added by the module, what
compares rows or sets is in ``comparing``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.context_encoding import CompressionBatch
from datamodules.engines.base import sample_seed
from datamodules.tasks.compression import Context, ContextSet
from lightning_modules.compressor.asking import Answer, answer_metrics, answer_questions
from lightning_modules.compressor.decoding import greedy_decode
from lightning_modules.compressor.memory import Memory, controlled
from lightning_modules.functional.effective_rank import Scatter, scatter
from lightning_modules.functional.fidelity import (
    flip_metrics,
    negation_flips,
    number_flips,
    role_flips,
    slot_outcomes,
)
from lightning_modules.functional.fidelity_text import (
    drift_metrics,
    rouge_l,
    semantic_drift_index,
    words,
)
from lightning_modules.functional.states import reshard
from lightning_modules.functional.sums import Metrics, masked_sum_count, merge
from lightning_modules.functional.uncertainty import by_slot, certainty_metrics

Values = Mapping[str, "str | None"]
#: Kind of fact -> name of its flips in metrics, and what finds them.
FLIPS = {
    "relation": ("role_flip", role_flips),
    "negation": ("negation_flip", negation_flips),
    "number": ("number_flip", number_flips),
}


@dataclass
class Measured:
    """What one rank found of a set.

    Args:
        metrics: Arm (``""`` or ``/shuffled`` ...) -> sums and counts.
        places: Of the rank's rows in the set.
        contexts: These rows.
        decoded: Free-running texts.
        values: Facts read from them.
        memory: ``(m, d)`` Z of each row (H where there is no Z), float32 on the CPU.
        entropy_slot: Of every label that carries a fact, nats.
        z: Scatter of Z; None with ``form=kv``.
        h: Scatter of H.
    """

    metrics: dict[str, Metrics] = field(default_factory=dict)
    places: list[int] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)
    decoded: list[str] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    entropy_slot: list[Tensor] = field(default_factory=list)
    z: Scatter | None = None
    h: Scatter | None = None

    def add(self, arm: str, metrics: Metrics) -> None:
        """Add sums and counts of a batch.

        Args:
            arm: Which memory was read.
            metrics: Name -> (sum, count).
        """
        self.metrics[arm] = merge(self.metrics.get(arm, {}), metrics)


@dataclass(frozen=True)
class _Run:
    """What runs on a set; noise and draws go by ``key`` and the texts' identities.

    Args:
        module: A ``CompressorModule`` with a trainer.
        one: The set.
        key: Of the noise.
        is_whole: Each rank may run by itself.
    """

    module: Any
    one: ContextSet
    key: str
    is_whole: bool

    def batches(self) -> Iterator[list[int]]:
        """Places of this rank's rows; ranks get equally many batches, see ``rows``."""
        trainer = self.module.trainer
        world, size = trainer.world_size, trainer.datamodule.eval_batch_size
        share = -(-len(self.one.contexts) // world)
        own = list(range(trainer.global_rank, share * world, world))
        for start in range(0, share, size):
            yield own[start : start + size]

    def rows(self, places: Sequence[int]) -> list[Context]:
        """Places beyond the set start again: what fills up the last batch of a rank."""
        return [self.one.contexts[place % len(self.one.contexts)] for place in places]

    def batch(self, places: Sequence[int]) -> CompressionBatch:
        """The rows at these places as tensors on the device."""
        data: Any = self.module.trainer.datamodule
        batch: CompressionBatch = data.evaluation_batch(self.rows(places))
        return batch.to(self.module.device)

    def null(self, name: Any, memory: Memory, places: Sequence[int]) -> Memory | None:
        """The memory of a null model; ``shuffled`` is that of the next text of the set.

        It is compressed anew, so that it depends neither on batch mates nor on the ranks.
        """
        if name != "shuffled":
            return controlled(memory, name)
        if len(self.one.contexts) < 2:
            return None
        found: Memory = self.module.memory_of(self.batch([p + 1 for p in places]), self.key)
        return found


@contextmanager
def set_run(module: Any, one: ContextSet, split: str) -> Iterator[_Run]:
    """Inside the block the pair is in evaluation mode, without gradients, whole where that fits.

    Args:
        module: A ``CompressorModule`` with a trainer.
        one: The set.
        split: Part of the noise's key.
    """
    pair = module.policy
    was_training = pair.training
    pair.eval()
    try:
        with torch.no_grad(), pair.gathered() as is_whole:
            yield _Run(module, one, f"{split}/{one.name}", is_whole)
    finally:
        pair.train(was_training)
        reshard(pair)


def measure_set(module: Any, one: ContextSet, split: str) -> Measured:
    """Measure this rank's rows of a set; ranks run equally many batches.

    Args:
        module: A ``CompressorModule`` with a trainer.
        one: The set.
        split: Part of the noise's key.
    """
    found = Measured()
    with set_run(module, one, split) as run:
        for places in run.batches():
            _measure_batch(run, found, places)
    return found


def _measure_batch(run: _Run, found: Measured, places: Sequence[int]) -> None:
    rows, batch = run.rows(places), run.batch(places)
    real = torch.tensor([place < len(run.one.contexts) for place in places])
    memory = run.module.memory_of(batch, run.key)
    kept = real.nonzero()[:, 0]
    chosen = memory.select(kept.to(memory.mask.device))
    found.h = _with(found.h, chosen.stacked("hidden"))
    if memory.embeds is not None:
        found.z = _with(found.z, chosen.stacked("embeds"))
    vectors = chosen.hidden if chosen.embeds is None else chosen.embeds
    live = chosen.mask.bool().cpu()  # a batch is as wide as its longest text
    found.memory += [row[own] for row, own in zip(vectors.float().cpu(), live, strict=True)]
    found.contexts += [rows[i] for i in kept.tolist()]
    found.places += [places[i] for i in kept.tolist()]
    values, texts = _measure_memory(run, found, "", memory, batch, rows, real)
    found.values += [values[i] for i in kept.tolist()]
    found.decoded += [texts[i] for i in kept.tolist()]
    for name in run.module.controls:
        null = run.null(name, memory, places)
        if null is not None:
            _measure_memory(run, found, f"/{name}", null, batch, rows, real)


def _measure_memory(
    run: _Run,
    found: Measured,
    arm: str,
    memory: Memory,
    batch: CompressionBatch,
    rows: Sequence[Context],
    real: Tensor,
) -> tuple[list[Values], list[str]]:
    """Teacher-forced and free-running metrics of one memory; facts and texts of all rows."""
    module, pair = run.module, run.module.policy
    live = batch.target_mask.bool() & real.to(batch.target_mask.device)[:, None]
    scores = pair.score(memory, batch.target_ids, batch.target_mask)
    found.add(arm, by_slot("ce", -scores.logprob, live, batch.slot_mask))
    found.add(arm, by_slot("entropy", scores.entropy, live, batch.slot_mask))
    slots = batch.slot_mask.bool() & batch.target_mask.bool()
    counted = [i for i, is_real in enumerate(real.tolist()) if is_real]
    if any(context.slots for context in run.one.contexts):  # on all ranks or on none
        logits = pair.logits(memory, batch.target_ids, batch.target_mask, slots)
        own = logits[(slots & live)[slots]]
        if len(own):
            found.add(arm, certainty_metrics(own, torch.ones(len(own), device=own.device)))
        if not arm:
            found.entropy_slot.append(scores.entropy[slots & live].float().cpu())
        forced = _read(module, _forced(batch, slots, logits), rows)
        found.add(arm, _fact_metrics(rows, forced, counted, prefix="forced/"))
    texts = decode_texts(run, memory, batch)
    task = module.trainer.datamodule.task
    values = [task.read(row, text) for row, text in zip(rows, texts, strict=True)]
    found.add(arm, _fact_metrics(rows, values, counted))
    if module.qa_ratio:
        answers = _answers(run, memory, rows)
        found.add(arm, answer_metrics(one for i in counted for one in answers[i]))
    if counted:
        sources = [words(rows[i].text) for i in counted]
        found.add(arm, drift_metrics(sources, [words(texts[i]) for i in counted]))
    if counted and module.embedder is not None:
        pairs = [(rows[i].text, texts[i]) for i in counted]
        found.add(arm, semantic_drift(module.embedder, pairs))
    return values, texts


def _forced(batch: CompressionBatch, slots: Tensor, logits: Tensor) -> list[list[int]]:
    """Targets without EOS in which the labels of facts are what the decoder would have written."""
    ids = batch.target_ids.clone()
    ids[slots] = logits.argmax(-1).to(ids)
    lengths = (batch.target_mask.sum(1) - 1).tolist()
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def decode_texts(run: _Run, memory: Memory, batch: CompressionBatch) -> list[str]:
    """What the decoder writes on its own from the memory of a batch.

    Args:
        run: Of the set.
        memory: B memories.
        batch: Their texts, for the lengths.
    """
    module = run.module
    tokenizer = module.trainer.datamodule.encoding.target_tokenizer
    limits = (batch.target_mask.sum(1) + module.extra_tokens).tolist()
    temperature = module.entropy_control.temperature
    key = f"{run.key}/decode"
    decoded = greedy_decode(
        module.policy,
        memory,
        [int(limit) for limit in limits],
        eos_ids=[int(tokenizer.eos_token_id)],
        forbidden=_forbidden(tokenizer),
        temperature=temperature,
        seeds=[sample_seed(key, uid, 0) for uid in batch.uids] if temperature else None,
        fixed_steps=None if run.is_whole else _most_of_ranks(int(max(limits)), module.device),
    )
    return [str(tokenizer.decode(ids)) for ids in decoded.texts()]


def _answers(run: _Run, memory: Memory, rows: Sequence[Context]) -> list[list[Answer]]:
    return answer_questions(
        run.module,
        run.one,
        memory,
        rows,
        forbidden=_forbidden(run.module.trainer.datamodule.encoding.target_tokenizer),
        steps_of=None if run.is_whole else _most_of_ranks,
    )


def _most_of_ranks(value: int, device: Any) -> int:
    """Texts of other ranks may be longer, and sharded weights are gathered step by step."""
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _forbidden(tokenizer: Any) -> list[int]:
    pad = tokenizer.pad_token_id
    return [] if pad is None or pad == tokenizer.eos_token_id else [int(pad)]


def _read(module: Any, ids: Sequence[Sequence[int]], rows: Sequence[Context]) -> list[Values]:
    data = module.trainer.datamodule
    texts = [str(data.encoding.target_tokenizer.decode(list(row))) for row in ids]
    return [data.task.read(row, text) for row, text in zip(rows, texts, strict=True)]


def _fact_metrics(
    rows: Sequence[Context], values: Sequence[Values], counted: Sequence[int], prefix: str = ""
) -> Metrics:
    """Fidelity, overwriting and flips of the facts of some rows, by kind of fact."""
    kinds: dict[str, list[tuple[str, str | None, str | None]]] = {}
    for i in counted:
        for slot in rows[i].slots:
            fact = (slot.value, slot.prior, values[i].get(slot.key))
            kinds.setdefault(slot.kind, []).append(fact)
    found: Metrics = {}
    for kind, facts in kinds.items():
        source, prior, decoded = (list(column) for column in zip(*facts, strict=True))
        outcomes = slot_outcomes(source, prior, decoded)
        own = "" if kind == "attribute" else f"{kind}/"
        found |= {f"{prefix}{own}{name}": value for name, value in outcomes.metrics().items()}
        if kind in FLIPS:
            flip, marks = FLIPS[kind]
            metrics = flip_metrics(flip, marks(source, decoded), outcomes.right)
            found |= {f"{prefix}{name}": value for name, value in metrics.items()}
    return found


def semantic_drift(
    embed: Callable[[Sequence[str]], Tensor], pairs: Sequence[tuple[str, str]]
) -> Metrics:
    """Mean of ``semantic_drift_index`` over some texts.

    Args:
        embed: Texts to unit vectors ``(N, D)``, see ``grm.embedders``.
        pairs: N sources and what was decoded from each.
    """
    # a blank, for some tokenizers make no token at all of an empty text
    one, two = (
        embed([text.strip() or " " for text in texts]) for texts in zip(*pairs, strict=True)
    )
    overlaps = [rouge_l(words(source), words(text)) for source, text in pairs]
    drift = semantic_drift_index((one * two).sum(1), torch.tensor(overlaps, dtype=torch.float64))
    return {"semantic_drift_index": masked_sum_count(drift)}


def _with(known: Scatter | None, vectors: Tensor) -> Scatter:
    own = scatter(vectors.float().cpu())
    return own if known is None else known.merge(own)
