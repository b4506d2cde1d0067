"""What compares rows and sets of an evaluation, once those of all ranks are together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightning_modules.compressor.measuring import Measured
from lightning_modules.functional.effective_rank import rank_scalars
from lightning_modules.functional.outcomes import SetOutcome
from lightning_modules.functional.paired_tests import mcnemar, paired_bootstrap


def compare_sets(
    parts: Sequence[Mapping[str, Measured]], values: Mapping[str, float], split: str
) -> tuple[dict[str, float], dict[str, SetOutcome]]:
    """What compares rows and sets, of all ranks.

    Args:
        parts: Of each rank, set -> what it measured.
        values: Means that are there already, by tag.
        split: First part of the tags.

    Returns:
        ``<split>/<set>/gap`` (usual twin less changed one) with its paired test and interval,
        ranks of H and Z, and the sets' rows for figures.
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
