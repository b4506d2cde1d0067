"""Options of labelling: what is refused, and what a folder of labels depends on."""

from __future__ import annotations

import pytest

from datamodules.labelling.options import LabelOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": "all"}, "data.labels.label='all': allowed are both, local, global, gold_ids"),
        ({"negatives": "hard"}, "data.labels.negatives='hard': allowed are random"),
        ({"pos_threshold": 0.6}, "data.labels.pos_threshold=0.6 must be a whole number"),
        ({"pos_threshold": 101}, "data.labels.pos_threshold=101 must be in 0 to 100"),
        ({"candidates": 1}, "data.labels.candidates=1 must be at least 2"),
        ({"judge_chunk": 0}, "data.labels.judge_chunk=0 must be at least 1"),
        ({"use_subanswers": "yes"}, "data.labels.use_subanswers='yes' must be true or false"),
        ({"temperature": -1}, "data.labels.temperature=-1 must be 0 or more"),
        (
            {"candidates": 15},
            "data.labels.num_negatives=15 must be below data.labels.candidates=15",
        ),
        ({"label": "local", "negatives": "gac0_only"}, "'gac0_only' needs continued rollouts"),
        ({"samples": 2}, "data.labels.samples=2 needs data.labels.temperature above 0"),
        ({"seed": True}, "data.labels.seed=True must be a whole number"),
        ({"candidate": 5}, "unknown key 'data.labels.candidate'; did you mean 'candidates'"),
    ],
)
def test_wrong_options_are_named(values, message):
    with pytest.raises(ValueError) as caught:
        LabelOptions.read(values)
    assert message in str(caught.value)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError, match="judge_chunk=0 .*; data.labels.batch_size=0"):
        LabelOptions(judge_chunk=0, batch_size=0)


def test_in_batch_only_needs_no_candidates_to_spare():
    assert LabelOptions(candidates=10, negatives="in_batch_only").num_negatives == 15


def test_selection_is_no_part_of_what_made_the_labels():
    labels = LabelOptions().material()
    chosen = LabelOptions(pos_threshold=80, max_positives=1, num_negatives=5, negatives="top")
    assert chosen.material() == labels
    assert LabelOptions(chunk_questions=1, batch_size=1).material() == labels
    for other in ({"candidates": 30}, {"judge_chunk": 5}, {"use_subanswers": False}, {"seed": 1}):
        assert LabelOptions(**other).material() != labels
    assert LabelOptions(label="local").material() != labels
    apart = [LabelOptions(label="global", judge_chunk=size).material() for size in (5, 10)]
    assert apart[0] == apart[1]  # no judge is asked
