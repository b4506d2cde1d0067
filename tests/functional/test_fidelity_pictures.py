"""Numbers and marks behind the figures of fidelity: checked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from datamodules.tasks.compression import Context, Slot
from lightning_modules.functional.effective_rank import spectrum
from lightning_modules.functional.fidelity_pictures import (
    LOST,
    OTHER,
    changed_first,
    confusions,
    memory_spectrum,
    pair_cosines,
    word_diff,
)
from lightning_modules.functional.outcomes import SetOutcome

Fact = tuple[str, str | None, str | None]  # source, prior, decoded


def outcome(
    facts: Sequence[Fact],
    memory: torch.Tensor | None = None,
    name: str = "cf",
    twins: Sequence[int] = (),
) -> SetOutcome:
    """One fact a context, ``n0`` and so on."""
    contexts = [
        Context(
            f"{name}{i}", f"n{i} {said}", (Slot(f"n{i}", "attribute", said, usual, name="hue"),)
        )
        for i, (said, usual, _) in enumerate(facts)
    ]
    return SetOutcome(
        name=name,
        contexts=contexts,
        decoded=[f"n{i} {out or ''}" for i, (_, _, out) in enumerate(facts)],
        values=[{f"n{i}": out} for i, (_, _, out) in enumerate(facts)],
        memory=torch.zeros(len(facts), 1, 2) if memory is None else memory,
        twins=list(twins),
    )


def test_confusion_counts_and_marks_the_prior() -> None:
    facts: list[Fact] = [
        ("red", "blue", "red"),
        ("red", "blue", "blue"),
        ("red", "blue", "green"),
        ("blue", "red", None),
        ("blue", "blue", "blue"),
        ("blue", None, "red"),
    ]
    found = confusions(outcome(facts))["hue"]
    assert found.rows == ["blue", "red"]
    assert found.columns == ["blue", "red", OTHER, LOST]
    assert found.counts.tolist() == [[1, 1, 0, 1], [1, 1, 1, 0]]
    # blue that was expected and said is no overwriting, nor is a red that nothing made one expect
    assert found.overwritten.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]


def test_rare_values_share_a_row_and_keep_their_prior() -> None:
    facts: list[Fact] = [("red", None, "red")] * 2 + [
        ("tan", "teal", "teal"),
        ("teal", "tan", "red"),
    ]
    found = confusions(outcome(facts), max_values=1)["hue"]
    assert found.rows == ["red", OTHER]
    assert found.counts.tolist() == [[2, 0, 0], [1, 1, 0]]
    assert found.overwritten.tolist() == [[0, 0, 0], [0, 1, 0]]
    with pytest.raises(ValueError, match="max_values=0 must be at least 1"):
        confusions(outcome(facts), max_values=0)


def test_relations_have_no_confusion() -> None:
    one = SetOutcome(
        "sw", [Context("a", "x hit y", (Slot("r", "relation", "x hit y"),))], [""], [{}],
        torch.zeros(1, 1, 1),
    )  # fmt: skip
    assert confusions(one) == {}


PC: list[Fact] = [("red", "red", "red"), ("tan", "tan", "tan"), ("red", "red", "red")]
CF: list[Fact] = [("blue", "red", "red"), ("blue", "tan", "blue"), ("blue", "red", None)]


def test_cosines_tell_a_collapsed_pair_from_one_that_is_told_apart() -> None:
    # pair 0: one memory (collapsed, pulled); pair 1: opposite memories (kept); pair 2 lost
    usual = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]], [[-4.0, 0.0]]])
    changed = torch.tensor([[[4.0, 0.0]], [[0.0, -4.0]], [[-4.0, 0.0]]])
    found = pair_cosines(outcome(CF, changed, twins=[0, 1, 2]), outcome(PC, usual, "pc"))
    numbers = found.numbers
    assert (numbers["pairs"], numbers["pulled"], numbers["kept"]) == (3, 1, 1)
    assert numbers["twins_pulled"] == pytest.approx(1)
    assert numbers["twins_kept"] == pytest.approx(-1)
    assert numbers["twins"] == pytest.approx(1 / 3)
    # of six pairs of strangers two are opposite, four at right angles
    assert numbers["strangers"] == pytest.approx(-2 / 6)
    assert found.labels == ["cf 0", "pc 0", "cf 1", "pc 1", "cf 2", "pc 2"]
    assert found.matrix[0, 1] == pytest.approx(1) and found.matrix[2, 3] == pytest.approx(-1)
    assert found.diagnosis() == (
        "3 pairs, 1 pulled, 1 kept; mean cosine: "
        "twins 0.333, strangers -0.333, twins pulled 1.000, twins kept -1.000"
    )


def test_what_all_memories_share_is_taken_off() -> None:
    far = torch.tensor([1000.0, 1000.0])
    usual = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 1.0]]])
    changed = torch.tensor([[[-1.0, 0.0]], [[1.0, 0.0]], [[0.0, -1.0]]])
    near = pair_cosines(outcome(CF, changed, twins=[0, 1, 2]), outcome(PC, usual, "pc"))
    moved = pair_cosines(
        outcome(CF, changed + far, twins=[0, 1, 2]), outcome(PC, usual + far, "pc")
    )
    assert moved.numbers == pytest.approx(near.numbers, abs=1e-3)
    assert near.numbers["twins"] == pytest.approx(-1)


def test_only_contexts_with_a_twin_count_and_the_matrix_shows_the_first() -> None:
    memory = torch.eye(3)[:, None]
    found = pair_cosines(outcome(CF, memory, twins=[-1, 2, 1]), outcome(PC, memory, "pc"), count=1)
    assert found.labels == ["cf 1", "pc 2"]
    assert found.numbers["pairs"] == 2 and found.matrix.shape == (2, 2)
    with pytest.raises(ValueError, match="'cf' has no minimal pair in 'pc'"):
        pair_cosines(outcome(CF, memory, twins=[-1] * 3), outcome(PC, memory, "pc"))
    with pytest.raises(ValueError, match="differ"):
        pair_cosines(outcome(CF, memory, twins=[0] * 3), outcome(PC, memory[:, :, :2], "pc"))


def test_spectrum_of_chunks_is_that_of_all() -> None:
    memory = torch.randn(150, 2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(memory_spectrum(memory), spectrum(memory))
    with pytest.raises(ValueError, match="needs memories"):
        memory_spectrum(torch.zeros(0, 0, 0))


def test_words_are_marked_on_both_sides() -> None:
    slots = (Slot("c", "attribute", "white", "red"), Slot("p", "attribute", "hall", "attic"))
    context = Context("a", "the White berry is in the hall .", slots)
    text = "The red berry is in the attic now ."
    source, decoded = word_diff(context, text, {"c": "red", "p": None})
    assert [word for word, mark in source if mark == "gone"] == ["White", "hall"]
    # attic is a prior, but the fact was not read as that
    assert [one for one in decoded if one[1] != "same"] == [
        ("red", "prior"), ("attic", "new"), ("now", "new"),
    ]  # fmt: skip
    assert " ".join(word for word, _ in decoded) == text


def test_changed_texts_come_first() -> None:
    facts: list[Fact] = [("red", None, "red"), ("red", None, "tan"), ("tan", None, "tan"),
                         ("tan", None, None)]  # fmt: skip
    assert changed_first(outcome(facts), 3) == [1, 3, 0]


def test_an_outcome_of_unequal_rows_is_refused() -> None:
    context = Context("a", "x")
    with pytest.raises(ValueError, match="'pc' has 1 contexts but 0 of decoded, 2 of memory"):
        SetOutcome("pc", [context], [], [{}], torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match=r"must be \(N, m, d\)"):
        SetOutcome("pc", [context], ["x"], [{}], torch.zeros(1, 1))
