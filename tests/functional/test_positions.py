"""Position metrics and the confidence AUC against stubs, slow loops and hand-made tables."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_modules.functional.positions import confidence_auc, position_metrics
from lightning_modules.functional.sums import means, merge

torch.set_num_threads(1)

NAMES = ["accuracy", "consistency", "flip_rate", "first_slot_rate", "invalid_rate"]
LABELS = torch.tensor([1, 2, 2, 1, 1, 2, 1])


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        (torch.ones_like(LABELS), torch.ones_like(LABELS), [0.5, 0.0, 1.0, 1.0, 0.0]),
        (torch.full_like(LABELS, 2), torch.full_like(LABELS, 2), [0.5, 0.0, 1.0, 0.0, 0.0]),
        (LABELS, 3 - LABELS, [1.0, 1.0, 0.0, 0.5, 0.0]),
        (3 - LABELS, LABELS, [0.0, 0.0, 0.0, 0.5, 0.0]),
    ],
    ids=["always 1", "always 2", "oracle", "always wrong"],
)
def test_stubs(forward, backward, expected):
    assert means(position_metrics(forward, backward, LABELS)) == dict(
        zip(NAMES, expected, strict=True)
    )


def test_unparsable_verdicts_are_wrong_but_no_flips():
    forward, backward = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 1, 0])
    metrics = position_metrics(forward, backward, torch.ones(4, dtype=torch.long))
    plain = {name: (total.item(), count.item()) for name, (total, count) in metrics.items()}
    assert plain == {
        "accuracy": (3.0, 8.0),
        "consistency": (0.0, 4.0),
        "flip_rate": (1.0, 1.0),
        "first_slot_rate": (3.0, 4.0),
        "invalid_rate": (4.0, 8.0),
    }


def test_nothing_parses_and_no_pairs():
    zeros = torch.zeros(3, dtype=torch.long)
    values = means(position_metrics(zeros, zeros, LABELS[:3]))
    assert values == {"accuracy": 0.0, "consistency": 0.0, "invalid_rate": 1.0}
    assert means(position_metrics(LABELS[:0], LABELS[:0], LABELS[:0])) == {}


def test_equals_the_slow_loop_over_all_triples_and_merges():
    triples = list(itertools.product((0, 1, 2), (0, 1, 2), (1, 2)))
    expected = dict.fromkeys(NAMES, (0, 0))

    def add(name, value, counted=True):
        total, count = expected[name]
        expected[name] = (total + (value and counted), count + counted)

    merged: dict = {}
    for forward, backward, label in triples:
        response = {0: None, 1: 2, 2: 1}[backward]
        add("accuracy", forward == label)
        add("accuracy", response == label)
        add("consistency", forward == label == response)
        add("flip_rate", forward != response, bool(forward and backward))
        for slot in (forward, backward):
            add("first_slot_rate", slot == 1, slot != 0)
            add("invalid_rate", slot == 0)
        one = [torch.tensor([value]) for value in (forward, backward, label)]
        merged = merge(merged, position_metrics(*one))
    whole = position_metrics(*(torch.tensor(column) for column in zip(*triples, strict=True)))
    for metrics in (merged, whole):
        plain = {name: (int(total), int(count)) for name, (total, count) in metrics.items()}
        assert plain == expected


def test_consistency_is_bounded_by_accuracy_and_relabelling_commutes():
    generator = torch.Generator().manual_seed(0)
    forward, backward = torch.randint(0, 3, (2, 500), generator=generator)
    labels = torch.randint(1, 3, (500,), generator=generator)
    values = means(position_metrics(forward, backward, labels))
    assert values["consistency"] <= values["accuracy"]
    # Calling the first response the second one swaps the two prompts of every pair.
    swapped = means(position_metrics(backward, forward, 3 - labels))
    assert swapped == pytest.approx(values)


@pytest.mark.parametrize(
    ("forward", "backward", "labels", "message"),
    [
        ([1, 3], [1, 1], [1, 1], r"forward\[1\] is 3; allowed: 0, 1, 2"),
        ([1, 1], [-1, 1], [1, 1], r"backward\[0\] is -1"),
        ([1, 1], [1, 1], [1, 0], r"labels\[1\] is 0; allowed: 1, 2"),
        ([1], [1, 1], [1, 1], "forward must have shape"),
        ([[1]], [[1]], [[1]], "must have shape"),
    ],
)
def test_bad_input(forward, backward, labels, message):
    with pytest.raises(ValueError, match=message):
        position_metrics(torch.tensor(forward), torch.tensor(backward), torch.tensor(labels))


def slow_auc(confidence, correct):
    right = [c for c, ok in zip(confidence, correct, strict=True) if ok]
    wrong = [c for c, ok in zip(confidence, correct, strict=True) if not ok]
    won = [1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong]
    return (sum(won) / len(won), len(won)) if won else (0.5, 0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_auc_equals_the_slow_loop(seed, levels):
    generator = torch.Generator().manual_seed(seed)
    confidence = -torch.randint(0, levels, (25,), generator=generator) / levels
    confidence[::9] = -math.inf
    correct = torch.rand(25, generator=generator) < 0.5
    auc, num_pairs = confidence_auc(confidence, correct)
    assert (auc, num_pairs) == pytest.approx(slow_auc(confidence.tolist(), correct.tolist()))
    assert confidence_auc(-confidence, correct)[0] == pytest.approx(1 - auc)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([], [], (0.5, 0)),
        ([0.1, 0.2], [True, True], (0.5, 0)),
        ([0.1, 0.2], [False, False], (0.5, 0)),
        ([0.1, 0.2], [False, True], (1.0, 1)),
        ([0.1, 0.2], [True, False], (0.0, 1)),
        ([math.nan, 0.2], [True, False], (0.0, 1)),
        ([math.nan, -math.inf], [True, False], (0.5, 1)),
    ],
)
def test_auc_by_hand(confidence, correct, expected):
    tensors = torch.tensor(confidence), torch.tensor(correct, dtype=torch.bool)
    assert confidence_auc(*tensors) == expected


def test_auc_refuses_mismatched_shapes():
    with pytest.raises(ValueError, match="one length"):
        confidence_auc(torch.zeros(2), torch.zeros(3))
