"""BM25: against the formula word by word, ties, what is always returned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from datamodules.lexical import LexicalRetriever, words_of
from datamodules.passages import Corpus, Passage
from tests.datamodules.retrieval_parts import WORDS, made_corpus


def corpus_of(*texts: str, title: str = "") -> Corpus:
    return Corpus([Passage(str(place), title, text) for place, text in enumerate(texts)])


def slow_score(corpus: Corpus, text: str, place: int, k1: float, b: float) -> float:
    """The sum of the module's docstring, over all words of the text one by one."""
    documents = [words_of(one.encoded_text) for one in corpus]
    mean = sum(map(len, documents)) / len(documents)
    total = 0.0
    for word in words_of(text):
        df = sum(word in document for document in documents)
        tf = documents[place].count(word)
        idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
        damping = k1 * (1 - b + b * len(documents[place]) / mean)
        total += idf * tf * (k1 + 1) / (tf + damping) if tf else 0.0
    return total


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.0), (0.0, 1.0), (2.0, 1.0)])
def test_scores_are_those_of_the_formula(k1: float, b: float) -> None:
    corpus = corpus_of("a b b c", "a", "c c c c c c d", "e f g. A! b-b", title="a title")
    retriever = LexicalRetriever(corpus, k1=k1, b=b)
    for text in ("a", "b c", "c c title", "z", "a z d"):
        expected = [slow_score(corpus, text, place, k1, b) for place in range(len(corpus))]
        assert np.allclose(retriever.scores(text), expected, atol=1e-12), text


def test_the_order_is_by_score_then_place() -> None:
    corpus = corpus_of("x y", "q x", "x q", "q q q", "y y", "q x")
    retriever = LexicalRetriever(corpus)
    assert retriever.search(["q"], 6) == [[3, 1, 2, 5, 0, 4]]
    assert retriever.search(["q"], 3) == [[3, 1, 2]], "a tie is cut at the lower places"
    assert retriever.search(["unknown words", "", "?!"], 4) == [[0, 1, 2, 3]] * 3
    assert retriever.search(["q"], 99) == [[3, 1, 2, 5, 0, 4]]


def test_the_best_are_those_of_a_full_sort() -> None:
    corpus = made_corpus(200)
    retriever = LexicalRetriever(corpus)
    for k in (1, 7, 200):
        for text in (WORDS[0], f"{WORDS[1]} {WORDS[2]} {WORDS[2]}", corpus[17].text):
            scores = retriever.scores(text)
            whole = sorted(range(200), key=lambda place: (-scores[place], place))
            assert retriever.search([text], k) == [whole[:k]]
    assert retriever.search([corpus[17].text], 1) == [[17]]


def test_passages_of_punctuation_only() -> None:
    assert LexicalRetriever(corpus_of("...", "!")).search(["a", "..."], 1) == [[0], [0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": -0.1}, r"data.retriever.k1=-0.1 must be at least 0"),
        ({"k1": float("nan")}, r"data.retriever.k1=nan"),
        ({"b": 1.1, "k1": -1.0}, r"k1=-1.0 .*; data.retriever.b=1.1 must be in \[0, 1\]"),
        ({"cache_size": -1}, r"data.retriever.cache_size=-1 must be at least 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LexicalRetriever(corpus_of("a"), **options)


def test_the_fingerprint_names_corpus_and_options() -> None:
    known = LexicalRetriever(corpus_of("a", "b")).fingerprint
    assert known == LexicalRetriever(corpus_of("a", "b"), cache_size=3).fingerprint
    others = [
        LexicalRetriever(corpus_of("a", "c")),
        LexicalRetriever(corpus_of("a", "b"), k1=1.0),
        LexicalRetriever(corpus_of("a", "b"), b=0.5),
    ]
    assert len({known, *(one.fingerprint for one in others)}) == 4
