"""What the figures of the size-fidelity laboratory show, as numbers and as marked words.

Card section 7: which value became which (confusion, with the prior's part), whether the memories
of minimal pairs can be told apart (cosines), and which words of a text changed. Drawing is in
``callbacks/fidelity_figures.py``.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_modules.functional.effective_rank import Scatter, scatter
from lightning_modules.functional.outcomes import TWIN_SET, SetOutcome

if TYPE_CHECKING:
    from datamodules.tasks.compression import Context

#: What became of a word: ``gone`` in the source, ``new`` or ``prior`` (the value that the world
#: makes one expect, against the source) in the decoded text.
Mark = Literal["same", "gone", "new", "prior"]
Word = tuple[str, Mark]

OTHER, LOST = "(other)", "(lost)"
_CHUNK = 64  # memories that are widened to float64 at once


@dataclass(frozen=True)
class Confusion:
    """Values in the source against values that came back, of one attribute.

    Args:
        rows: R values of the source in alphabetical order; ``(other)`` last, if there are more.
        columns: C values that came back: those of the rows, ``(other)`` and ``(lost)``.
        counts: ``(R, C)`` slots.
        overwritten: ``(R, C)`` those of them whose decoded value is the slot's prior and not its
            source's value.
    """

    rows: list[str]
    columns: list[str]
    counts: Tensor
    overwritten: Tensor


@dataclass(frozen=True)
class PairCosines:
    """How alike the memories of minimal pairs are.

    A memory is all its vectors as one, less the mean memory of both sets: what all memories share
    says nothing about a pair [our choice]. A pair is pulled where a fact that differs came back
    as the twin's (CF: the prior; SW: the usual order), kept where all facts that differ are right.

    Args:
        labels: Of the matrix, ``cf 3`` and ``pc 7``; the two halves of a pair stand together.
        matrix: ``(2 P, 2 P)`` cosines of the first pairs.
        numbers: ``pairs``, ``twins`` (mean cosine of the two halves), ``strangers`` (of halves of
            different pairs), ``pulled`` and ``kept`` (how many pairs), ``twins_pulled`` and
            ``twins_kept`` (mean cosine of their halves); what has no pair is left out.
    """

    labels: list[str]
    matrix: Tensor
    numbers: dict[str, float]

    def diagnosis(self) -> str:
        """One line: what the cosines of pulled pairs say about where the fact was lost.

        Pulled pairs with nearly one memory lost the fact in the compressor; where their memories
        differ as those of kept pairs do, the decoder had it and wrote something else (card 7).

        Example:
            >>> PairCosines([], torch.empty(0, 0), {"pairs": 9.0, "twins": 0.98}).diagnosis()
            '9 pairs; mean cosine: twins 0.980'
        """
        counts = [
            f"{self.numbers[name]:.0f} {name}"
            for name in ("pairs", "pulled", "kept")
            if name in self.numbers
        ]
        cosines = [
            f"{name.replace('_', ' ')} {self.numbers[name]:.3f}"
            for name in ("twins", "strangers", "twins_pulled", "twins_kept")
            if name in self.numbers
        ]
        return f"{', '.join(counts)}; mean cosine: {', '.join(cosines)}"


def memory_spectrum(memory: Tensor) -> Tensor:
    """Singular values of all memory vectors of a set, less their mean.

    Args:
        memory: ``(N, m, d)``.

    Returns:
        ``(min(N m, d),)`` descending, float64, as ``effective_rank.Scatter.spectrum`` has them.

    Raises:
        ValueError: No vector, or numbers that are not finite.

    Example:
        >>> memory_spectrum(torch.tensor([[[2.0, 0.0], [-2.0, 0.0]]])).square().round().tolist()
        [8.0, 0.0]
    """
    if not memory.numel():
        raise ValueError(f"a spectrum needs memories, got {tuple(memory.shape)}")
    return reduce(Scatter.merge, map(scatter, memory.split(_CHUNK))).spectrum()


def confusions(outcome: SetOutcome, *, max_values: int = 12) -> dict[str, Confusion]:
    """A confusion matrix for each name of attribute.

    Args:
        outcome: Of a set.
        max_values: Values with a row of their own; rarer ones share the row ``(other)``.

    Returns:
        Name -> matrix, names in alphabetical order; empty where no slot is an attribute.

    Raises:
        ValueError: ``max_values`` below 1.
    """
    if max_values < 1:
        raise ValueError(f"max_values={max_values} must be at least 1")
    facts: dict[str, list[tuple[str, str | None, str | None]]] = {}
    for context, values in zip(outcome.contexts, outcome.values, strict=True):
        for slot in context.slots:
            if slot.kind == "attribute":
                fact = (slot.value, slot.prior, values.get(slot.key))
                facts.setdefault(slot.name, []).append(fact)
    return {name: _confusion(facts[name], max_values) for name in sorted(facts)}


def paired_sets(outcomes: Mapping[str, SetOutcome]) -> Iterator[tuple[SetOutcome, SetOutcome]]:
    """Sets with minimal pairs whose memories can be compared, each with the set of their twins.

    Args:
        outcomes: Name -> rows of all sets.
    """
    usual = outcomes.get(TWIN_SET)
    for one in outcomes.values():
        has_pairs = one is not usual and max(one.twins, default=-1) >= 0
        if usual is None or not has_pairs or not one.memory.numel():
            continue
        if one.memory.shape[1:] == usual.memory.shape[1:]:
            yield one, usual


def pair_cosines(outcome: SetOutcome, twin_set: SetOutcome, *, count: int = 16) -> PairCosines:
    """Cosines of the memories of minimal pairs, and what they say (card section 7).

    Args:
        outcome: Set whose ``twins`` are places of ``twin_set``; at least one is none of -1.
        twin_set: The set ``pc``.
        count: Pairs in the matrix; the numbers are of all pairs.

    Returns:
        Matrix and numbers.

    Raises:
        ValueError: No pair, or memories that differ in shape.
    """
    places = [(i, twin) for i, twin in enumerate(outcome.twins) if twin >= 0]
    if not places:
        raise ValueError(f"set {outcome.name!r} has no minimal pair in {twin_set.name!r}")
    if outcome.memory.shape[1:] != twin_set.memory.shape[1:]:
        shapes = f"{tuple(outcome.memory.shape)} and {tuple(twin_set.memory.shape)}"
        raise ValueError(f"memories of {outcome.name!r} and {twin_set.name!r} differ: {shapes}")
    items, others = (list(column) for column in zip(*places, strict=True))
    one, two = _directions(outcome.memory[items], twin_set.memory[others])
    between = one @ two.T
    both = torch.stack([one[:count], two[:count]], 1).flatten(0, 1)
    names = [(f"{outcome.name} {i}", f"{twin_set.name} {k}") for i, k in places[:count]]
    return PairCosines(
        labels=[label for pair in names for label in pair],
        matrix=both @ both.T,
        numbers=_pair_numbers(outcome, twin_set, places, between),
    )


def word_diff(context: Context, decoded: str, values: Mapping[str, str | None]) -> list[list[Word]]:
    """The words of a source and of what came back, with a mark on each that changed.

    Words are split at blanks and compared in lower case.

    Args:
        context: The source; priors of its slots mark words as ``prior``.
        decoded: Text that came back.
        values: Slot key -> decoded value.

    Returns:
        Two lists of ``(word, mark)``: the source's words, the decoded ones.

    Example:
        >>> from datamodules.tasks.compression import Context, Slot
        >>> said = Context("c", "snow is red", (Slot("s", "attribute", "red", prior="white"),))
        >>> word_diff(said, "Snow is white", {"s": "white"})[1]
        [('Snow', 'same'), ('is', 'same'), ('white', 'prior')]
    """
    usual = {
        word
        for slot in context.slots
        if slot.prior is not None and values.get(slot.key) == slot.prior != slot.value
        for word in slot.prior.lower().split()
    }
    before, after = context.text.split(), decoded.split()
    first, second = ([word.lower() for word in words] for words in (before, after))
    said: list[Word] = []
    out: list[Word] = []
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        is_same = kind == "equal"
        said += [(word, "same" if is_same else "gone") for word in before[a:b]]
        for word in after[c:d]:
            mark: Mark = "prior" if word.lower() in usual else "new"
            out.append((word, "same" if is_same else mark))
    return [said, out]


def changed_first(outcome: SetOutcome, count: int) -> list[int]:
    """Places of the rows to show: texts that changed, then the others, each in their order.

    Args:
        outcome: Of a set.
        count: At most.
    """
    changed = [
        context.text.lower().split() != text.lower().split()
        for context, text in zip(outcome.contexts, outcome.decoded, strict=True)
    ]
    return sorted(range(len(changed)), key=lambda place: not changed[place])[:count]


# --------------------------------------------------------------------------------------- parts


def _confusion(facts: Sequence[tuple[str, str | None, str | None]], max_values: int) -> Confusion:
    frequent = Counter(said for said, _, _ in facts)
    order = sorted(frequent, key=lambda value: (-frequent[value], value))
    shown = sorted(order[:max_values])
    rows = shown + ([OTHER] if len(order) > max_values else [])
    columns = [*shown, OTHER, LOST]
    row_of = {value: place for place, value in enumerate(shown)}
    counts = torch.zeros(len(rows), len(columns), dtype=torch.long)
    overwritten = torch.zeros_like(counts)
    for said, usual, out in facts:
        row = row_of.get(said, len(rows) - 1)
        column = len(columns) - 1 if out is None else row_of.get(out, len(columns) - 2)
        counts[row, column] += 1
        overwritten[row, column] += int(out is not None and out == usual != said)
    return Confusion(rows, columns, counts, overwritten)


def _directions(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Memories of both sets as unit vectors, less the mean of all; a mean memory stays 0."""
    vectors = torch.cat([one.flatten(1), two.flatten(1)]).float()
    vectors = vectors - vectors.mean(0)
    units = torch.nn.functional.normalize(vectors, dim=1)
    return units[: len(one)], units[len(one) :]


def _pair_numbers(
    outcome: SetOutcome, twin_set: SetOutcome, places: Sequence[tuple[int, int]], between: Tensor
) -> dict[str, float]:
    own = between.diagonal().double()
    twin_of = torch.tensor([twin for _, twin in places])
    stranger = twin_of[:, None] != twin_of[None, :]
    fates = [_fate(outcome, twin_set, i, twin) for i, twin in places]
    numbers = {"pairs": float(len(places)), "twins": float(own.mean())}
    if bool(stranger.any()):
        numbers["strangers"] = float(between[stranger].double().mean())
    for fate in ("pulled", "kept"):
        chosen = torch.tensor([one == fate for one in fates])
        numbers[fate] = float(chosen.sum())
        if bool(chosen.any()):
            numbers[f"twins_{fate}"] = float(own[chosen].mean())
    return numbers


def _fate(outcome: SetOutcome, twin_set: SetOutcome, place: int, twin: int) -> str:
    """``pulled``, ``kept`` or ``""`` (lost, or nothing differs) of one pair."""
    usual = {slot.key: slot.value for slot in twin_set.contexts[twin].slots}
    values = outcome.values[place]
    differing = [
        slot
        for slot in outcome.contexts[place].slots
        if usual.get(slot.key) not in (None, slot.value)
    ]
    if any(values.get(slot.key) == usual[slot.key] for slot in differing):
        return "pulled"
    is_kept = differing and all(values.get(slot.key) == slot.value for slot in differing)
    return "kept" if is_kept else ""
