"""Texts of the search protocol: what is read from the agent, shown to it, and searched for."""

from __future__ import annotations

import pytest

from datamodules.passages import Passage
from datamodules.search_texts import (
    FORMS,
    INVALID,
    fit_input,
    information,
    invalid_note,
    is_closed,
    last_answer,
    read_piece,
    render_passages,
    retriever_input,
    words_of_protocol,
)
from datamodules.word_tokenizer import word_tokenizer

PASSAGES = [Passage("a", "ann", "was born in rome"), Passage("b", "", "rome is in italy")]


@pytest.mark.parametrize(
    ("text", "kind", "content", "is_unclosed", "is_empty"),
    [
        ("hm <search> a b </search>", "search", "a b", False, False),
        ("<search>\n a b\n</search>\n", "search", "a b", False, False),
        ("<search> old <search> new </search>", "search", "new", False, False),
        ("<think> a > b </think> <answer> x </answer>", "answer", "x", False, False),
        ("<answer></answer>", "answer", "", False, False),
        ("<search> q </search> <answer> a </answer>", "search", "q", False, False),
        ("<search>  </search>", "invalid", "", False, True),
        ("q </search>", "invalid", "", False, True),
        ("<search> where", "invalid", "", True, False),
        ("<search> q </answer>", "invalid", "", True, False),
        ("x </answer>", "invalid", "", False, False),
        ("I know it", "invalid", "", False, False),
        ("", "invalid", "", False, False),
    ],
)
def test_pieces(text: str, kind: str, content: str, is_unclosed: bool, is_empty: bool) -> None:
    piece = read_piece(text)
    assert (piece.kind, piece.content) == (kind, content)
    assert (piece.is_unclosed, piece.is_empty) == (is_unclosed, is_empty)
    assert is_closed(text) is ("</search>" in text or "</answer>" in text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> a </answer> no: <answer> b </answer> end", "b"),
        ("<answer> a </answer> <answer> b", "a"),
        ("<answer></answer>", ""),
        ("a </answer>", None),
        ("<answer> a", None),
    ],
)
def test_the_last_closed_answer_counts(text: str, answer: str | None) -> None:
    assert last_answer(text) == answer


def test_passages_are_numbered_and_titled() -> None:
    assert render_passages(PASSAGES, spaced=False) == (
        "Doc 1(Title: ann) was born in rome\nDoc 2 rome is in italy"
    )
    assert render_passages(PASSAGES, spaced=True) == (
        "Doc 1 ( Title : ann ) was born in rome Doc 2 rome is in italy"
    )
    block = information(PASSAGES, spaced=False)
    assert block.startswith("\n<information>\nDoc 1(") and block.endswith("\n</information>\n")
    assert information([], spaced=True) == "<information> </information>"


def test_the_words_of_the_protocol_are_enough_for_a_word_level_tokenizer() -> None:
    bodies = ["ann", "was", "born", "in", "rome", "is", "italy"]
    tokenizer = word_tokenizer([*words_of_protocol(2), *bodies])
    assert len(set(words_of_protocol(5))) == len(words_of_protocol(5))
    texts = [information(PASSAGES, spaced=True), invalid_note(spaced=True), "<think> </think>"]
    for text in [*texts, "<search> ann </search> <answer> italy </answer>"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    third = information([*PASSAGES, PASSAGES[0]], spaced=True)
    assert tokenizer.unk_token_id in tokenizer.encode(third), "the number 3 is no word of two docs"


def test_the_note_on_an_invalid_action_is_no_action() -> None:
    for note in (INVALID, invalid_note(spaced=True)):
        assert note.strip() and "<" not in note and read_piece(note).kind == "invalid"


def test_what_the_retriever_is_asked() -> None:
    queries = ["one", "two", "three"]
    assert [retriever_input(form, "why?", queries) for form in FORMS] == [
        "three",
        "why? [SEP] three",
        "why? [SEP] one [SEP] two [SEP] three",
        "one [SEP] two [SEP] three",
    ]
    assert retriever_input("question_query", "why?", queries, separator=" | ") == "why? | three"
    with pytest.raises(ValueError, match="input='both' is unknown; use one of query"):
        retriever_input("both", "why?", queries)
    with pytest.raises(ValueError, match="no query"):
        retriever_input("query", "why?", [])


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("bound", "wanted"),
    [
        (9, "a b c [SEP] h i [SEP] q r"),
        (8, "a b [SEP] h i [SEP] q r"),
        (6, "h i [SEP] q r"),
        (5, "h i [SEP] q r"),
        (4, "h [SEP] q r"),
        (3, "q r"),
        (1, "q r"),
    ],
)
def test_the_question_goes_first_and_the_query_survives(bound: int, wanted: str) -> None:
    fitted = fit_input("question_history_query", "a b c", ["h i", "q r"], words, bound)
    assert fitted == wanted


def test_fitting_changes_nothing_that_fits_and_loses_the_query_nowhere() -> None:
    question, queries = " ".join("abcdefgh"), ["x y z", "u v w", "the query itself"]
    for form in FORMS:
        whole = retriever_input(form, question, queries)
        assert fit_input(form, question, queries, words, words(whole)) == whole
        for bound in range(1, words(whole)):
            fitted = fit_input(form, question, queries, words, bound)
            assert fitted.endswith("the query itself")
            assert words(fitted) <= max(bound, 3)
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        fit_input("query", question, queries, words, 0)
