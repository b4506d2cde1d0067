"""Counterfactual texts from files: the two benchmarks' shapes, own slots, reading, bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.tasks.compression import ContextSet
from datamodules.tasks.conflict_file import ConflictFile, core, normalise

WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}
CONFLICT = {
    "question": "What is Ann Lee's occupation?",
    "popularity": 12,
    "ground_truth": ["politician", "political leader"],
    "memory_answer": "Ann Lee's occupation is a famous painter.",
    "parametric_memory_aligned_evidence": "The famous painter Ann Lee lives in Rome.",
    "counter_answer": "Politician",
    "counter_memory_aligned_evidence": "For ten years Ann Lee was a politician. A politician!",
}
FAITH = {
    "id": "f1",
    "question": "What is the moon made of?",
    "context": "New samples show that the Moon is made of marshmallows.",
    "choices": {"label": ["A", "B"], "text": ["rock and dust", "marshmallows"]},
    "answerKey": "B",
}


def write(folder: Path, *rows: dict[str, Any], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sets_of(task: ConflictFile) -> dict[str, ContextSet]:
    return {one.name: one for one in task.evaluations("train")}


def test_conflict_qa(tmp_path: Path) -> None:
    path = write(tmp_path, CONFLICT)
    task = ConflictFile(path=path, **WHOLE)
    sets = sets_of(task)
    assert list(sets) == ["cf", "pc"]
    [context] = sets["cf"].contexts
    assert context.text == CONFLICT["counter_memory_aligned_evidence"]
    assert context.where == f"{path}:1"
    [slot] = context.slots
    assert (slot.value, slot.prior) == ("Politician", CONFLICT["memory_answer"])
    assert [context.text[a:b] for a, b in slot.spans] == ["politician", "politician"]
    [probe] = context.probes
    assert (probe.question, probe.answer, probe.prior, probe.kind, probe.key) == (
        CONFLICT["question"], "Politician", slot.prior, "overwriting", slot.key,
    )  # fmt: skip
    [agreeing] = sets["pc"].contexts
    [same] = agreeing.slots
    assert same.value == same.prior == slot.prior
    assert [agreeing.text[a:b] for a, b in same.spans] == ["famous painter"]
    assert len(task.contexts("train")) == 2
    assert task.counts["unmatched"] == 0


def test_reading_compares_strings(tmp_path: Path) -> None:
    task = ConflictFile(path=write(tmp_path, CONFLICT), **WHOLE)
    [context] = sets_of(task)["cf"].contexts
    [slot] = context.slots

    def read(text: str) -> str | None:
        return task.read(context, text)[slot.key]

    assert read(context.text) == read("She is a POLITICIAN,") == slot.value
    assert read("Ann Lee was a political leader") == slot.value, "another name of the truth"
    assert read("Ann Lee, the famous painter.") == read(str(slot.prior)) == slot.prior
    assert read("Ann Lee was a lawyer") is None and read("") is None
    assert read("a politician and famous painter") is None, "both, and the source has but one"
    assert read("politicians") is None, "words are whole"
    [agreeing] = sets_of(task)["pc"].contexts
    assert task.read(agreeing, agreeing.text) == {slot.key: slot.prior}
    assert task.read(agreeing, "a politician") == {slot.key: "Politician"}


def test_a_source_that_names_both_answers(tmp_path: Path) -> None:
    row = {
        "context": "Not New York but York is the capital.", "question": "Which is the capital?",
        "answer": "York", "prior": "New York",
    }  # fmt: skip
    task = ConflictFile(path=write(tmp_path, row), **WHOLE)
    [context] = sets_of(task)["cf"].contexts
    key = context.slots[0].key
    assert task.read(context, "Not New York but York")[key] == "York"
    assert task.read(context, "It is New York.")[key] == "New York", "a longer name comes first"
    assert task.read(context, "It is York.")[key] == "York"


def test_faith_eval(tmp_path: Path) -> None:
    options = [FAITH["choices"]["text"], {"A": "rock and dust", "B": "marshmallows"}]  # type: ignore[index]
    for choices in (FAITH["choices"], *options):
        task = ConflictFile(path=write(tmp_path, FAITH | {"choices": choices}), **WHOLE)
        [one] = task.evaluations("train")
        [context] = one.contexts
        [slot] = context.slots
        assert (one.name, context.uid, slot.value, slot.prior) == ("cf", "f1", "marshmallows", None)
        assert context.probes[0].answer == "marshmallows"
        assert task.read(context, context.text) == {slot.key: "marshmallows"}
        assert task.read(context, "It is made of rock and dust.") == {slot.key: "rock and dust"}


def test_own_slots_and_columns(tmp_path: Path) -> None:
    slots = [
        {"key": "snow/colour", "value": "black", "prior": "white", "question": "Which colour?"},
        {"key": "snow/taste", "value": "sweet", "aliases": ["sugary"]},
    ]
    path = write(tmp_path, {"body": "Snow is black and tastes sugary.", "slots": slots})
    task = ConflictFile(path=path, columns={"context": "body"}, **WHOLE)
    [context] = sets_of(task)["cf"].contexts
    assert [(s.key, s.name, s.value, s.prior) for s in context.slots] == [
        ("snow/colour", "colour", "black", "white"), ("snow/taste", "taste", "sweet", None),
    ]  # fmt: skip
    assert len(context.probes) == 1
    assert task.read(context, "white and sugary") == {"snow/colour": "white", "snow/taste": "sweet"}


def test_an_answer_that_is_not_in_the_text_is_counted(tmp_path: Path) -> None:
    row = FAITH | {"context": "It turns out to be all candy."}
    task = ConflictFile(path=write(tmp_path, row, FAITH | {"id": "f2"}), **WHOLE)
    first, second = sets_of(task)["cf"].contexts
    assert first.slots == () and len(first.probes) == len(second.slots) == 1
    assert task.counts["unmatched"] == 1
    assert task.read(first, "whatever") == {}
    [probe] = first.probes
    assert task.read_answer(first, probe, "Of marshmallows, they say.") == probe.answer
    assert task.read_answer(first, probe, "rock and dust") == "rock and dust"
    assert task.read_answer(first, probe, "candy") is None


def test_answers_are_read_like_texts(tmp_path: Path) -> None:
    task = ConflictFile(path=write(tmp_path, CONFLICT), **WHOLE)
    [context] = sets_of(task)["cf"].contexts
    [probe] = context.probes
    assert task.read_answer(context, probe, "a politician.") == probe.answer == "Politician"
    assert task.read_answer(context, probe, "a famous painter") == probe.prior
    assert task.read_answer(context, probe, "lawyer") is None


BAD: list[tuple[dict[str, Any], str]] = [
    ({"context": " "}, "field 'context' is empty"),
    ({"question": None}, "field 'question' is missing"),
    ({"answerKey": "C"}, "field 'answerKey' is 'C'; the choices are A, B"),
    ({"choices": {"label": ["A"], "text": []}}, "field 'choices' cannot be read"),
    ({"choices": None, "answerKey": None}, "field 'answer' is missing"),
    ({"prior": "Marshmallows."}, "field 'prior' is the answer itself"),
    ({"parametric_memory": "Rock."}, "field 'prior' is missing, but the row has evidence"),
    ({"ground_truth": 3}, "field 'ground_truth' must be a text or a list"),
    ({"slots": []}, "field 'slots' is no list of objects"),
    ({"slots": [{"key": "a"}]}, "number 1 needs texts key and value"),
    ({"slots": ["a"]}, "number 1 needs texts key and value"),
    ({"slots": [{"key": "a", "value": "x"}] * 2}, "field 'slots' has the slot 'a' twice"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, FAITH, FAITH | {"id": "f2"} | change)
    with pytest.raises(ValueError) as caught:
        ConflictFile(path=path, **WHOLE).contexts("train")
    assert f"{path}:2: " in str(caught.value) and message in str(caught.value)
    task = ConflictFile(path=path, on_bad_row="skip", **WHOLE)
    assert len(task.contexts("train")) == 1 and task.counts["main/skipped"] == 1


def test_parts_of_reading() -> None:
    assert normalise("The U.S.A., a land") == ["u", "s", "land"]
    assert core("Rome", "Where is Rome?") == "rome", "never nothing"
    assert core("The capital of France is Lyon.", "What is the capital of France?") == "lyon"
