"""Questions of HotpotQA files: both shapes, the corpus, supporting titles, bad rows, the agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.engines.search import Trace, Turn
from datamodules.experience import Completion, FinishReason
from datamodules.lexical import LexicalRetriever
from datamodules.search_texts import information, read_piece
from datamodules.tasks.hotpot_file import HotpotFile, first_title
from datamodules.word_tokenizer import byte_tokenizer
from run_tools.checks import check_node

ALL: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}
ROW: dict[str, Any] = {
    "question": "Which band made Everyday?",
    "answer": "Winner",
    "type": "bridge",
    "supporting_facts": {"title": ["Everyday", "Winner (band)", "Everyday"], "sent_id": [0, 0, 1]},
    "context": {
        "title": ["Winner (band)", "Rome", "Everyday"],
        "sentences": [["A band.", " It has four members."], ["A city."], ["An album of Winner."]],
    },
}


def row(number: int = 0, **values: Any) -> dict[str, Any]:
    return ROW | {"question": f"{ROW['question']} {number}"} | values


def write(folder: Path, *rows: dict[str, Any], name: str = "hotpot.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def error_of(path: str, **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        HotpotFile(path=path, **ALL | options).records("train")
    return str(error.value)


def test_a_row(tmp_path: Path) -> None:
    path = write(tmp_path, row())
    task = HotpotFile(path=path, **ALL)
    [question] = task.records("train")
    assert (question.text, question.answers) == ("Which band made Everyday? 0", ("Winner",))
    assert question.supporting == ("Winner (band)", "Everyday") and question.group == "bridge"
    assert question.where == f"{path}:1"
    assert [(one.uid, one.title, one.text) for one in task.corpus] == [
        ("Winner (band)", "Winner (band)", "A band. It has four members."),
        ("Rome", "Rome", "A city."),
        ("Everyday", "Everyday", "An album of Winner."),
    ]
    assert task.corpus is task.corpus and not task.spaced
    assert task.gold(question, "any") == question.supporting


def test_the_original_shape_is_the_same(tmp_path: Path) -> None:
    context, facts = ROW["context"], ROW["supporting_facts"]
    pairs = [list(pair) for pair in zip(context["title"], context["sentences"], strict=True)]
    listed = [list(pair) for pair in zip(facts["title"], facts["sent_id"], strict=True)]
    old = row(context=pairs, supporting_facts=listed, answer=["Winner"])
    tasks = [
        HotpotFile(path=write(tmp_path, one, name=f"{name}.jsonl"), **ALL)
        for name, one in (("new", row()), ("old", old))
    ]
    assert tasks[0].corpus.digest == tasks[1].corpus.digest
    first, second = (task.records("train")[0] for task in tasks)
    assert (first.text, first.answers, first.supporting, first.group) == (
        (second.text, second.answers, second.supporting, second.group)
    )


def test_equal_paragraphs_are_one_passage(tmp_path: Path) -> None:
    other = {"title": ["Rome", "Rome", "Everyday"],
             "sentences": [["A city."], ["A film."], ["An album of Winner."]]}  # fmt: skip
    facts = {"title": ["Rome"], "sent_id": [0]}
    rows = [row(), row(1, context=other, supporting_facts=facts, type=None)]
    task = HotpotFile(path=write(tmp_path, *rows), **ALL)
    assert list(task.corpus.places) == ["Winner (band)", "Rome", "Everyday", "Rome#2"]
    assert task.corpus[3].text == "A film."
    question = task.records("train")[1]
    assert question.supporting == ("Rome", "Rome#2") and question.group == "multi"


def test_single_hop_files_need_no_facts(tmp_path: Path) -> None:
    bare = {"question": "Who?", "answer": ["Ann", "Anna", "Ann"], "context": [["A", "Ann did it."]]}
    task = HotpotFile(path=write(tmp_path, bare), **ALL)
    [question] = task.records("train")
    assert (question.supporting, question.group) == ((), "single")
    assert question.answers == ("Ann", "Anna") and task.corpus[0].text == "Ann did it."
    numbers = write(tmp_path, bare | {"answer": 1984}, name="n.jsonl")
    assert HotpotFile(path=numbers, **ALL).records("train")[0].answers == ("1984",)


def test_empty_paragraphs_are_counted(tmp_path: Path) -> None:
    context = [["Rome", []], ["Everyday", ["Album."]], ["Winner (band)", ["Band."]]]
    task = HotpotFile(path=write(tmp_path, row(context=context), row(1)), **ALL)
    assert list(task.corpus.places) == ["Everyday", "Winner (band)", "Winner (band)#2", "Rome",
                                        "Everyday#2"]  # fmt: skip
    assert task.counts["empty_paragraphs"] == 1 and task.counts["main/records"] == 2
    task.records("predict")
    assert task.counts["empty_paragraphs"] == 1


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"answer": []}, "field 'answer' holds no answer"),
        ({"answer": ["x", " "]}, "field 'answer' holds no answer, or an empty one"),
        ({"answer": " "}, "field 'answer' is empty"),
        ({"answer": None}, "field 'answer' is missing"),
        ({"answer": [3]}, "field 'answer' holds a int; texts are needed"),
        ({"question": ""}, "field 'question' is empty"),
        ({"context": None}, "field 'context' is missing"),
        ({"context": []}, "field 'context' must be"),
        ({"context": "text"}, "field 'context' must be"),
        ({"context": {"title": ["a"], "sentences": []}}, "field 'context' must be"),
        ({"context": [["a", ["b"], "c"]]}, "field 'context' must be"),
        ({"context": [["a", [1]]]}, "field 'context' holds a int"),
        ({"supporting_facts": {"title": ["Paris"], "sent_id": [0]}}, "names 'Paris', no title"),
        ({"supporting_facts": ["Rome"]}, "field 'supporting_facts' must be"),
        ({"supporting_facts": {"names": ["Rome"]}}, "field 'supporting_facts' must be"),
        ({"context": [["Everyday", ["A"]], ["Winner (band)", [" "]]]}, "names 'Winner (band)'"),
        ({"type": 3}, "field 'type' is a int"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, values: dict[str, Any], wanted: str) -> None:
    path = write(tmp_path, row(), row(1, **values), row(2))
    message = error_of(path)
    assert f"{path}:2: " in message and wanted in message and f"{path}:3" not in message
    task = HotpotFile(path=path, **ALL, on_bad_row="skip")
    assert len(task.records("train")) == 2 and task.counts["main/skipped"] == 1
    assert len(task.corpus) == 3, "nothing of a bad row is in the corpus"


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "Who?", "contxt": []})
    message = error_of(path)
    assert "no column answer" in message and "data.task.columns.answer" in message
    path = write(tmp_path, {"question": "Who?", "answer": "x"})
    assert "data.task.columns.context" in error_of(path)


def test_a_corpus_of_its_own(tmp_path: Path) -> None:
    passages = [{"id": 7, "title": "Everyday", "text": "Part one."},
                {"id": 8, "title": "Winner  (band)", "text": "A band."},
                {"id": 9, "title": "Everyday", "text": "Part two."}]  # fmt: skip
    corpus = write(tmp_path, *passages, name="passages.jsonl")
    bare = {"question": "Who?", "answer": "Winner"}
    path = write(tmp_path, row(), bare | {"type": "comparison"})
    task = HotpotFile(path=path, passages=corpus, **ALL)
    first, second = task.records("train")
    assert first.supporting == ("7", "9", "8") and [one.uid for one in task.corpus] == list("789")
    assert (second.supporting, second.group) == ((), "comparison")
    path = write(tmp_path, row(), row(1, supporting_facts={"title": ["Rome"]}))
    message = error_of(path, passages=corpus)
    assert f"{path}:2" in message and "names 'Rome', no title in passages.jsonl" in message
    missing = str(tmp_path / "none.jsonl")
    assert "none.jsonl" in error_of(path, passages=missing)


def test_splits_share_one_corpus(tmp_path: Path) -> None:
    rows = [row(i, context=[["Everyday", ["A"]], ["Winner (band)", ["B"]], [f"T{i}", ["C"]]])
            for i in range(60)]  # fmt: skip
    path = write(tmp_path, *rows)
    task = HotpotFile(path=path, val_fraction=0.2, test_fraction=0.3, seed=1)
    parts = [task.records(split) for split in ("train", "val", "test")]  # type: ignore[arg-type]
    assert sum(map(len, parts)) == 60 and all(4 < len(part) < 45 for part in parts)
    assert len(task.corpus) == 62
    again = HotpotFile(path=path, val_fraction=0.2, test_fraction=0.3, seed=1, limit=2)
    assert len(again.records("predict")) == 2
    assert (
        [again.records(split) for split in ("train", "val", "test")]
        == [  # type: ignore[arg-type]
            list(part[:2]) for part in parts
        ]
    )
    assert again.corpus.digest == task.corpus.digest, "whatever was read first"
    other = write(tmp_path, row(99, context=[["Everyday", ["A"]], ["Winner (band)", ["Z"]]]),
                  name="test.jsonl")  # fmt: skip
    more = HotpotFile(path=path, val_fraction=0, test_path=other)
    [question] = more.records("test")
    assert question.supporting == ("Everyday", "Winner (band)#2") and len(more.corpus) == 63


def test_the_agent_searches_twice(tmp_path: Path) -> None:
    task = HotpotFile(path=write(tmp_path, row(), row(1, question="a </search> <b>?")), **ALL)
    first, second = task.records("train")
    said = task.act(first, "", 0)
    assert said == "<search> Which band made Everyday? 0 </search>"
    shown = information([task.corpus[0], task.corpus[1]], False)
    more = task.act(first, said + shown, 0)
    assert more == "<search> Winner (band) </search>"
    unknown = "<answer> unknown </answer>"
    assert task.act(first, said + shown + more + shown, 0) == unknown
    assert task.act(first, said + "nothing", 0) == unknown
    assert read_piece(task.act(second, "", 0)).content == "a /search b ?"


def test_titles_in_observations() -> None:
    titles = {"Rome", "Winner (band)", "a) b"}
    assert first_title("Doc 1(Title: Paris) x Doc 2(Title: Rome) is (Title: y)", titles) == "Rome"
    assert first_title("Doc 1(Title: a) b) Doc 2(Title: Rome) ", titles) == "a) b"
    assert first_title("Doc 1 Rome is a city", titles) is None
    assert first_title("Doc 1(Title: Rome", titles) is None


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"limit": 0}, "data.task.limit=0 must be at least 1"),
        ({"max_prompt_tokens": 0}, "data.task.max_prompt_tokens=0 must be at least 1"),
        ({"path": ""}, "data.path is not set"),
        ({"val_fraction": 2}, "data.task.val_fraction=2"),
        ({"columns": {"answr": "a"}}, "data.task.columns.answr: no such role"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], wanted: str) -> None:
    start: dict[str, Any] = {"path": "a.jsonl", "max_new_tokens": -1}
    with pytest.raises(ValueError) as error:
        HotpotFile(**start | options)
    assert wanted in str(error.value) and "data.task.max_new_tokens=-1" in str(error.value)


def test_options_are_checked_by_name() -> None:
    node = {"_target_": "datamodules.tasks.hotpot_file.HotpotFile", "path": "a", "val_path": "b"}
    assert check_node("data.task", node) == []
    [wrong] = check_node("data.task", node | {"passage": "c"})
    assert "data.task.passage" in wrong and "'passages'" in wrong


def test_the_real_file(shared_data: Path) -> None:
    task = HotpotFile(path=str(shared_data / "hotpot_50.jsonl"), **ALL)
    task.bind(byte_tokenizer())
    questions = task.records("train")
    assert len(questions) == 50 and len(task.corpus) == 491
    assert {question.group for question in questions} == {"bridge", "comparison"}
    assert all(len(question.supporting) == 2 for question in questions)
    assert questions[0].supporting == ("Scott Derrickson", "Ed Wood")
    retriever = LexicalRetriever(task.corpus)
    support = []
    for question in questions:
        transcript, turns = "", []
        while (piece := read_piece(said := task.act(question, transcript, 0))).kind == "search":
            [places] = retriever.search([piece.content], 5)
            turns.append(Turn(piece.content, tuple(places), 1))
            transcript += said + information([task.corpus[place] for place in places], False)
        done = Completion((1,), (0.0,), FinishReason.STOP, trace=Trace(tuple(turns), piece.content))
        parts = task.verify(task.prompt(question), done)
        assert (parts["reward"], parts["answered"]) == (0, 1) and parts["searches"] <= 2
        support.append(parts["support"])
    assert sum(support) / 50 > 0.5, "words alone find more than half of the supporting passages"
