"""What an evaluation set says of a pair: teacher-forced, free-running, and with null memories.

Each rank measures its share of a set's rows; sums and counts are added by the module, what
compares rows or sets (paired tests, gaps, ranks of the memory) once all rows are together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from datamodules.context_encoding import CompressionBatch
from datamodules.tasks.compression import Context, ContextSet
from lightning_modules.compressor.decoding import greedy_decode
from lightning_modules.compressor.memory import Memory, controlled
from lightning_modules.functional.effective_rank import Scatter, rank_scalars, scatter
from lightning_modules.functional.fidelity import (
    flip_metrics,
    negation_flips,
    number_flips,
    role_flips,
    slot_outcomes,
)
from lightning_modules.functional.fidelity_text import drift_metrics, words
from lightning_modules.functional.outcomes import SetOutcome
from lightning_modules.functional.paired_tests import mcnemar, paired_bootstrap
from lightning_modules.functional.states import reshard
from lightning_modules.functional.sums import Metrics, merge
from lightning_modules.functional.uncertainty import by_slot, certainty_metrics

Values = Mapping[str, "str | None"]
FLIPS = {"relation": role_flips, "negation": negation_flips, "number": number_flips}


@dataclass
class Measured:
    """What one rank found of a set.

    Args:
        metrics: Arm (``""`` or ``/shuffled`` ...) -> sums and counts.
        places: Of the rank's rows in the set.
        contexts: These rows.
        decoded: Free-running texts.
        values: Facts read from them.
        memory: ``(N, m, d)`` Z of the rows (H where there is no Z), float32 on the CPU.
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


@torch.no_grad()
def measure_set(module: Any, one: ContextSet, split: str) -> Measured:
    """Measure this rank's rows of a set; ranks run equally many batches.

    Args:
        module: A ``CompressorModule`` with a trainer.
        one: The set.
        split: Part of the noise's key.
    """
    data, trainer = module.trainer.datamodule, module.trainer
    rank, world = trainer.global_rank, trainer.world_size
    share = -(-len(one.contexts) // world)
    own = [place for place in range(rank, share * world, world)]
    found, pair = Measured(), module.policy
    was_training = pair.training
    pair.eval()
    try:
        with pair.gathered():
            for start in range(0, share, data.eval_batch_size):
                chunk = own[start : start + data.eval_batch_size]
                rows = [one.contexts[place % len(one.contexts)] for place in chunk]
                batch = data.evaluation_batch(rows).to(module.device)
                real = torch.tensor([place < len(one.contexts) for place in chunk])
                _measure_batch(module, found, one, batch, rows, real, f"{split}/{one.name}")
                found.places += [p for p in chunk if p < len(one.contexts)]
    finally:
        pair.train(was_training)
        reshard(pair)
    return found


def _measure_batch(
    module: Any,
    found: Measured,
    one: ContextSet,
    batch: CompressionBatch,
    rows: Sequence[Context],
    real: Tensor,
    key: str,
) -> None:
    memory = module.memory_of(batch, key)
    kept = real.nonzero()[:, 0]
    chosen = memory.select(kept.to(memory.mask.device))
    found.h = _with(found.h, chosen.stacked("hidden"))
    if memory.embeds is not None:
        found.z = _with(found.z, chosen.stacked("embeds"))
    vectors = chosen.hidden if chosen.embeds is None else chosen.embeds
    found.memory += list(vectors.float().cpu())
    found.contexts += [rows[i] for i in kept.tolist()]
    values, texts = _measure_memory(module, found, "", memory, batch, rows, real)
    found.values += [values[i] for i in kept.tolist()]
    found.decoded += [texts[i] for i in kept.tolist()]
    for name in module.controls:
        if name == "shuffled" and len(rows) < 2:
            continue
        null = controlled(memory, name)
        _measure_memory(module, found, f"/{name}", null, batch, rows, real)


def _measure_memory(
    module: Any,
    found: Measured,
    arm: str,
    memory: Memory,
    batch: CompressionBatch,
    rows: Sequence[Context],
    real: Tensor,
) -> tuple[list[Values], list[str]]:
    """Teacher-forced and free-running metrics of one memory; facts and texts of all rows."""
    pair, task = module.policy, module.trainer.datamodule.task
    live = batch.target_mask.bool() & real.to(batch.target_mask.device)[:, None]
    scores = pair.score(memory, batch.target_ids, batch.target_mask)
    found.add(arm, by_slot("ce", -scores.logprob, live, batch.slot_mask))
    found.add(arm, by_slot("entropy", scores.entropy, live, batch.slot_mask))
    slots = batch.slot_mask.bool() & batch.target_mask.bool()
    counted = [i for i, is_real in enumerate(real.tolist()) if is_real]
    if bool(slots.any()):
        logits = pair.logits(memory, batch.target_ids, batch.target_mask, slots)
        is_real = real.to(slots.device)[slots.nonzero()[:, 0]]
        found.add(arm, certainty_metrics(logits[is_real], torch.ones(int(is_real.sum()))))
        if not arm:
            found.entropy_slot.append(scores.entropy[slots & live].float().cpu())
        forced = _read(module, _forced(batch, slots, logits), rows)
        found.add(arm, _fact_metrics(rows, forced, counted, prefix="forced/"))
    texts = _decode(module, memory, batch)
    values = [task.read(row, text) for row, text in zip(rows, texts, strict=True)]
    found.add(arm, _fact_metrics(rows, values, counted))
    sources = [words(rows[i].text) for i in counted]
    found.add(arm, drift_metrics(sources, [words(texts[i]) for i in counted]))
    return values, texts


def _forced(batch: CompressionBatch, slots: Tensor, logits: Tensor) -> list[list[int]]:
    """Targets without EOS in which the labels of facts are what the decoder would have written."""
    ids = batch.target_ids.clone()
    ids[slots] = logits.argmax(-1).to(ids)
    lengths = (batch.target_mask.sum(1) - 1).tolist()
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def _decode(module: Any, memory: Memory, batch: CompressionBatch) -> list[str]:
    encoding = module.trainer.datamodule.encoding
    tokenizer = encoding.target_tokenizer
    limits = (batch.target_mask.sum(1) + module.extra_tokens).tolist()
    control = module.entropy_control
    seeds = list(range(len(limits))) if control.temperature else None
    decoded = greedy_decode(
        module.policy,
        memory,
        [int(limit) for limit in limits],
        eos_ids=[int(tokenizer.eos_token_id)],
        forbidden=_forbidden(tokenizer),
        temperature=control.temperature,
        seeds=seeds,
        fixed_steps=int(max(limits)) if module.trainer.world_size > 1 else None,
    )
    return [str(tokenizer.decode(ids)) for ids in decoded.texts()]


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
            flips = FLIPS[kind](source, decoded)
            metrics = flip_metrics(f"{kind}_flip", flips, outcomes.right)
            found |= {f"{prefix}{name}": value for name, value in metrics.items()}
    return found


# ---------------------------------------------------------------------- all rows together


def compare_sets(
    parts: Sequence[Mapping[str, Measured]], values: Mapping[str, float], split: str
) -> tuple[dict[str, float], dict[str, SetOutcome]]:
    """What compares rows and sets, of all ranks.

    Args:
        parts: Of each rank, set -> what it measured.
        values: Means that are there already, by tag.
        split: First part of the tags.

    Returns:
        ``<split>/conflict_gap`` with its paired test and interval, ranks of H and Z, and the sets'
        rows for figures.
    """
    names = list(parts[0])
    joined = {name: _joined([part[name] for part in parts]) for name in names}
    pc = joined.get("pc")
    found: dict[str, float] = {}
    for name, one in joined.items():
        for what, scattered in (("z", one.z), ("h", one.h)):
            if scattered is not None and scattered.count > 1:
                scalars = rank_scalars(scattered.spectrum())
                found |= {f"{split}/{name}/rank_{what}/{k}": v for k, v in scalars.items()}
        if pc is not None and name != "pc":
            found |= _paired(split, name, pc, one)
    for name in names:
        null, own = (
            values.get(f"{split}/{name}{arm}/knowledge_overwriting") for arm in ("/shuffled", "")
        )
        if null is not None and own is not None:
            found[f"{split}/{name}/net_overwriting"] = own - null
    return found, {name: _outcome(name, one, pc) for name, one in joined.items()}


def _joined(parts: Sequence[Measured]) -> Measured:
    """All rows of a set in its order."""
    whole = Measured()
    order = sorted(
        (place, rank, i) for rank, one in enumerate(parts) for i, place in enumerate(one.places)
    )
    for place, rank, i in order:
        one = parts[rank]
        whole.places.append(place)
        for name in ("contexts", "decoded", "values", "memory"):
            getattr(whole, name).append(getattr(one, name)[i])
    for one in parts:
        whole.entropy_slot += one.entropy_slot
        for name in ("z", "h"):
            mine, other = getattr(whole, name), getattr(one, name)
            if other is not None:
                setattr(whole, name, other if mine is None else mine.merge(other))
    return whole


def _paired(split: str, name: str, pc: Measured, one: Measured) -> dict[str, float]:
    """Facts of minimal pairs that differ: kept in the usual twin against kept here."""
    twins = {context.uid: i for i, context in enumerate(pc.contexts)}
    usual, changed = [], []
    for i, context in enumerate(one.contexts):
        place = twins.get(context.twin, -1)
        if place < 0:
            continue
        before = {slot.key: slot.value for slot in pc.contexts[place].slots}
        for slot in context.slots:
            if before.get(slot.key) not in (None, slot.value):
                usual.append(pc.values[place].get(slot.key) == before[slot.key])
                changed.append(one.values[i].get(slot.key) == slot.value)
    if not usual:
        return {}
    first, second = (torch.tensor(marks, dtype=torch.float64) for marks in (usual, changed))
    interval = paired_bootstrap(first, second, seed=f"{split}/{name}")
    return {
        f"{split}/{name}/gap": interval.estimate,
        f"{split}/{name}/gap_low": interval.low,
        f"{split}/{name}/gap_high": interval.high,
        f"{split}/{name}/mcnemar_p": mcnemar(first.bool(), second.bool()).p_value,
    }


def _outcome(name: str, one: Measured, pc: Measured | None) -> SetOutcome:
    twins = {} if pc is None else {context.uid: i for i, context in enumerate(pc.contexts)}
    widths = {memory.shape for memory in one.memory}
    return SetOutcome(
        name=name,
        contexts=one.contexts,
        decoded=one.decoded,
        values=one.values,
        memory=torch.stack(one.memory) if len(widths) == 1 else torch.zeros(0, 0, 0),
        entropy_slot=torch.cat(one.entropy_slot) if one.entropy_slot else torch.zeros(0),
        twins=[twins.get(context.twin, -1) for context in one.contexts],
    )


def _with(known: Scatter | None, vectors: Tensor) -> Scatter:
    own = scatter(vectors.float().cpu())
    return own if known is None else known.merge(own)
