"""Texts from files: plain lines, rows, splits, empty lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.tasks.base import Split
from datamodules.tasks.text_contexts import TextContexts
from run_tools.checks import check_node

WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def write(folder: Path, text: str, name: str = "texts.txt") -> str:
    path = folder / name
    path.write_bytes(text.encode())
    return str(path)


def test_plain_text_is_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "first one\r\n second, {x}\u2028 still \nfirst one\n")
    found = TextContexts(path=path, **WHOLE).contexts("train")
    assert [c.text for c in found] == ["first one", "second, {x}\u2028 still", "first one"]
    assert [c.where for c in found] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert len({c.uid for c in found}) == 3
    assert not any(c.slots or c.probes for c in found)
    other = write(tmp_path, "a\nb", "notes.md")
    assert len(TextContexts(path=other, format="txt", **WHOLE).contexts("train")) == 2


def test_rows_of_other_formats(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 7}, {"text": "two"}]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")
    found = TextContexts(path=path, **WHOLE).contexts("train")
    assert [(c.text, c.where) for c in found] == [("one", f"{path}:1"), ("two", f"{path}:2")]
    assert found[0].uid == "7"
    path = write(tmp_path, "body,n\nhello,1\n", "a.csv")
    task = TextContexts(path=path, columns={"text": "body"}, **WHOLE)
    assert [c.text for c in task.contexts("train")] == ["hello"]


def test_splits_go_by_the_text(tmp_path: Path) -> None:
    lines = [f"text number {i}" for i in range(400)]
    task = TextContexts(path=write(tmp_path, "\n".join(lines)))
    parts = {split: {c.text for c in task.contexts(split)} for split in SPLITS}
    assert set().union(*parts.values()) == set(lines)
    assert sum(map(len, parts.values())) == 400
    assert 20 < len(parts["val"]) < 60 and 50 < len(parts["test"]) < 110
    turned = TextContexts(path=write(tmp_path, "\n".join(lines[::-1]), "b.txt"))
    assert {c.text for c in turned.contexts("val")} == parts["val"]
    assert [c.text for c in task.contexts("predict")] == lines
    [one] = task.evaluations("test")
    assert (one.name, {c.text for c in one.contexts}) == ("text", parts["test"])
    assert task.read(one.contexts[0], "anything") == {}
    assert TextContexts(path=write(tmp_path, "x", "c.txt"), **WHOLE).evaluations("val") == []


def test_empty_lines_are_named_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "one\n\ntwo\n  \t\nthree\n")
    with pytest.raises(ValueError) as caught:
        TextContexts(path=path, **WHOLE).contexts("train")
    assert f"{path}:2: the line is empty" in str(caught.value)
    assert f"{path}:4: the line is empty" in str(caught.value)
    assert "data.task.on_bad_row=skip" in str(caught.value)
    task = TextContexts(path=path, on_bad_row="skip", **WHOLE)
    assert [c.text for c in task.contexts("train")] == ["one", "two", "three"]
    assert task.counts["main/rows"] == 5 and task.counts["main/skipped/empty_line"] == 2
    with pytest.warns(UserWarning, match="2 of 5 rows left out"):
        tolerant = TextContexts(path=path, max_bad_share=0.5, **WHOLE).contexts("train")
    assert len(tolerant) == 3
    path = write(tmp_path, '{"text": "a"}\n{"text": " "}\n', "a.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl:2: field 'text' is empty"):
        TextContexts(path=path, **WHOLE).contexts("train")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        TextContexts(path=str(tmp_path / "none.txt")).contexts("train")
    with pytest.raises(ValueError, match="the file is empty"):
        TextContexts(path=write(tmp_path, "\n \n")).contexts("train")
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"bad.txt:2: invalid UTF-8"):
        TextContexts(path=str(tmp_path / "bad.txt")).contexts("train")
    with pytest.raises(ValueError, match="data.split=x: .* is one plain text without splits"):
        TextContexts(path=write(tmp_path, "a"), split="x").contexts("train")
    with pytest.raises(ValueError, match="data.task.columns.txt: no such role"):
        TextContexts(path="x.txt", columns={"txt": "a"})
    with pytest.raises(ValueError, match="data.path is not set"):
        TextContexts(path="")


def test_options_are_checked_by_name() -> None:
    node = {"_target_": "datamodules.tasks.text_contexts.TextContexts", "path": "a.txt"}
    assert check_node("data.task", node) == []
    assert check_node("data.task", node | {"val_fractoin": 0.1})
