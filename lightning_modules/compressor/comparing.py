"""What compares rows and sets of an evaluation, once those of all ranks are together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightning_modules.compressor.measuring import Measured
from lightning_modules.functional.effective_rank import (
    effective_rank,
    rank_scalars,
    sample_spectra,
)
from lightning_modules.functional.fidelity import net_overwriting
from lightning_modules.functional.fidelity_pictures import pair_cosines, paired_sets
from lightning_modules.functional.fidelity_text import corpus_bleu
from lightning_modules.functional.outcomes import SetOutcome
from lightning_modules.functional.paired_tests import mcnemar, paired_bootstrap
from lightning_modules.functional.sums import Metrics

#: Texts of a set whose memories have a spectrum each: the card's size of a set (section 4).
NUM_SPECTRA = 512
#: Tag -> number of ``PairCosines``.
COSINES = {
    "pair_cosine": "twins",
    "pair_cosine_overwritten": "twins_pulled",
    "pair_cosine_kept": "twins_kept",
}


def compare_sets(
    parts: Sequence[Mapping[str, Measured]], split: str
) -> tuple[dict[str, float], dict[str, SetOutcome]]:
    """What compares rows and sets, of all ranks.

    Args:
        parts: Of each rank, set -> what it measured.
        split: First part of the tags.

    Returns:
        ``<split>/<set>/gap`` (usual twin less changed one) with its paired test and interval,
        ranks of H and Z, cosines of minimal pairs, and the sets' rows for figures.
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
    outcomes = {name: _outcome(name, one, pc) for name, one in joined.items()}
    for name, one in joined.items():
        what = "h" if one.z is None else "z"
        spectra = [sample_spectra(memory[None]) for memory in one.memory[:NUM_SPECTRA]]
        erank = sum(float(effective_rank(sigma)) for sigma in spectra) / len(spectra)
        found[f"{split}/{name}/rank_{what}/sample_erank"] = erank
    for outcome, usual in paired_sets(outcomes):
        numbers = pair_cosines(outcome, usual, count=1).numbers
        for tag, number in COSINES.items():
            if number in numbers:
                found[f"{split}/{outcome.name}/{tag}"] = numbers[number]
    return found, outcomes


def rates_of_sets(merged: Metrics) -> dict[str, float]:
    """What is made of the sums of a whole set, and is no mean over its rows.

    Args:
        merged: Tag -> (sum, count), of all batches and ranks.

    Returns:
        ``corpus_bleu`` of every set and null model, ``net_overwriting`` of sets that were also
        decoded from shuffled memories.
    """
    found = {}
    bleu, overwriting = "/length_ratio", "knowledge_overwriting"
    for tag, value in merged.items():
        if tag.endswith(bleu):
            arm = tag.removesuffix(bleu)
            own = {
                k.removeprefix(f"{arm}/"): v for k, v in merged.items() if k.startswith(f"{arm}/")
            }
            found[f"{arm}/corpus_bleu"] = corpus_bleu(own)
        elif tag.endswith(f"/shuffled/{overwriting}"):
            name = tag.removesuffix(f"/shuffled/{overwriting}")
            own = {overwriting: merged[f"{name}/{overwriting}"]}
            if (net := net_overwriting(own, {overwriting: value})) is not None:
                found[f"{name}/net_overwriting"] = net
    return found


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
