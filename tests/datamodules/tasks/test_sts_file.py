"""Scored pairs from files: the benchmark's layout, tables, splits, sets, bad rows."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.tasks.embedding import EvalSet, StsSet
from datamodules.tasks.sts_file import StsFile
from run_tools.checks import check_node

WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}
LINES = [
    'main-news\tMSR\t2012\t0001\t5.000\t"Yes" he said.\tHe said "yes',
    "main-news\tMSR\t2012\t0002\t1.25\tA dog.\tA cat.",
    "main-forums\tans\t2013\t0001\t4\tWhy?\tWhy, though?\thttp://a\thttp://b",
    "main-news\tMSR\t2012\t0001\t0\tUp.\tDown.",
]


def write(folder: Path, lines: list[str], name: str = "sts.tsv") -> str:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def rows(count: int, **more: Any) -> list[str]:
    made = ({"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i % 6} for i in range(count))
    return [json.dumps(row | more) for row in made]


def sts(one: EvalSet) -> StsSet:
    assert isinstance(one, StsSet)
    return one


@pytest.mark.parametrize("name", ["sts.tsv", "sts-dev.csv", "sts.txt"])
def test_the_layout_of_the_benchmark_is_known_by_its_lines(tmp_path: Path, name: str) -> None:
    task = StsFile(path=write(tmp_path, LINES, name), **WHOLE, instruction="Same meaning?")
    news, forums = task.pairs("train")
    assert (news.name, news.kind, news.in_batch) == ("sts_main_news", "sts", True)
    assert (forums.name, forums.instruction) == ("sts_main_forums", "Same meaning?")
    [row] = news.rows
    assert (row.query, row.positive, row.negatives) == ('"Yes" he said.', 'He said "yes', ())
    assert (row.uid, row.where) == ("main-news/MSR/2012/0001", f"{tmp_path / name}:1")
    assert [(row.query, row.positive) for row in forums.rows] == [("Why?", "Why, though?")]
    with pytest.warns(UserWarning, match="sts_main_forums: it has 1 rows"):
        whole, genre = map(sts, task.evaluations("train"))
    assert (whole.name, whole.instruction) == ("sts", "Same meaning?")
    assert list(whole.scores) == [5.0, 1.25, 4.0, 0.0]
    assert list(whole.second) == ['He said "yes', "A cat.", "Why, though?", "Down."]
    assert (genre.name, list(genre.first)) == ("sts_main_news", ['"Yes" he said.', "A dog.", "Up."])
    assert task.file.records("train")[3].uid == "main-news/MSR/2012/0001#2"
    assert task.counts["main/rows"] == task.counts["main/records"] == 4
    assert task.counts["main/skipped"] == 0


def test_tables_with_a_header(tmp_path: Path) -> None:
    cells = ["sentence1\tscore\tsentence2", 'A "b"\t4.5\tB', '"a\t\tc"\t3\tC', '"D"\t0\td']
    task = StsFile(path=write(tmp_path, cells), **WHOLE)
    [one] = task.evaluations("train")
    assert list(sts(one).first) == ['A "b"', "a\t\tc", "D"] and one.name == "sts"
    [pairs] = task.pairs("train")
    assert pairs.name == "sts" and [row.positive for row in pairs.rows] == ["B"]
    path = write(tmp_path, ["a,b,y", "x,y,0.5", "u,v,0.9", "p,q,1"], "t.csv")
    columns = {"sentence1": "a", "sentence2": "b", "score": "y"}
    table = StsFile(path=path, columns=columns, max_score=1, positive_from=0.9, **WHOLE)
    assert [row.query for row in table.pairs("train")[0].rows] == ["u", "p"]
    with pytest.raises(ValueError, match="data.task.columns.sentence1='z' is no column"):
        StsFile(path=path, columns={"sentence1": "z"}).pairs("train")


def test_quotes_of_glue(tmp_path: Path) -> None:
    lines = ["index\tgenre\tsentence1\tsentence2\tscore", '1\tnews\t"No" he said\tNo.\t4.4']
    lines += ['2\tnews\t"Go\tGo.\t5', "3\tnews\tStay\tGo\t1"]
    path = write(tmp_path, lines)
    with pytest.raises(ValueError, match="set data.task.literal_quotes=true"):
        StsFile(path=path, **WHOLE).pairs("train")
    task = StsFile(path=path, literal_quotes=True, **WHOLE)
    [one] = task.pairs("train")
    assert [row.query for row in one.rows] == ['"No" he said', '"Go']
    assert one.rows[1].where == f"{path}:3"
    path = write(tmp_path, [*lines, "4\tnews\ta\tb\t3\tstray"])
    with pytest.raises(ValueError, match=r"sts.tsv:5: 6 cells between tabs where 5 are needed"):
        StsFile(path=path, literal_quotes=True, **WHOLE).pairs("train")


@pytest.mark.parametrize(
    ("line", "reason", "wanted"),
    [
        ("g\tf\ty\ti\t3\tonly one", "bad_cells", ":2: 6 cells between tabs where 7 are needed"),
        ("g\tf\ty\ti\t3\ta\t  ", "empty_text", ":2: field 'sentence2' is empty"),
        ("g\tf\ty\ti\tx\ta\tb", "bad_score", ":2: field 'score' is 'x'; a number from 0 to 5.0"),
        ("g\tf\ty\ti\tnan\ta\tb", "bad_score", ":2: field 'score' is 'nan'"),
        ("g\tf\ty\ti\t5.01\ta\tb", "bad_score", "'5.01'; a number from 0 to 5.0 (data.task.max_sc"),
        ("g\tf\ty\ti\t-1\ta\tb", "bad_score", ":2: field 'score' is '-1'"),
        ("g\tf\ty\ti\t\ta\tb", "bad_score", ":2: field 'score' is ''"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, reason: str, wanted: str) -> None:
    path = write(tmp_path, [LINES[0], line, *LINES[1:]])
    with pytest.raises(ValueError) as error:
        StsFile(path=path, **WHOLE).evaluations("train")
    assert wanted in str(error.value)
    assert f"{path}:2" in str(error.value) and "1 bad row" in str(error.value)
    task = StsFile(path=path, on_bad_row="skip", **WHOLE)
    assert len(task.file.records("train")) == 4
    assert task.counts["main/skipped"] == task.counts[f"main/skipped/{reason}"] == 1
    with pytest.warns(UserWarning, match="1 of 5 rows left out"):
        StsFile(path=path, max_bad_share=0.2, **WHOLE).pairs("train")


def test_bytes_of_files_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "sts.csv"
    lines = [line.encode() for line in LINES]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines[:2], b"", lines[3], b"g\t\xff", b""]))
    task = StsFile(path=str(path), on_bad_row="skip", **WHOLE)
    assert task.pairs("train")[0].name == "sts_main_news"
    found = [(record.second, record.where) for record in task.file.records("train")]
    assert found == [
        ('He said "yes', f"{path}:1"), ("A cat.", f"{path}:2"), ("Down.", f"{path}:4"),
    ]  # fmt: skip
    assert task.counts["main/skipped/bad_utf8"] == 1
    path.write_text("genre\tsentence1\tsentence2\tscore\n")
    with pytest.raises(ValueError, match="the file is empty"):
        StsFile(path=str(path), format="tsv", literal_quotes=True).pairs("train")


@pytest.mark.parametrize("score", [True, "high", None, [3], 1e999, 6])
def test_bad_scores_of_tables_are_named(tmp_path: Path, score: Any) -> None:
    text = json.dumps({"sentence1": "a", "sentence2": "b", "score": score})
    path = write(tmp_path, [*rows(4), text], "a.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl:5: field 'score' is"):
        StsFile(path=path, **WHOLE).pairs("train")


def test_splits_go_by_the_sentences_in_either_order(tmp_path: Path) -> None:
    lines = rows(400)
    swapped = [{"sentence1": f"b {i}", "sentence2": f"a {i}", "score": 4} for i in range(400)]
    path = write(tmp_path, [*lines, *map(json.dumps, swapped)], "a.jsonl")
    task = StsFile(path=path, val_fraction=0.25, test_fraction=0.25)
    found = {}
    for split in ("train", "val", "test"):
        [one] = map(sts, task.evaluations(split))  # type: ignore[arg-type]
        keys = Counter(map(frozenset, zip(one.first, one.second, strict=True)))
        assert set(keys.values()) == {2}
        found[split] = set(keys)
    sizes = {split: len(keys) / 400 for split, keys in found.items()}
    assert sizes == pytest.approx({"train": 0.5, "val": 0.25, "test": 0.25}, abs=0.09)
    assert len(set.union(*found.values())) == 400
    own = write(tmp_path, LINES)
    apart = StsFile(path=path, test_path=own, val_fraction=0.25)
    assert len(apart.file.records("test")) == 4 and len(apart.file.records("train")) > 500


def test_a_split_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    few = write(tmp_path, rows(2), "few.jsonl")
    with pytest.raises(ValueError, match="the split train has 2 rows, 3 are needed"):
        StsFile(path=few, **WHOLE).evaluations("train")
    with pytest.raises(ValueError, match=r"the split val has 0 rows.*data.task.val_fraction or _p"):
        StsFile(path=few, val_fraction=1e-9, test_fraction=0).evaluations("val")
    assert StsFile(path=few, **WHOLE).evaluations("val") == [], "nothing was asked for"
    flat = write(tmp_path, rows(9, score=2), "flat.jsonl")
    with pytest.raises(ValueError, match=r"has 9 equal scores of 2.0, so there is no rank"):
        StsFile(path=flat, **WHOLE).evaluations("train")
    with pytest.raises(ValueError, match=r"none of 9 pairs .* data.task.positive_from=4.0"):
        StsFile(path=flat, **WHOLE).pairs("train")
    assert StsFile(path=flat, val_fraction=0, test_fraction=1).pairs("train") == []


def test_rows_without_genre_beside_others(tmp_path: Path) -> None:
    lines = [*rows(6), *rows(6, genre="x/y"), *rows(6, genre=" ")]
    task = StsFile(path=write(tmp_path, lines, "a.jsonl"), **WHOLE)
    sizes = {one.name: len(sts(one).first) for one in task.evaluations("train")}
    assert sizes == {"sts": 18, "sts_other": 12, "sts_x_y": 6}
    assert {one.name: len(one.rows) for one in task.pairs("train")} == {
        "sts_other": 4, "sts_x_y": 2,
    }  # fmt: skip


def test_prediction_needs_no_scores(tmp_path: Path) -> None:
    plain = [json.dumps({"sentence1": f"a{i}", "sentence2": "b"}) for i in range(5)]
    task = StsFile(path=write(tmp_path, plain, "a.jsonl"))
    [one] = task.pairs("predict")
    assert [row.query for row in one.rows] == [f"a{i}" for i in range(5)]
    [unknown] = map(sts, task.evaluations("predict"))
    assert list(unknown.first) == [f"a{i}" for i in range(5)]
    assert all(math.isnan(score) for score in unknown.scores) and len(unknown.scores) == 5
    with pytest.raises(ValueError, match="no column score"):
        task.pairs("train")
    scored = StsFile(path=write(tmp_path, rows(7), "b.jsonl"))
    [measured] = map(sts, scored.evaluations("predict"))
    assert list(measured.scores) == [0, 1, 2, 3, 4, 5, 0]
    assert len(scored.pairs("predict")[0].rows) == 7


def test_wrong_options_are_named_together() -> None:
    with pytest.raises(ValueError) as error:
        StsFile(path="", positive_from=7, columns={"sentence3": "a"}, on_bad_row="x")  # type: ignore[arg-type]
    for wanted in (
        "data.task.positive_from=7: a score from 0 to data.task.max_score=5.0",
        "data.task.columns.sentence3: no such role",
        "data.task.on_bad_row='x': allowed are error, skip",
        "data.path is not set",
    ):
        assert wanted in str(error.value)
    with pytest.raises(ValueError, match="data.task.max_score=-1"):
        StsFile(path="a.tsv", max_score=-1)
    with pytest.raises(ValueError, match="there is no such file"):
        StsFile(path=str(Path(__file__).with_name("sts.tsv"))).pairs("train")


def test_options_are_checked_by_name_and_type() -> None:
    node = {"_target_": "datamodules.tasks.sts_file.StsFile", "path": "a", "val_split": "v"}
    assert check_node("data.task", node | {"max_score": 1, "seed": 3}) == []
    [wrong] = check_node("data.task", node | {"positiv_from": 3.0})
    assert "data.task.positiv_from" in wrong and "'positive_from'" in wrong


def test_the_real_file(shared_data: Path) -> None:
    task = StsFile(path=str(shared_data / "stsb_dev.tsv"), **WHOLE)
    sizes = {one.name: len(sts(one).scores) for one in task.evaluations("train")}
    assert sizes == {
        "sts": 1500, "sts_main_captions": 625, "sts_main_forums": 375, "sts_main_news": 500,
    }  # fmt: skip
    assert task.counts["main/skipped"] == 0
    assert sum(len(one.rows) for one in task.pairs("train")) == 264
    texts = {str(row.query) for one in task.pairs("train") for row in one.rows}
    assert any(text.startswith('"') for text in texts), "quotes are part of the text"
    parts = StsFile(path=str(shared_data / "stsb_dev.tsv"))
    assert sum(len(parts.file.records(split)) for split in ("train", "val", "test")) == 1500
    assert len(parts.evaluations("val")) == 4
