"""Corpus files: what is read, and how bad rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.passages import Corpus, Passage, read_passages


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_rows_become_passages_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "wiki.jsonl",
        {"id": "b", "title": "Ada", "text": " born in London "},
        {"id": 7, "text": "no title"},
        {"id": "c", "title": None, "text": "null title"},
        {"_id": "beir", "title": "", "text": "of BEIR"},
        {"id": "dump", "contents": '"Alan Turing"\nA mathematician.\nAnd more.'},
        {"id": "line", "contents": "one line only"},
    )
    corpus = read_passages(path)
    assert corpus.name == "wiki.jsonl"
    assert [(one.uid, one.title, one.text) for one in corpus] == [
        ("b", "Ada", "born in London"),
        ("7", "", "no title"),
        ("c", "", "null title"),
        ("beir", "", "of BEIR"),
        ("dump", "Alan Turing", "A mathematician.\nAnd more."),
        ("line", "", "one line only"),
    ]
    assert corpus.places["7"] == 1
    assert corpus[1].where == f"{path}:2"
    assert [one.encoded_text for one in corpus][:2] == ["Ada born in London", "no title"]


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"text": "x"}, "'id'", "is missing"),
        ({"id": " ", "text": "x"}, "'id'", "is ' '"),
        ({"id": True, "text": "x"}, "'id'", "is True"),
        ({"id": 1.5, "text": "x"}, "'id'", "is 1.5"),
        ({"id": "x"}, "'text'", "is missing"),
        ({"id": "x", "text": "  "}, "'text'", "not empty"),
        ({"id": "x", "text": ["a"]}, "'text'", "is ['a']"),
        ({"id": "x", "contents": ""}, "'contents'", "not empty"),
        ({"id": "x", "text": "x", "title": 3}, "'title'", "is 3"),
        ({"id": "first", "text": "again"}, "id 'first'", "passages.jsonl:1 already"),
        (["x"], "JSON object", "list"),
    ],
)
def test_a_bad_row_is_named(row: Any, field: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "passages.jsonl", {"id": "first", "text": "good"}, row)
    with pytest.raises(ValueError, match="1 bad row") as raised:
        read_passages(path)
    line = str(raised.value).splitlines()[1]
    assert line.strip().startswith(f"{path}:2: ")
    assert field in line and says in line


def test_many_bad_rows_are_named_at_once_and_no_file_is_refused(tmp_path: Path) -> None:
    rows = [{"id": f"p{i}", "text": ""} for i in range(8)]
    with pytest.raises(ValueError, match=r"8 bad rows(.|\n)*and 3 more"):
        read_passages(write(tmp_path / "many.jsonl", *rows))
    path = tmp_path / "broken.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n{"id": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken.jsonl:2: does not parse"):
        read_passages(path)
    with pytest.raises(ValueError, match="no such file"):
        read_passages(tmp_path / "none.jsonl")
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="empty"):
        read_passages(path)


def test_lone_surrogates_are_made_readable(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"id": "a", "text": "x \\ud800 y"}\n', encoding="utf-8")
    (one,) = read_passages(path)
    assert one.text.encode() == b"x \\ud800 y"


def test_a_corpus_refuses_what_a_file_would() -> None:
    good = Passage("a", "", "text")
    with pytest.raises(ValueError, match="no passages"):
        Corpus([])
    with pytest.raises(ValueError, match=r"here:1: 1 passages have no text.*'b'"):
        Corpus([good, Passage("b", "title", " ", "here:1")])
    with pytest.raises(ValueError, match=r"there:2: .*'a'"):
        Corpus([good, Passage("a", "", "other", "there:2")])


@pytest.mark.parametrize("other", [("b", "", "t"), ("a", "x", "t"), ("a", "", "u")])
def test_the_digest_sees_every_field_and_the_order(other: tuple[str, str, str]) -> None:
    one, last = Passage("a", "", "t", "here:1"), Passage("z", "", "z")
    digest = Corpus([one, last]).digest
    assert digest == Corpus([Passage("a", "", "t", "there:9"), last]).digest
    assert digest != Corpus([Passage(*other), last]).digest
    assert digest != Corpus([last, one]).digest
