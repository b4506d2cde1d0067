"""Selection of training rows, by tables: card 2.5 and 10."""

from __future__ import annotations

from dataclasses import replace

import pytest

from datamodules.labelling.selection import select
from tests.datamodules.labelling.small_world import turn_of

WRONG = (0, 5)


def padded(*best: tuple[int, int], total: int = 20) -> list[tuple[int, int]]:
    """The given candidates last, wrong ones before: order must not matter."""
    return [WRONG] * (total - len(best)) + list(best)


@pytest.mark.parametrize(
    ("pairs", "label", "rows", "reason"),
    [
        (padded((0, 100)), "both", 0, "no_em"),
        (padded((1, 59)), "both", 0, "low_lr"),
        (padded((1, 60)), "both", 1, None),
        (padded((1, 59), (0, 100)), "both", 0, "low_lr"),
        (padded(*[(1, 80)] * 5), "both", 3, None),
        (padded(*[(1, 80)] * 6), "both", 0, "few_negatives"),
        (padded((0, 60)), "local", 1, None),
        (padded((1, 59)), "local", 0, "low_lr"),
        (padded((1, 0)), "global", 1, None),
        (padded((0, 100)), "global", 0, "no_em"),
        (padded((1, 90), (1, 10)), "global", 2, None),
        (padded((0, 100)), "gold_ids", 0, "no_em"),
    ],
)
def test_rows_and_drops(pairs, label, rows, reason):
    found, drops = select([turn_of(pairs)], label=label)
    assert len(found) == rows
    assert drops == ({reason: 1} if reason else {})


def test_correctness_comes_first():
    turn = turn_of(padded((0, 100), (1, 90)))
    assert [row.positive for row in select([turn])[0]] == ["p19"]
    assert [row.positive for row in select([turn], label="local")[0]] == ["p18"]


def test_a_right_passage_one_notch_lower_is_a_negative():
    turn = turn_of(padded((1, 85), (1, 90), total=17))
    (row,), _ = select([turn], num_negatives=16)
    assert row.positive == "p16" and "p15" in row.negatives


def test_ties_share_negatives_and_know_each_other():
    rows, _ = select([turn_of(padded(*[(1, 80)] * 5))])
    assert [row.positive for row in rows] == ["p15", "p16", "p17"]  # the retriever's best
    assert {row.negatives for row in rows} == {rows[0].negatives}
    assert len(set(rows[0].negatives)) == 15
    assert all(row.siblings == ("p15", "p16", "p17", "p18", "p19") for row in rows)
    assert not set(rows[0].negatives) & set(rows[0].siblings)
    assert [row.uid for row in rows] == ["q/0/0", "q/0/1", "q/0/2"]


def test_scores_belong_to_their_passages():
    pairs = [(0, place) for place in range(19)] + [(1, 77)]
    (row,), _ = select([turn_of(pairs)])
    assert row.scores == (77, *(int(uid[1:]) for uid in row.negatives))
    (blind,), _ = select([replace(turn_of(pairs), local=None)], label="global")
    assert blind.scores == (-1,) * 16


def test_draws_hang_on_seed_question_and_turn_alone():
    pairs = padded((1, 80), total=40)
    turns = [turn_of(pairs, uid=uid, turn=turn) for uid in "ab" for turn in (0, 1)]
    rows, _ = select(turns)
    assert len({row.negatives for row in rows}) == 4
    assert select(turns[::-1])[0] == rows[::-1]
    assert select(turns, seed=1)[0] != rows


def test_random_negatives_are_spread_over_all():
    pairs = padded((1, 80), total=20)
    turns = [turn_of(pairs, uid=str(number)) for number in range(50)]
    rows, _ = select(turns, num_negatives=2)
    assert {uid for row in rows for uid in row.negatives} == {f"p{i}" for i in range(19)}


def test_forms_of_negatives():
    turn = turn_of([(1, 50)] * 4 + [(0, 5)] * 15 + [(1, 90)])
    top = select([turn], negatives="top")[0][0].negatives
    assert top == tuple(f"p{i}" for i in range(15))
    wrong = select([turn], negatives="gac0_only")[0][0].negatives
    assert set(wrong) == {f"p{i}" for i in range(4, 19)}
    assert select([turn], negatives="gac0_only", num_negatives=16)[1] == {"few_negatives": 1}
    (row,), drops = select([turn_of([(1, 90)] * 3)], negatives="in_batch_only", max_positives=1)
    assert row.negatives == () and row.scores == (90,) and not drops


def test_gold_ids_need_no_label():
    turn = replace(turn_of([WRONG] * 20, gold=(3, 7)), local=None, right=None)
    rows, _ = select([turn], label="gold_ids")
    assert [row.positive for row in rows] == ["p3", "p7"]


@pytest.mark.parametrize(
    ("label", "missing"),
    [("both", "local"), ("both", "right"), ("local", "local"), ("global", "right")],
)
def test_missing_signals_are_counted(label, missing):
    turn = replace(turn_of(padded((1, 90))), **{missing: None})
    assert select([turn], label=label) == ([], {"unreadable": 1})


def test_the_cap_does_not_change_the_siblings():
    (row,), _ = select([turn_of(padded(*[(1, 80)] * 5))], max_positives=1)
    assert len(row.siblings) == 5


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"data.labels.label='x': .*; data.labels.negatives='y'"):
        select([], label="x", negatives="y")
