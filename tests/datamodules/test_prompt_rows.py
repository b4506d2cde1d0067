"""Prompt files: splits, identities, columns and bad rows, whatever the task makes of a row."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from datamodules.prompt_rows import Fields, PromptFile, Role

ROLES = {
    "question": Role(("question", "prompt")),
    "answer": Role(("answer",), is_label=True),
    "note": Role(("note",), is_required=False),
}
Kept = tuple[str, str, str]


def make(fields: Fields) -> Kept:
    if fields.is_scored:
        fields.text("answer", numbers=True)
    note = fields.text("note") if fields.has("note") else ""
    if note == "odd":
        raise fields.bad("note", "odd_note", "is odd; even ones are needed")
    return fields.uid, fields.text("question"), note


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": i} for i in range(start, start + count)]


def read(path: str, **options: Any) -> PromptFile[Kept]:
    return PromptFile(path, roles=ROLES, make_record=make, **options)


def questions(file: PromptFile[Kept], split: Any) -> list[str]:
    return [question for _, question, _ in file.records(split)]


def test_split_depends_on_the_question_alone(tmp_path: Path) -> None:
    rows = rows_of(200)
    file = read(write(tmp_path / "a.jsonl", rows))
    shuffled = read(write(tmp_path / "b.jsonl", rows[::-1] + rows_of(5)))
    for split, low, high in (("train", 110, 170), ("val", 8, 35), ("test", 22, 60)):
        found = questions(file, split)
        assert low < len(found) < high
        assert found == sorted(found, key=lambda q: int(q[1:]))
        assert set(questions(shuffled, split)) == set(found)
        assert file.counts[split] == len(found)
    assert questions(file, "predict") == [row["question"] for row in rows]
    other = read(str(tmp_path / "a.jsonl"), seed=1)
    assert set(questions(other, "test")) != set(questions(file, "test"))
    bare = read(str(tmp_path / "a.jsonl"), val_fraction=0, test_fraction=0)
    assert len(questions(bare, "train")) == 200 and not questions(bare, "test")


def test_identities(tmp_path: Path) -> None:
    rows = [{"id": name, "question": f"q{i}", "answer": 1} for i, name in enumerate(["a", "a", 7])]
    rows += [{"question": "same", "answer": 1}, {"question": "same", "answer": 1}, *rows_of(2)]
    path = write(tmp_path / "a.jsonl", rows)
    uids = [uid for uid, _, _ in read(path).records("predict")]
    assert uids[:3] == ["a", "a#2", "7"] and uids[4] == f"{uids[3]}#2"
    assert len(set(uids)) == 7 and len(uids[5]) == 16
    both = read(path, test_path=path, val_fraction=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [uid for split in ("train", "test") for uid, _, _ in both.records(split)]  # type: ignore[arg-type]
    assert len(set(found)) == 14


def test_files_of_their_own(tmp_path: Path) -> None:
    main = write(tmp_path / "a.jsonl", rows_of(20))
    val = write(tmp_path / "v.jsonl", rows_of(4, 100))
    test = write(tmp_path / "t.jsonl", rows_of(3, 18))
    file = read(main, val_path=val, test_path=test, val_fraction=0.9, test_fraction=0.9)
    with pytest.warns(UserWarning, match="t.jsonl: 2 of its rows are also trained on"):
        assert len(file.records("train")) == 20
    assert questions(file, "val") == ["q100", "q101", "q102", "q103"]
    assert questions(file, "test") == ["q18", "q19", "q20"]
    assert file.counts["overlap"] == 2 and file.counts["test/rows"] == 3


def test_key_decides_the_side(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows_of(100))
    file = read(path, key_of=lambda record: record[1][-1])
    digits = [{question[-1] for question in questions(file, split)} for split in ("train", "test")]
    assert digits[0] and digits[1] and not digits[0] & digits[1]


def test_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"query": "hm", "answer": 1, "extra": {"x": 1}}] * 2)
    assert questions(read(path, columns={"question": "query"}), "predict") == ["hm", "hm"]
    with pytest.raises(ValueError, match="set data.task.columns.question=<column>"):
        read(path).records("train")
    with pytest.raises(ValueError, match=r"data.task.columns.question='quary'.*'query'"):
        read(path, columns={"question": "quary"}).records("train")
    with pytest.raises(ValueError, match=r"data.task.columns.note='nope' is no column"):
        read(path, columns={"question": "query", "note": "nope"}).records("train")


def test_labels_are_only_needed_where_scored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "a"}, {"question": "b"}])
    assert questions(read(path), "predict") == ["a", "b"]
    with pytest.raises(ValueError, match="no column answer"):
        read(path).records("train")
    half = write(tmp_path / "b.jsonl", [{"question": "a", "answer": 1}, {"question": "b"}])
    assert questions(read(half), "predict") == ["a", "b"]
    with pytest.raises(ValueError, match="b.jsonl:2: field 'answer' is missing"):
        read(half).records("train")


def test_bad_rows(tmp_path: Path) -> None:
    bad = [
        {"question": "", "answer": 1},
        {"question": ["x"], "answer": 1},
        {"question": "x", "answer": None},
        {"question": "x", "answer": 1, "note": "odd"},
        {"question": "\ud800", "answer": 1},
        [1],
    ]
    path = write(tmp_path / "a.jsonl", rows_of(4) + bad)
    with pytest.raises(ValueError) as caught:
        read(path).records("train")
    message = str(caught.value)
    assert "6 bad rows" in message and "and 1 more" in message and "on_bad_row=skip" in message
    assert "a.jsonl:8: field 'note' is odd" in message
    file = read(path, on_bad_row="skip", val_fraction=0, test_fraction=0)
    assert questions(file, "train") == ["q0", "q1", "q2", "q3"]
    reasons = {name: value for name, value in file.counts.items() if "/skipped/" in name}
    assert reasons == {
        f"main/skipped/{reason}": 1
        for reason in (
            "empty_text", "not_text", "missing_field", "odd_note", "bad_text", "not_an_object",
        )
    }  # fmt: skip
    assert (file.counts["main/rows"], file.counts["main/skipped"]) == (10, 6)
    with pytest.warns(UserWarning, match="6 of 10 rows left out"):
        assert len(read(path, max_bad_share=0.6).records("train")) <= 4
    with pytest.raises(ValueError, match="6 bad rows"):
        read(path, max_bad_share=0.59).records("train")


def test_nothing_usable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "", "answer": 1}])
    with pytest.raises(ValueError, match="there is no usable row"):
        read(path, on_bad_row="skip").records("train")
    (tmp_path / "b.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=r"b.jsonl:1: does not parse as JSON"):
        read(str(tmp_path / "b.jsonl"), on_bad_row="skip").records("train")
    with pytest.raises(ValueError, match="there is no such file; did you mean 'a.jsonl'"):
        read(str(tmp_path / "aa.jsonl")).records("train")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"columns": {"answers": "a"}}, "data.task.columns.answers: no such role.*'answer'"),
        ({"val_fraction": -0.1}, "data.task.val_fraction=-0.1"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, "together 1 at most"),
        ({"on_bad_row": "drop"}, "data.task.on_bad_row='drop'"),
        ({"max_bad_share": 2}, "data.task.max_bad_share=2"),
    ],
)
def test_bad_options(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        read("a.jsonl", **options)


def test_other_formats(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("question\tanswer\nq0\t0\nq1\t1\n")
    (tmp_path / "a.json").write_text(json.dumps(rows_of(2)))
    for name in ("a.tsv", "a.json"):
        assert questions(read(str(tmp_path / name)), "predict") == ["q0", "q1"]
