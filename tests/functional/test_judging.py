"""Two-stage inference: confidence, anchors, winners and votes, by hand and exhaustively."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lightning_modules.functional.judging import (
    TwoStage,
    choose_anchor,
    select_winners,
    tail_confidence,
    two_stage_verdict,
)
from lightning_modules.functional.votes import as_verdicts, majority

torch.set_num_threads(1)

NAN, INF = math.nan, math.inf


def patterns(size):
    return itertools.product((0, 1, 2), repeat=size)


# --- confidence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.07, 0.1, 0.3, 1 / 3, 0.5, 1.0])
def test_confidence_equals_sorting_the_unpadded_row(fraction):
    generator = np.random.default_rng(0)
    lengths = np.arange(1, 31)
    rows = [-generator.exponential(size=length) for length in lengths]
    logprobs = torch.full((30, 40), NAN, dtype=torch.float64)
    mask = torch.zeros(30, 40, dtype=torch.bool)
    expected = []
    for index, row in enumerate(rows):
        places = np.sort(generator.choice(40, size=len(row), replace=False))  # left, right, holes
        logprobs[index, places] = torch.from_numpy(row)
        mask[index, places] = True
        share = Fraction(fraction).limit_denominator(1000)
        expected.append(np.sort(row)[: max(1, math.ceil(share * len(row)))].mean())
    result = tail_confidence(logprobs, mask, fraction)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)
    batched = tail_confidence(logprobs.view(5, 6, 40), mask.view(5, 6, 40).float(), fraction)
    assert torch.equal(batched, result.view(5, 6))


def test_confidence_rounds_up_without_float_error():
    logprobs = -torch.arange(1.0, 101.0)
    result = tail_confidence(logprobs, torch.ones(100), 0.07)  # 0.07 * 100 > 7 in floats
    assert result.item() == pytest.approx(-97.0)


@pytest.mark.parametrize(
    ("logprobs", "mask", "expected"),
    [
        ([-1.0, -2.0], [0, 0], -INF),
        ([], [], -INF),
        ([-1.0, -INF], [1, 1], -INF),
        ([-1.0, -INF], [1, 0], -1.0),
        ([-1.0, NAN], [1, 1], -INF),
        ([-1.0, NAN], [1, 0], -1.0),
        ([INF, -3.0], [0, 1], -3.0),
    ],
)
def test_confidence_edge_cases(logprobs, mask, expected):
    assert tail_confidence(torch.tensor(logprobs), torch.tensor(mask)).item() == expected


def test_confidence_of_half_precision_is_float32():
    result = tail_confidence(torch.full((2, 3), -1.0, dtype=torch.bfloat16), torch.ones(2, 3))
    assert result.dtype == torch.float32


# --- anchor -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidence", "verdicts", "rule", "uniform", "anchor"),
    [
        ([-3.0, -1.0, -2.0], [1, 1, 2], "confidence", None, 1),
        ([-3.0, -1.0, -2.0], [1, 0, 2], "confidence", None, 2),
        ([-1.0, -1.0, -1.0], [0, 2, 1], "confidence", None, 1),
        ([NAN, -INF, -9.0], [1, 1, 1], "confidence", None, 2),
        ([NAN, -INF, -9.0], [1, 1, 0], "confidence", None, 0),
        ([-3.0, -1.0, -2.0], [0, 1, 2], "first", None, 1),
        ([-3.0, -1.0, -2.0], [1, 0, 2], "random", 0.0, 0),
        ([-3.0, -1.0, -2.0], [1, 0, 2], "random", 0.49, 0),
        ([-3.0, -1.0, -2.0], [1, 0, 2], "random", 0.5, 2),
        ([-3.0, -1.0, -2.0], [1, 0, 2], "random", 1.0, 2),
        ([-3.0, -1.0], [0, 0], "confidence", None, None),
        ([-3.0, -1.0], [0, 0], "first", None, None),
        ([-3.0, -1.0], [0, 0], "random", 0.3, None),
        ([], [], "confidence", None, None),
    ],
)
def test_choose_anchor(confidence, verdicts, rule, uniform, anchor):
    assert choose_anchor(confidence, verdicts, rule, uniform) == anchor
    tensors = torch.tensor(confidence), torch.tensor(verdicts, dtype=torch.long)
    assert choose_anchor(*tensors, rule, uniform) == anchor


def test_random_anchor_is_uniform_over_the_parsable():
    draws = [choose_anchor([0.0] * 4, [1, 0, 2, 1], "random", u / 300) for u in range(300)]
    assert [draws.count(index) for index in range(4)] == [100, 0, 100, 100]


# --- votes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "weights", "tie", "verdict"),
    [
        ([1, 2, 2], None, None, 2),
        ([1, 1, 2], None, 0.9, 1),
        ([1, 2, 0, 0, 0], None, None, None),
        ([1, 2], None, 0.49, 1),
        ([1, 2], None, 0.5, 2),
        ([0, 0], None, 0.1, None),
        ([], None, 0.1, None),
        ([1, 2, 2], [True, False, False], None, 1),
        ([1, 2, 2], [False, False, False], 0.1, None),
        ([1, 2, 2], [3.0, 1.0, 1.0], None, 1),
        ([1, 1, 2], [0.1, 0.2, 0.3], None, 1),  # what the floats say: 0.1 + 0.2 > 0.3
        ([1, 1, 1, 2, 2, 2], [0.1, 0.2, 0.3, 0.3, 0.2, 0.1], None, None),
    ],
)
def test_majority(verdicts, weights, tie, verdict):
    assert majority(verdicts, weights, tie=tie) == verdict
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    assert majority(torch.tensor(verdicts, dtype=torch.long), given, tie=tie) == verdict


@pytest.mark.parametrize("size", range(6))
def test_majority_equals_counting(size):
    for verdicts in patterns(size):
        ones, twos = verdicts.count(1), verdicts.count(2)
        expected = None if ones == twos else (1 if ones > twos else 2)
        assert majority(verdicts) == expected


# --- winners ------------------------------------------------------------------------------------

BEATS = torch.tensor([True, True, True, False, True, False])
VERDICTS = [1, 2, 0, 1, 2, 2]
COPIES = torch.tensor([True, False, False, False, True, False])  # the anchor's own entry is True


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1, 4}),
        ({"exclude_copies": True}, {1}),
        ({"rule": "all"}, {1, 3, 4, 5}),
        ({"rule": "all", "exclude_copies": True}, {1, 3, 5}),
        ({"rule": "oracle", "label": 1}, {3}),
        ({"rule": "oracle", "label": 2}, {1, 4, 5}),
        ({"rule": "oracle", "label": 2, "exclude_copies": True}, {1, 5}),
        ({"rule": "random", "uniforms": [0.0, 0.9, 0.1, 0.3, 0.2, 0.8]}, {3, 4}),
        ({"rule": "random", "uniforms": [0.0, 0.9, 0.1, 0.3, 0.2, 0.8], "exclude_copies": 1}, {3}),
        ({"rule": "random", "uniforms": [0.5] * 6}, {1, 3}),
    ],
)
def test_select_winners(options, expected):
    if "uniforms" in options:
        options = options | {"uniforms": torch.tensor(options["uniforms"])}
    chosen = select_winners(BEATS, VERDICTS, 0, copies=COPIES, **options)
    assert chosen.dtype == torch.bool
    assert set(chosen.nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("rule", ["reflection", "random", "all", "oracle"])
@pytest.mark.parametrize("exclude", [True, False])
def test_winners_are_eligible_whatever_the_rule(rule, exclude):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        verdicts = torch.randint(0, 3, (6,), generator=generator)
        beats, copies = torch.rand(2, 6, generator=generator) < 0.5
        anchor = choose_anchor(torch.zeros(6), verdicts)
        options = {"copies": copies, "exclude_copies": exclude, "label": 1}
        uniforms = torch.rand(6, generator=generator)
        chosen = select_winners(beats, verdicts, anchor, rule=rule, uniforms=uniforms, **options)
        assert not bool(chosen[verdicts == 0].any())
        assert anchor is None or not bool(chosen[anchor])
        assert not (exclude and bool(chosen[copies].any()))
        if rule == "random":
            reflected = select_winners(beats, verdicts, anchor, **options)
            assert int(chosen.sum()) == int(reflected.sum())


def test_random_winners_are_uniform_subsets():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(3000):
        counts += select_winners(
            BEATS, VERDICTS, 0, rule="random", uniforms=torch.rand(6, generator=generator)
        )
    assert counts[[0, 2]].tolist() == [0, 0] and int(counts.sum()) == 6000
    assert bool(((counts[[1, 3, 4, 5]] - 1500).abs() < 150).all())


def test_inputs_are_not_changed():
    beats, copies, verdicts = BEATS.clone(), COPIES.clone(), torch.tensor(VERDICTS)
    select_winners(beats, verdicts, 0, rule="all", copies=copies, exclude_copies=True)
    assert torch.equal(beats, BEATS) and torch.equal(copies, COPIES)
    assert verdicts.tolist() == VERDICTS


# --- the vote of stage 2 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("winners", "verdicts", "anchor", "expected"),
    [
        ([0, 0, 0], [1, 2, 2], 0, TwoStage(1, True, False, 0)),  # W empty
        ([0, 1, 1], [1, 2, 1], 0, TwoStage(1, True, True, 2)),  # W tied
        ([1, 0, 1], [1, 2, 2], 1, TwoStage(2, True, True, 2)),
        ([0, 1, 1], [1, 2, 2], 0, TwoStage(2, False, False, 2)),  # all beat the anchor
        ([0, 1, 0], [1, 2, 1], 0, TwoStage(2, False, False, 1)),  # one winner against the rest
        ([0, 0, 0], [0, 2, 0], 1, TwoStage(2, True, False, 0)),  # the anchor alone parses
        ([1, 0, 1], [0, 2, 0], 1, TwoStage(2, True, False, 0)),  # unparsable ones do not vote
        ([0, 0, 0], [0, 0, 0], None, TwoStage(None, False, False, 0)),  # nothing parses
        ([0, 0, 0], [0, 0, 0], 1, TwoStage(None, True, False, 0)),
        ([0, 1, 1], [0, 2, 1], 0, TwoStage(None, True, True, 2)),  # an anchor without a verdict
        ([], [], None, TwoStage(None, False, False, 0)),
        ([0], [2], 0, TwoStage(2, True, False, 0)),  # N = 1
    ],
)
def test_two_stage_truth_table(winners, verdicts, anchor, expected):
    winners = [bool(winner) for winner in winners]
    assert two_stage_verdict(winners, verdicts, anchor) == expected
    tensors = torch.tensor(winners, dtype=torch.bool), torch.tensor(verdicts, dtype=torch.long)
    assert two_stage_verdict(*tensors, anchor) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_all_winners_equal_the_vote_of_the_others_with_the_anchor_breaking_ties(size):
    for verdicts in patterns(size):
        for anchor in (index for index, value in enumerate(verdicts) if value):
            others = verdicts[:anchor] + verdicts[anchor + 1 :]
            expected = majority(others)
            winners = select_winners(
                torch.zeros(size, dtype=torch.bool), verdicts, anchor, rule="all"
            )
            result = two_stage_verdict(winners, verdicts, anchor)
            assert result.verdict == (verdicts[anchor] if expected is None else expected)
            assert result.fallback == (expected is None)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_oracle_winners_bound_every_reflection(size):
    for verdicts in patterns(size):
        anchor = choose_anchor([0.0] * size, verdicts)
        for label in (1, 2):
            winners = select_winners(
                torch.zeros(size, dtype=torch.bool), verdicts, anchor, rule="oracle", label=label
            )
            best = two_stage_verdict(winners, verdicts, anchor).verdict == label
            assert best == (label in verdicts)  # right as soon as any sample is
            for beats in itertools.product((False, True), repeat=size):
                chosen = select_winners(torch.tensor(beats), verdicts, anchor)
                assert best >= (two_stage_verdict(chosen, verdicts, anchor).verdict == label)


def test_a_reflection_without_position_bias_gives_the_same_winners_in_both_orders():
    """A stub that prefers the longer critique, told in either order, picks one W."""
    lengths, verdicts, anchor = [5, 9, 3, 7, 5], [1, 2, 2, 1, 0], 0

    def beats(is_anchor_first):
        won = []
        for length in lengths:
            shown = (lengths[anchor], length) if is_anchor_first else (length, lengths[anchor])
            slot = 1 if shown[0] > shown[1] else 2 if shown[1] > shown[0] else 0
            won.append(slot == (2 if is_anchor_first else 1))
        return torch.tensor(won)

    first, second = (select_winners(beats(order), verdicts, anchor) for order in (True, False))
    assert first.tolist() == second.tolist() == [False, True, False, True, False]


# --- bad input ----------------------------------------------------------------------------------

THREE = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tail_confidence(torch.ones(2), torch.ones(3)), "share a shape"),
        (lambda: tail_confidence(torch.ones(2), torch.ones(2), 0.0), "fraction=0.0"),
        (lambda: tail_confidence(torch.ones(2), torch.ones(2), 10), "fraction=10"),
        (lambda: choose_anchor([0.0], [1], "confident"), "did you mean 'confidence'"),
        (lambda: choose_anchor([0.0], [1], "random"), "needs uniform"),
        (lambda: choose_anchor([0.0], [1], "random", 1.5), "uniform=1.5"),
        (lambda: choose_anchor([0.0], [1, 2]), "1 confidences for 2 verdicts"),
        (lambda: choose_anchor([0.0], [3]), r"verdicts\[0\] is 3; allowed: 0"),
        (lambda: as_verdicts(torch.ones(1, 1)), r"shape \[N\]"),
        (lambda: majority([1, 2], [1.0]), "one entry for each of the 2"),
        (lambda: majority([1, 2], [1.0, -1.0]), r"weights\[1\] is -1.0"),
        (lambda: majority([1, 2], torch.tensor([1.0, NAN])), r"weights\[1\] is nan"),
        (lambda: majority([1, 2], tie=-0.1), "tie=-0.1"),
        (lambda: select_winners(THREE, [1, 2, 1], 0, rule="reflect"), "'reflection'"),
        (lambda: select_winners(THREE, [1, 2, 1], 0, rule="random"), "needs uniforms"),
        (lambda: select_winners(THREE, [1, 2, 1], 0, rule="oracle"), "needs label 1 or 2"),
        (lambda: select_winners(THREE, [1, 2, 1], 0, exclude_copies=True), "needs copies"),
        (lambda: select_winners(THREE, [1, 2], 0), "beats_anchor has shape"),
        (lambda: select_winners(THREE, [1, 2, 1], 3), "anchor=3"),
        (lambda: two_stage_verdict(THREE, [1, 2, 1], 0), "must not hold the anchor"),
        (lambda: two_stage_verdict(~THREE, [1, 2, 1], -1), "anchor=-1"),
        (lambda: two_stage_verdict(~THREE, [0, 2, 0], None), "choose_anchor"),
        (lambda: two_stage_verdict([True], [1, 2], 0), "1 winners for 2 verdicts"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
