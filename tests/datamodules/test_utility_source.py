"""Scores in batches of pairs: cut, filled up, mined, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datamodules.tasks.embedding import PairRow
from datamodules.utility_source import UtilitySource
from tests.lightning_modules.agentic_parts import (
    TEXTS,
    SmallWorld,
    collated,
    data_of,
    folder_of,
    utility_rows,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer."""
    return folder_of(tmp_path_factory.mktemp("utility"))


def test_scores_follow_their_passages(folder: Path) -> None:
    rows = utility_rows()
    batch = collated(folder, rows)
    assert batch.scores.tolist() == [list(row.scores) for row in rows]
    assert batch.scores.shape == batch.text_ids.shape and batch.to("cpu").scores is not None
    cut = collated(folder, rows, num_negatives=2)
    assert cut.scores.tolist() == [list(row.scores[:3]) for row in rows]
    short = [replace(rows[0], negatives=rows[0].negatives[:1], scores=(90, 20)), rows[1]]
    assert collated(folder, short).scores.tolist() == [[90, 20, -1, -1], list(rows[1].scores)]
    assert batch.state()["scores"] == batch.scores.tolist()


def test_plain_rows_have_unknown_scores(folder: Path) -> None:
    rows = utility_rows()
    plain: Any = [PairRow("p", "city", TEXTS["baker"], (TEXTS["tour"],)), rows[0]]
    assert collated(folder, plain).scores.tolist() == [[-1] * 4, list(rows[0].scores)]


def test_mined_negatives_have_their_own_scores_or_none(folder: Path) -> None:
    data = data_of(folder)
    items, _ = data.passages_of(data.training_sets()[0])
    own = data.training_sets()[0].rows[0]
    chosen = [items.index(own.negatives[2]), items.index(TEXTS["tour"])]
    data.mined = {"utility": [chosen] * 8}
    batch = UtilitySource(data).batch(0, 0)
    row = batch.uids.index("0")
    assert batch.scores[row].tolist() == [90, own.scores[3], -1]


@pytest.mark.parametrize(
    ("scores", "message"),
    [((90, 20), "f:3: scores has 2 entries for 4 passages"), ((90, 101, 0, 0), "holds 101")],
)
def test_wrong_scores_are_refused(folder: Path, scores: Any, message: str) -> None:
    rows = [replace(row, scores=scores, where="f:3") for row in utility_rows()]
    with pytest.raises(ValueError, match=message):
        UtilitySource(data_of(folder, SmallWorld(rows=rows)))
