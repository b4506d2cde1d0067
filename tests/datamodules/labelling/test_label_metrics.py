"""Metrics of labels, by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from datamodules.labelling.label_metrics import correlation, histograms, label_metrics
from datamodules.labelling.selection import select
from tests.datamodules.labelling.small_world import turn_of

TURNS = [
    turn_of([(1, 90), (1, 90), (0, 10), (0, 10)], uid="a"),  # two rows
    turn_of([(1, 90), (1, 10), (1, 10), (1, 10)], uid="b"),  # one row
    turn_of([(0, 90), (0, 10), (0, 10), (0, 10)], uid="c"),  # no_em
    turn_of([(1, 50), (0, 10), (0, 10), (0, 10)], uid="d"),  # low_lr
    turn_of([(1, 90), (1, 90), (1, 90), (0, 10)], uid="e"),  # few_negatives
    replace(turn_of([(0, 0)] * 4, uid="f"), local=None, right=None),  # unreadable
]
COUNTS = Counter(
    trajectories=4, right=1, searches=10, mismatched=2, no_budget=3, requests=12, unread=1,
    queries=10, sub_answers=4,
)  # fmt: skip


def metrics(turns, counts=COUNTS, **options):
    rows, drops = select(turns, num_negatives=2, **options)
    found = label_metrics(turns, rows, drops, counts)
    assert all(name.startswith("labels/") for name in found)
    return {name.removeprefix("labels/"): value for name, value in found.items()}


def test_values():
    found = metrics(TURNS)
    correlated = found.pop("gac_lr_corr")
    assert found == pytest.approx(
        {
            "rows": 3,
            "turns": 6,
            "rows_per_turn": 1.5,
            "kept_turn_frac": 2 / 6,
            "positives_per_turn": 1.5,
            "drop_no_em": 1,
            "drop_low_lr": 1,
            "drop_few_negs": 1,
            "drop_unreadable": 1,
            "trajectories": 4,
            "mismatched": 2,
            "failed_trajectories": 0,
            "failed_turns": 0,
            "trajectory_em": 0.25,
            "searches": 2.5,
            "skipped_no_budget": 3,
            "skipped_few_candidates": 0,
            "judge_parse_fail": 1 / 12,
            "subanswer_coverage": 0.4,
            "lr_mean": (200 + 120 + 120 + 80 + 280) / 20 / 100,
            "gac_mean": 10 / 20,
            "gac_all_one_frac": 1 / 5,
            "gac_all_zero_frac": 1 / 5,
        }
    )
    assert 0 < correlated < 1


def test_signals_that_were_not_measured_are_left_out():
    blind = [replace(turn, local=None) for turn in TURNS[:2]]
    found = metrics(blind, Counter(trajectories=2), label="global")
    assert not {"lr_mean", "gac_lr_corr", "judge_parse_fail", "subanswer_coverage"} & set(found)
    assert found["gac_mean"] == 6 / 8
    unjudged = [replace(turn, right=None) for turn in TURNS[:2]]
    assert "gac_mean" not in metrics(unjudged, label="local")


def test_nothing_at_all_gives_zeros():
    found = metrics([], Counter())
    assert found["rows"] == found["kept_turn_frac"] == found["trajectory_em"] == 0


def test_correlation():
    assert correlation([0, 1, 1, 0], [90, 10, 10, 90]) == pytest.approx(-1)
    assert correlation([0, 0, 1, 1], [1, 2, 1, 2]) == pytest.approx(0)
    assert correlation([], []) is None


def test_histograms_part_right_from_wrong():
    found = histograms(TURNS[:1])
    assert {name: values.tolist() for name, values in found.items()} == {
        "labels/lr_gac0": [10, 10],
        "labels/lr_gac1": [90, 90],
    }
    assert list(histograms([replace(TURNS[0], right=None)])) == ["labels/lr"]
    assert not histograms([TURNS[5]])
