"""Rows and preference pairs from files: every format, every shape, every kind of bad row."""

from __future__ import annotations

import csv
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.preference_rows import read_preference_pairs
from datamodules.sources import nearest, read_rows, scan_rows, stable_hash
from datamodules.tasks.base import Pair

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
JUDGE = {"pair_id": "p0", "question": "2+2?", "response_A": "4", "response_B": "5", "label": "A>B"}
RANKED = {"id": 7, "prompt": "2+2?", "chosen": "4", "rejected": "5", "subset": "math"}
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)


def judge(**changes: Any) -> dict[str, Any]:
    return {**JUDGE, **changes}


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_data(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps({"version": [1, {"data": []}], "data": rows}), encoding="utf-8")
    return path


def write_cells(path: Path, rows: list[Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_folder(path: Path, rows: list[Any]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


TEXT_ONLY: dict[str, Callable[[Path, list[Any]], Path]] = {
    "a.csv": write_cells,
    "a.tsv": write_cells,
}
NESTED: dict[str, Callable[[Path, list[Any]], Path]] = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.json": write_json,
    "b.json": write_data,
    "a.parquet": write_parquet,
    "folder": write_folder,
}


def one(tmp_path: Path, row: dict[str, Any], **options: Any) -> Pair:
    pairs, counts = read_preference_pairs(write_jsonl(tmp_path / "one.jsonl", [row]), **options)
    assert counts == {"rows": 1, "pairs": 1, "skipped": 0}
    return pairs[0]


@pytest.mark.parametrize("name", [*TEXT_ONLY, *NESTED])
def test_every_format_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    text = 'h\u00e9 "quoted", tab\tand\nnew line \u2028 \U0001f600'
    rows = [
        judge(question=text, source="s"),
        judge(pair_id="p1", label="B>A", response_B=text, source="t"),
    ]
    pairs, counts = read_preference_pairs((TEXT_ONLY | NESTED)[name](tmp_path / name, rows))
    assert [(p.uid, p.question, p.responses, p.label) for p in pairs] == [
        ("p0", text, ("4", "5"), 1),
        ("p1", "2+2?", ("4", text), 2),
    ]
    assert [p.extra["source"] for p in pairs] == ["s", "t"]
    assert counts == {"rows": 2, "pairs": 2, "skipped": 0}


@pytest.mark.parametrize("name", NESTED)
def test_lists_and_chats_survive_every_nested_format(tmp_path: Path, name: str) -> None:
    rows = [{"id": 1, "prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d"], "domain": "x"}]
    pairs, _ = read_preference_pairs(NESTED[name](tmp_path / name, rows))
    assert [p.uid for p in pairs] == ["1/c0r0", "1/c0r1", "1/c1r0", "1/c1r1"]
    chats = [{"id": 1, "chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    pairs, _ = read_preference_pairs(NESTED[name](tmp_path / f"chat_{name}", chats))
    assert pairs[0].question == "user: 2+2?" and set(pairs[0].responses) == {"4", "5"}


def test_where_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xe2\x80\xa8"}\n')
    assert [row.where for row in read_rows(path)] == [f"{path}:1", f"{path}:3"]
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,"two\nlines"\n\n3,4\n')
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]
    path = write_json(tmp_path / "a.json", [{"a": 1}, {"a": 2}])
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]
    path = write_parquet(tmp_path / "a.parquet", [{"a": 1}, {"a": 2}])
    assert [row.where for row in read_rows(path)] == [f"{path} row 1", f"{path} row 2"]


def test_file_without_header_keeps_its_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('1.5\t"He said\tb\n')
    rows = read_rows(path, header=["score", "first", "second"])
    assert rows[0].values == {"score": "1.5", "first": '"He said', "second": "b"}


def test_data_set_with_splits(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    part = datasets.Dataset.from_list([JUDGE])
    path = str(tmp_path / "folder")
    datasets.DatasetDict({"train": part, "filtered": part}).save_to_disk(path)
    assert read_rows(path, split="filtered")[0].where == f"{path}[filtered] row 1"
    with pytest.raises(ValueError, match=r"data\.split=filtred .*did you mean 'filtered'"):
        read_rows(path, split="filtred")


# ---- Shapes --------------------------------------------------------------------------------------

LABELS = {"A>B": 1, "B>A": 2, " b > a ": 2, "A": 1, "b": 2, 1: 1, 2: 2, "1": 1, "2": 2, "2.0": 2}


@pytest.mark.parametrize("label", LABELS, ids=repr)
def test_labels(tmp_path: Path, label: Any) -> None:
    assert one(tmp_path, judge(label=label)).label == LABELS[label]


@pytest.mark.parametrize(("score", "slot"), [(-3, 1), ("-1", 1), (1, 2), (2, 2)])
def test_signed_preference_column(tmp_path: Path, score: Any, slot: int) -> None:
    row = {"context": [USER], "response1": "4", "response2": "5", "overall_preference": score}
    pair = one(tmp_path, row)
    assert (pair.label, pair.question, pair.responses) == (slot, "user: 2+2?", ("4", "5"))


def test_ranked_texts_get_a_slot_by_their_uid(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**RANKED, "id": i} for i in range(400)])
    pairs, _ = read_preference_pairs(path)
    assert all(p.responses[p.label - 1] == "4" and not p.swapped for p in pairs if p.label)
    assert 150 < Counter(p.label for p in pairs)[1] < 250
    backwards = write_jsonl(tmp_path / "b.jsonl", [{**RANKED, "id": i} for i in range(399, -1, -1)])
    assert read_preference_pairs(backwards)[0][::-1] == pairs
    assert pairs[3].extra == {"subset": "math", "row_uid": "3", "where": f"{path}:4"}


def test_lists_are_crossed(tmp_path: Path) -> None:
    row = {**RANKED, "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"]}
    pairs, counts = read_preference_pairs(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert counts == {"rows": 1, "pairs": 9, "skipped": 0}
    for pair in pairs:
        i, j = pair.extra["chosen_index"], pair.extra["rejected_index"]
        better, worse = pair.swap().responses if pair.label == 2 else pair.responses
        assert (better, worse, pair.uid) == ("abc"[i], "xyz"[j], f"7/c{i}r{j}")
        assert pair.extra["row_uid"] == "7"
    assert len({pair.uid for pair in pairs}) == 9


MORE = {"role": "user", "content": "sure?"}
CHATS: list[tuple[dict[str, Any], str, set[str]]] = [
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "user: 2+2?", {"4", "5"}),
    ({"prompt": [USER], "chosen": "4", "rejected": "5"}, "user: 2+2?", {"4", "5"}),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "user: 2+2?", {"4", "5"}),
    ({"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "user: 2+2?", {"4", "5"}),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "user: 2+2?", {"4", "5"}),
    ({"prompt": "Be short.", "chosen": [GOOD], "rejected": [BAD]}, "Be short.", {"4", "5"}),
    (
        {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, MORE, BAD]},
        "user: 2+2?\nassistant: 4\nuser: sure?",
        {"4", "5"},
    ),
    (
        {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, BAD, MORE, BAD]},
        "user: 2+2?",
        {f"assistant: {n}\nuser: sure?\nassistant: {n}" for n in "45"},
    ),
]


@pytest.mark.parametrize(("row", "question", "answers"), CHATS)
def test_chats(tmp_path: Path, row: dict[str, Any], question: str, answers: set[str]) -> None:
    pair = one(tmp_path, row)
    assert pair.question == question and set(pair.responses) == answers


def test_columns_are_configurable(tmp_path: Path) -> None:
    row = {"task": "2+2?", "x": "4", "y": "5", "who": "B", "nr": 9}
    names = {"question": "task", "response_1": "x", "response_2": "y", "label": "who", "uid": "nr"}
    pair = one(tmp_path, row, columns=names)
    assert (pair.uid, pair.question, pair.responses, pair.label) == ("9", "2+2?", ("4", "5"), 2)
    both = {**JUDGE, **RANKED}
    assert one(tmp_path, both, columns={"label": None, "chosen": "chosen"}).extra["label"] == "A>B"


def test_uids(tmp_path: Path) -> None:
    same = [JUDGE, JUDGE, judge(pair_id="p0#2")]
    pairs, _ = read_preference_pairs(write_jsonl(tmp_path / "a.jsonl", same))
    assert [p.uid for p in pairs] == ["p0", "p0#2", "p0#2#2"]
    assert [p.extra["row_uid"] for p in pairs] == ["p0", "p0", "p0#2"]
    bare = without(JUDGE, "pair_id")
    assert one(tmp_path, bare).uid == one(tmp_path, {**bare, "other": 1}).uid
    assert one(tmp_path, bare).uid != one(tmp_path, {**bare, "question": "3+1?"}).uid
    assert stable_hash("a", 1) == stable_hash("a", "1") != stable_hash("a1")


@pytest.mark.parametrize("row", [without(JUDGE, "label"), judge(label=None), judge(label="")])
def test_labels_may_be_absent_for_prediction(tmp_path: Path, row: dict[str, Any]) -> None:
    assert one(tmp_path, row, label_required=False).label is None
    with pytest.raises(ValueError, match="label"):
        one(tmp_path, row)


# ---- Bad input -----------------------------------------------------------------------------------

BAD_ROWS: list[tuple[Any, str, str]] = [
    (without(JUDGE, "response_B"), "missing_field", "field 'response_B' is missing"),
    ({**without(JUDGE, "label"), "labell": "A>B"}, "missing_field", "did you mean 'labell'?"),
    (judge(question=None), "missing_field", "field 'question' is missing"),
    (judge(label="C"), "bad_label", "'C', neither side; use A>B / B>A"),
    (judge(label=["A"]), "bad_label", "neither side"),
    (judge(label="A=B"), "tie", "'A=B', a tie"),
    (judge(response_B=" 4\n"), "equal_responses", "equals field 'response_B'"),
    (judge(response_B="  "), "empty_text", "field 'response_B' is empty"),
    (judge(response_A=4), "not_text", "field 'response_A' is a int"),
    (judge(response_A=["4"]), "not_text", "field 'response_A' is a list"),
    (judge(question=[{"role": "user"}]), "not_text", "messages"),
    (judge(response_A="\ud800"), "bad_text", "lone surrogates"),
    (["no", "object"], "not_an_object", "a JSON object is needed, not a list"),
]


@pytest.mark.parametrize(("row", "reason", "fragment"), BAD_ROWS)
def test_bad_row(tmp_path: Path, row: Any, reason: str, fragment: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [JUDGE, row])
    with pytest.raises(ValueError) as error:
        read_preference_pairs(path)
    assert f"{path}:2: " in str(error.value) and fragment in str(error.value)
    assert "data.task.on_bad_row=skip" in str(error.value)
    pairs, counts = read_preference_pairs(path, on_bad_row="skip")
    assert len(pairs) == 1
    assert counts == {"rows": 2, "pairs": 1, "skipped": 1, f"skipped/{reason}": 1}


BAD_RANKED: list[tuple[dict[str, Any], str]] = [
    ({**RANKED, "chosen": []}, "empty list"),
    ({**RANKED, "chosen": ["a", "5"], "rejected": ["5"]}, "field 'chosen' equals field 'rejected'"),
    ({**RANKED, "chosen": [GOOD], "rejected": "5"}, "field 'chosen' is a list"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "share no beginning"),
    ({"chosen": "a", "rejected": "b"}, "set data.columns.prompt=<column>"),
    ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "does not end with a message of the assi"),
    ({**RANKED, "prompt": ""}, "field 'prompt' is empty"),
]


@pytest.mark.parametrize(("row", "fragment"), BAD_RANKED)
def test_bad_ranked_row(tmp_path: Path, row: dict[str, Any], fragment: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError) as error:
        read_preference_pairs(path, on_bad_row="skip")
    assert fragment in str(error.value) and f"{path}:1: " in str(error.value)


CELLS = b"question,response_1,response_2,label\n"
LINE = json.dumps(JUDGE).encode()
BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"", "the file is empty"),
    ("a.jsonl", b"\xef\xbb\xbf \n\n", "the file is empty"),
    ("a.json", b"[]", "the file is empty"),
    ("a.csv", b"question,response_A\n", "the file is empty"),
    ("a.jsonl", LINE + b"\n" + LINE.replace(b"2+2", b"\xff"), "a.jsonl:2: invalid UTF-8"),
    ("a.jsonl", LINE + b'\n{"question": ', "a.jsonl:2: does not parse as JSON"),
    ("a.jsonl", b"[" * 100_000, "does not parse as JSON"),
    ("a.json", b'[\n{"a": "\xff"}]', "a.json:2: invalid UTF-8"),
    ("a.json", b'[\n{"a": 1},\n{"a" 2}]', "a.json:3: does not parse"),
    ("a.json", LINE + b"\n" + LINE, "set data.format=jsonl"),
    ("a.json", b'{"rows": []}', 'a list of objects or {"data": [...]}'),
    ("a.json", b'{"data": 3}', 'a list of objects or {"data": [...]}'),
    ("a.csv", CELLS + b"1,2,3,A\n1,2\n", "a.csv:3: 2 cells where the header has 4"),
    ("a.csv", CELLS + b"1,2,\xff,A\n", "a.csv:2: invalid UTF-8"),
    ("a.csv", b'a,b\n1,2\n1,"2\n3,4\n', "a.csv:3: does not parse"),
    ("a.csv", b"a,a\n1,2\n", "the header names column 'a' twice"),
    ("a.parquet", b"PAR1 no", "no readable parquet file"),
    ("a.txt", LINE, "unknown ending '.txt'"),
    ("a.jsonl", b'{"a": 1, "b": 2}', "columns a, b hold no preference pairs"),
    ("a.jsonl", json.dumps({**JUDGE, **RANKED}).encode(), "hold two kinds of preference pairs"),
    ("a.jsonl", LINE.replace(b"response_B", b"respnse_B"), "did you mean 'respnse_B'?"),
    ("a.jsonl", LINE.replace(b"response_B", b"other"), "set data.columns.response_2=<column>"),
    ("a.jsonl", LINE.replace(b'"A>B"', b"0"), "0/1 may mean either side"),
    ("a.jsonl", LINE + b"\n" + LINE.replace(b'"A>B"', b"true"), "a.jsonl:2: field 'label' is True"),
    ("a.jsonl", LINE.replace(b'"A>B"', b'"-1"'), "only 1 and 2 are unambiguous"),
]


@pytest.mark.parametrize(("name", "data", "fragment"), BAD_FILES)
def test_bad_file(tmp_path: Path, name: str, data: bytes, fragment: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_preference_pairs(tmp_path / name)
    assert fragment in str(error.value) and str(tmp_path / name) in str(error.value)


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("pears.jsonl", {}, "did you mean 'pairs.jsonl'?"),
    ("none/pairs.jsonl", {}, "there is no folder"),
    ("", {}, "is a folder that datasets.save_to_disk did not write"),
    ("pairs.jsonl", {"format": "jsnl"}, "did you mean 'jsonl'?"),
    ("pairs.jsonl", {"split": "train"}, "data.split=train"),
    ("pairs.jsonl", {"columns": {"questoin": "q"}}, "did you mean 'question'?"),
    ("pairs.jsonl", {"columns": {"label": "lable"}}, "data.columns.label='lable' is no column"),
    ("pairs.jsonl", {"on_bad_row": "ignore"}, "allowed are error, skip"),
]


@pytest.mark.parametrize(("name", "options", "fragment"), OPTIONS)
def test_bad_option(tmp_path: Path, name: str, options: dict[str, Any], fragment: str) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [JUDGE])
    with pytest.raises(ValueError) as error:
        read_preference_pairs(tmp_path / name, **options)
    assert fragment in str(error.value)


def test_problems_are_collected_and_tolerated_up_to_a_share(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [judge(label="C")] * 7 + [JUDGE] * 3)
    with pytest.raises(ValueError) as error:
        read_preference_pairs(path)
    assert str(error.value).count("neither side") == 5 and "and 2 more" in str(error.value)
    with pytest.raises(ValueError, match="7 bad rows"):
        read_preference_pairs(path, max_bad_share=0.6)
    with pytest.warns(UserWarning, match="7 of 10 rows left out"):
        assert read_preference_pairs(path, max_bad_share=0.7)[1]["skipped/bad_label"] == 7


def test_nearest() -> None:
    assert nearest("LABLE", ["label", "x"]) == "; did you mean 'label'?"
    assert nearest("zzz", ["label"]) == ""


def test_any_bytes_give_rows_or_a_value_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    seeds = [json.dumps([JUDGE, RANKED]).encode(), LINE, b'a,b\n"1",2\n', b'{"data": [{}, 1]}']
    for number in range(600):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        path = tmp_path / f"x{rng.choice(['.jsonl', '.json', '.csv', '.tsv', '.parquet'])}"
        path.write_bytes(bytes(data))
        try:
            scan_rows(path)
            read_preference_pairs(path, on_bad_row="skip")
        except ValueError as error:
            assert str(path) in str(error), number


def test_real_file() -> None:
    path = REAL / "judgebench_claude.jsonl"
    if not path.exists():
        pytest.skip("the file is not beside this checkout")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs, counts = read_preference_pairs(path, max_bad_share=0.01)
    lines = path.read_text(encoding="utf-8").count("\n")
    assert counts["rows"] == lines == len(pairs) + counts["skipped"]
    assert {pair.label for pair in pairs} == {1, 2} and len({p.uid for p in pairs}) == len(pairs)
