"""Exact match and F1 of short answers."""

from __future__ import annotations

import pytest

from datamodules.tasks.exact_match import exact_match, f1, normalise


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Beatles", "beatles"),
        ("an apple, a  day", "apple day"),
        ("U.S.A.", "usa"),
        ("don't", "dont"),
        ("theatre Anna", "theatre anna"),
        ("  \n", ""),
        ("A", "a"),
        ("1,000", "1000"),
    ],
)
def test_normalise(text: str, wanted: str) -> None:
    assert normalise(text) == wanted
    assert normalise(wanted) == wanted


@pytest.mark.parametrize(
    ("said", "answers", "wanted"),
    [
        ("the danube!", ["Danube"], True),
        ("Donau", ["Danube", "Donau"], True),
        ("river Danube", ["Danube"], False),
        (None, ["Danube"], False),
        ("", [""], False),
        ("...", ["!"], False),
        ("A", ["the"], False),
        ("a", ["A"], True),
        ("x", [], False),
    ],
)
def test_exact_match(said: str | None, answers: list[str], wanted: bool) -> None:
    assert exact_match(said, answers) is wanted
    if wanted:
        assert f1(said, answers) == 1


def test_f1_by_hand() -> None:
    assert f1("the red river", ["red sea", "sea"]) == pytest.approx(0.5)
    assert f1("sea sea", ["sea"]) == pytest.approx(2 / 3), "repeated words count once each"
    assert f1("sea", ["red sea", "sea"]) == 1, "the best answer counts"
    assert f1(None, ["sea"]) == f1("lake", ["sea"]) == f1("sea", []) == f1("", [""]) == 0
