"""Contrastive pairs from files: shapes of rows, splits, corpora, bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.tasks.base import Split
from datamodules.tasks.embedding import EvalSet, RetrievalSet
from datamodules.tasks.pair_file import MAX_DATASETS, PairFile
from run_tools.checks import check_node

WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def write(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def retrieval(one: EvalSet) -> RetrievalSet:
    assert isinstance(one, RetrievalSet)
    return one


def answers(one: EvalSet) -> dict[Any, set[Any]]:
    found = retrieval(one)
    texts = [{found.corpus[place] for place in places} for places in found.relevant]
    return dict(zip(found.queries, texts, strict=True))


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "pos": ["p", "r"], "neg": ["n", "m"]},
        {"anchor": "q ", "positive": ["p", "r", "p"], "hard_negatives": [" n", "m"]},
        {"question": "q", "answer": ["p", "r"], "negatives": ["n", "m"], "score": 3},
    ],
)
def test_usual_shapes(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path, [row | {"id": "a"}])
    [one] = PairFile(path=path, kind="clustering", instruction="Find.", **WHOLE).pairs("train")
    assert (one.name, one.kind, one.in_batch, one.instruction) == (
        "pairs", "clustering", True, "Find.",
    )  # fmt: skip
    first, second = one.rows
    assert (first.uid, first.query, first.positive) == ("a", "q", "p")
    assert (second.uid, second.query, second.positive) == ("a/2", "q", "r")
    assert first.negatives == second.negatives == ("n", "m")
    assert first.where == second.where == f"{path}:1"


def test_tables_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('sentence1,sentence2,negative,n2\n"a, b",c,d,e\nf,g,,h\n', encoding="utf-8")
    task = PairFile(path=str(path), **WHOLE)
    [one] = task.pairs("train")
    assert [(row.query, row.positive, row.negatives) for row in one.rows] == [
        ("a, b", "c", ("d",)), ("f", "g", ()),
    ]  # fmt: skip
    named = PairFile(path=str(path), columns={"negatives": "n2"}, in_batch=False, **WHOLE)
    [one] = named.pairs("train")
    assert [row.negatives for row in one.rows] == [("e",), ("h",)] and not one.in_batch


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = {"query": ["a", "b"], "pos": [["c"], ["d", "e"]], "neg": [None, ["f"]]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    [one] = PairFile(path=str(path), **WHOLE).pairs("train")
    assert [(row.query, row.positive, row.negatives) for row in one.rows] == [
        ("a", "c", ()), ("b", "d", ("f",)), ("b", "e", ("f",)),
    ]  # fmt: skip
    assert one.rows[2].where == f"{path} row 2"


def test_data_sets_and_retrieval_sets(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"query": "a", "pos": ["A", "AA"], "neg": ["x"], "dataset": "web/qa"},
        {"query": "b", "pos": "B", "neg": ["x", "A"], "dataset": "web/qa"},
        {"query": "a", "pos": "aaa", "dataset": 7},
        {"query": "c", "pos": "C", "dataset": None},
        {"query": "c", "pos": "C", "dataset": ""},
    ]
    path = write(tmp_path, rows)
    task = PairFile(path=path, dataset="mine", **WHOLE)
    assert {one.name: [row.query for row in one.rows] for one in task.pairs("train")} == {
        "web_qa": ["a", "a", "b"], "7": ["a"], "other": ["c", "c"],
    }  # fmt: skip
    sets = task.evaluations("train")
    assert [one.name for one in sets] == ["mine", "web_qa", "7", "other"]
    assert list(retrieval(sets[0]).corpus) == ["A", "AA", "x", "B", "aaa", "C"]
    assert answers(sets[0]) == {"a": {"A", "AA", "aaa"}, "b": {"B"}, "c": {"C"}}
    assert list(retrieval(sets[1]).corpus) == ["A", "AA", "x", "B"]
    assert answers(sets[1]) == {"a": {"A", "AA"}, "b": {"B"}}
    assert answers(sets[3]) == {"c": {"C"}}
    assert [one.name for one in task.evaluations("predict")] == ["mine"]
    with pytest.raises(ValueError, match="data.task.dataset='other' is the name of one of the"):
        PairFile(path=path, dataset="other", **WHOLE).evaluations("train")
    one_name = PairFile(path=write(tmp_path, rows[:2], "b.jsonl"), **WHOLE)
    assert [one.name for one in one_name.evaluations("train")] == ["web_qa"]
    alone = PairFile(path=path, by_dataset=False, **WHOLE)
    assert [(one.name, len(one.rows)) for one in alone.pairs("train")] == [("pairs", 6)]
    assert [one.name for one in alone.evaluations("train")] == ["pairs"]


def test_a_column_that_names_no_data_sets_is_refused(tmp_path: Path) -> None:
    rows = [{"query": f"{i}", "pos": "p", "source": f"url {i}"} for i in range(MAX_DATASETS + 1)]
    path = write(tmp_path, rows)
    with pytest.raises(ValueError, match=r"201 values in 201 rows.*url_0.*task.by_dataset=false"):
        PairFile(path=path, **WHOLE).pairs("train")
    assert len(PairFile(path=path, by_dataset=False, **WHOLE).pairs("train")) == 1
    few = write(tmp_path, rows[1:])
    assert len(PairFile(path=few, **WHOLE).pairs("train")) == MAX_DATASETS


def test_rows_of_a_query_stay_in_one_split(tmp_path: Path) -> None:
    rows = [{"query": f"q{i % 300}", "pos": f"p{i}"} for i in range(600)]
    task = PairFile(path=write(tmp_path, rows), val_fraction=0.25, test_fraction=0.25)
    queries = {}
    for split in SPLITS:
        [pairs], [one] = task.pairs(split), task.evaluations(split)
        found = answers(one)
        queries[split] = set(found)
        assert {len(texts) for texts in found.values()} == {2}
        assert {row.query for row in pairs.rows} == set(found)
        assert len(retrieval(one).corpus) == len(pairs.rows) == 2 * len(found)
    assert len(set.union(*queries.values())) == sum(map(len, queries.values())) == 300
    shares = {split: len(found) / 300 for split, found in queries.items()}
    assert shares == pytest.approx({"train": 0.5, "val": 0.25, "test": 0.25}, abs=0.1)
    assert len(task.pairs("predict")[0].rows) == 600
    empty = PairFile(path=write(tmp_path, rows), **WHOLE)
    assert empty.pairs("val") == empty.evaluations("val") == []
    other = PairFile(path=write(tmp_path, rows), val_fraction=0.25, test_fraction=0.25, seed=1)
    assert answers(other.evaluations("val")[0]).keys() != queries["val"]


@pytest.mark.parametrize(
    ("row", "reason", "wanted"),
    [
        ({"query": "q"}, "missing_field", "field 'pos' is missing; the row has query"),
        ({"query": "q", "pos": []}, "no_positive", "field 'pos' holds no text"),
        ({"query": "q", "pos": " "}, "empty_text", "field 'pos' is empty"),
        ({"query": "", "pos": "p"}, "empty_text", "field 'query' is empty"),
        ({"query": ["q"], "pos": "p"}, "not_text", "field 'query' is a list"),
        ({"query": "q", "pos": ["p", ""]}, "empty_text", "'pos' holds an empty text as number 2"),
        ({"query": "q", "pos": ["p", 3]}, "not_text", "'pos' holds a int as number 2"),
        ({"query": "q", "pos": {"text": "p"}}, "not_text", "'pos' is a dict; a text or a list"),
        ({"query": "q", "pos": "p", "neg": ["\ud800"]}, "bad_text", "'neg' holds lone surrogates"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], reason: str, wanted: str) -> None:
    path = write(
        tmp_path, [{"query": "a", "pos": "A", "neg": "x"}, row, {"query": "b", "pos": "B"}]
    )
    with pytest.raises(ValueError) as error:
        PairFile(path=path, **WHOLE).pairs("train")
    assert f"{path}:2: field" in str(error.value) and wanted in str(error.value)
    task = PairFile(path=path, on_bad_row="skip", **WHOLE)
    assert [row.query for row in task.pairs("train")[0].rows] == ["a", "b"]
    assert task.counts["main/skipped"] == task.counts[f"main/skipped/{reason}"] == 1
    with pytest.warns(UserWarning, match="1 of 3 rows left out"):
        PairFile(path=path, max_bad_share=0.34, **WHOLE).pairs("train")


def test_a_positive_is_no_negative(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"query": "a", "pos": ["A", "AA"], "neg": ["x", "AA "]},
        {"query": "b", "pos": "B", "neg": ["BB", "A"]},
        {"query": "b", "pos": "BB", "neg": "B"},
    ]
    path = write(tmp_path, rows)
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: field 'neg' holds a positive .*'AA'"):
        PairFile(path=path, **WHOLE).pairs("train")
    task = PairFile(path=path, on_bad_row="skip", **WHOLE)
    with pytest.warns(UserWarning, match=r"train: 3 negatives left out: they are positives"):
        [one] = task.pairs("train")
    assert [(row.positive, row.negatives) for row in one.rows] == [
        ("A", ("x",)), ("AA", ("x",)), ("B", ("A",)), ("BB", ()),
    ]  # fmt: skip
    assert task.pairs("train") == [one], "without another warning"
    assert task.counts["main/skipped"] == 0 and task.counts["train/dropped_negatives"] == 3
    assert answers(task.evaluations("train")[0]) == {"a": {"A", "AA"}, "b": {"B", "BB"}}
    strict = PairFile(path=path, on_bad_row="skip", in_batch=False, **WHOLE)
    with pytest.warns(UserWarning, match="; 1 rows had no other negative"):
        [one] = strict.pairs("train")
    assert [row.positive for row in one.rows] == ["A", "AA", "B"]
    assert strict.counts["train/no_negative"] == 1


def test_without_negatives_of_the_batch_every_row_needs_its_own(tmp_path: Path) -> None:
    bare = write(tmp_path, [{"query": "a", "pos": "A"}], "bare.jsonl")
    with pytest.raises(ValueError, match="no column negatives / neg"):
        PairFile(path=bare, in_batch=False, **WHOLE).pairs("train")
    rows: list[dict[str, Any]] = [{"query": "a", "pos": "A", "neg": "x"}]
    rows += [{"query": "b", "pos": "B", "neg": []}, {"query": "c", "pos": "C", "neg": ["C"]}]
    path = write(tmp_path, rows)
    with pytest.raises(ValueError) as error:
        PairFile(path=path, in_batch=False, **WHOLE).pairs("train")
    assert f"{path}:2: field 'neg' holds no negative; data.task.in_batch=false" in str(error.value)
    task = PairFile(path=path, in_batch=False, on_bad_row="skip", **WHOLE)
    [one] = task.pairs("train")
    assert [row.query for row in one.rows] == ["a"] and not one.in_batch
    assert task.counts["main/skipped/no_negative"] == 2


def test_wrong_options_are_named_together() -> None:
    with pytest.raises(ValueError) as error:
        PairFile(path="", kind="retrieva", dataset=" ", val_fraction=2)  # type: ignore[arg-type]
    for wanted in (
        "data.task.kind='retrieva': allowed are retrieval, sts, classification, clustering; did",
        "data.task.dataset=' '",
        "data.task.val_fraction=2",
        "data.path is not set",
    ):
        assert wanted in str(error.value)
    node = {"_target_": "datamodules.tasks.pair_file.PairFile", "path": "a", "columns": {}}
    assert check_node("data.task", node | {"in_batch": False, "val_path": None}) == []
    [wrong] = check_node("data.task", node | {"kind": "retrieva"})
    assert wrong.startswith("data.task.kind='retrieva'") and "'retrieval'" in wrong


def test_the_real_file(shared_data: Path) -> None:
    task = PairFile(path=str(shared_data / "gsm8k_train_1000.jsonl"))
    assert sum(len(task.pairs(split)[0].rows) for split in SPLITS) == 1000
    [one] = map(retrieval, task.evaluations("test"))
    [pairs] = task.pairs("test")
    assert 150 < len(one.queries) < 250 and len(pairs.rows) == len(one.queries)
    for row, places in zip(pairs.rows, one.relevant, strict=True):
        assert [one.corpus[place] for place in places] == [row.positive]
