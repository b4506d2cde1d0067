"""The file of finished labels: equal when read back, whole after a kill, refused when stale."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from datamodules.labelling.store import NAME, Finished, LabelStore
from tests.datamodules.labelling.small_world import turn_of

MADE_BY = {"agent": "a", "retriever": "r", "bounds": (1, 2)}


def finished(name: str) -> Finished:
    turns = [turn_of([(1, 90), (0, 5)], uid=name, turn=turn) for turn in (0, 1)]
    odd = replace(turns[0], local=None, right=None, query='a "quoted"\u2028 line \ud800')
    return Finished(name, (odd, turns[1]), Counter(searches=2, right=0))


ITEMS = [finished(name) for name in ("one", "two", "three")]


def test_what_is_read_equals_what_was_written(tmp_path):
    store = LabelStore(tmp_path, MADE_BY)
    store.append(ITEMS[:2])
    store.append(ITEMS[2:])
    again = LabelStore(tmp_path, MADE_BY)
    assert list(again.finished.values()) == ITEMS == list(store.finished.values())


def test_every_place_of_a_kill_is_recovered(tmp_path):
    LabelStore(tmp_path / "whole", MADE_BY).append(ITEMS)
    whole = (tmp_path / "whole" / NAME).read_bytes()
    for cut in [0, 5, *range(100, len(whole), 97), len(whole) - 1]:
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / NAME).write_bytes(whole[:cut])
        store = LabelStore(folder, MADE_BY)
        assert list(store.finished.values()) == ITEMS[: max(0, whole[:cut].count(b"\n") - 1)]
        store.append([item for item in ITEMS if item.question not in store.finished])
        assert (folder / NAME).read_bytes() == whole


def test_labels_of_others_are_refused(tmp_path):
    LabelStore(tmp_path, MADE_BY)
    with pytest.raises(ValueError, match="made by others .*retriever='r', now 'new'.* stale"):
        LabelStore(tmp_path, {**MADE_BY, "retriever": "new"})
    with pytest.raises(ValueError, match="extra=None, now 1"):
        LabelStore(tmp_path, {**MADE_BY, "extra": 1})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: ["{}", *lines[1:]], ":1: field 'made_by' is missing"),
        (lambda lines: ["[]", *lines[1:]], ":1: field 'made_by' is missing"),
        (lambda lines: [lines[0], "{", lines[2]], ":2: does not parse as JSON"),
        (lambda lines: [*lines, lines[1]], ":5: field 'question': 'one' is there twice"),
        (lambda lines: [lines[0], '{"question": "x"}'], ":2: no labelled question"),
    ],
)
def test_damaged_lines_are_named(tmp_path, damage, message):
    LabelStore(tmp_path, MADE_BY).append(ITEMS)
    path = tmp_path / NAME
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(ValueError) as caught:
        LabelStore(tmp_path, MADE_BY)
    assert f"{path}{message}" in str(caught.value)


@pytest.mark.parametrize("change", [{"right": [1]}, {"gold": None}, {"other": 1}])
def test_turns_that_do_not_fit_are_named(tmp_path, change):
    LabelStore(tmp_path, MADE_BY).append(ITEMS[:1])
    path = tmp_path / NAME
    header, line = path.read_text().splitlines()
    values = json.loads(line)
    values["turns"][1] |= change
    path.write_text(f"{header}\n{json.dumps(values)}\n")
    with pytest.raises(ValueError, match=":2: no labelled question"):
        LabelStore(tmp_path, MADE_BY)


def test_a_question_is_written_once(tmp_path):
    store = LabelStore(tmp_path, MADE_BY)
    store.append(ITEMS[:1])
    with pytest.raises(ValueError, match="'one' is there already"):
        store.append(ITEMS[:1])
