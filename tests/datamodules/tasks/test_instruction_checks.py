"""Checks of instructions: each on texts that do and do not follow, arguments, fractions."""

from __future__ import annotations

from typing import Any

import pytest

from datamodules.tasks.instruction_checks import (
    CHECKS,
    fraction_followed,
    plain_arguments,
    problem_of,
    sentences,
)

LESS, LEAST = {"relation": "less than"}, {"relation": "at least"}
SECTION = {"section_spliter": "Section", "num_sections": 2}
FIRST_WORD = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "but"}
#: id, arguments, texts that follow, texts that do not.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("length_constraints:number_words", {"num_words": 3} | LESS, ["a b", "it's"], ["a b c"]),
    ("length_constraints:number_words", {"num_words": 3} | LEAST, ["a b c", "a, b - c!"], ["a b"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2} | LEAST,
        ["One. Two!", '"Go." He went.', "Pi is 3.14. Yes?"],
        ["One", "Pi is 3.14", "One. !!!"],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2} | LESS, ["One."], ["A. B."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***", "a *** b"],
        ["a", "a\n\nb", "a\n***\n***\nb", "a\n***\nb\n***\nc"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        FIRST_WORD,
        ["one\n\nBut two", 'one\n\n\n"but," two\n\n'],
        ["but\n\ntwo", "one\ntwo", "one\n\nbut\n\nthree", "one\n\nbutter"],
    ),
    ("keywords:existence", {"keywords": ["Cat", "dog"]}, ["dogs, a cat"], ["a cat", "c.at dog"]),
    (
        "keywords:frequency",
        {"keyword": "a.b", "frequency": 2} | LEAST,
        ["A.B and a.b"],
        ["a.b axb", ""],
    ),
    ("keywords:frequency", {"keyword": "x", "frequency": 1} | LESS, ["abc"], ["aXc"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["concatenate"], ["A Cat."]),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 2, "let_relation": "at least"},
        ["Eel"],
        ["el"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 1, "let_relation": "less than"},
        ["plain"],
        ["# title"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["THE Big DOG", "A B"],
        ["The Big DOG"],
    ),
    ("change_case:english_capital", {}, ["ALL, 9 OF IT!"], ["Nearly ALL", "123"]),
    ("change_case:english_lowercase", {}, ["all, 9 of it!"], ["Nearly", "123"]),
    ("punctuation:no_comma", {}, ["a b"], ["a, b"]),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1, null]}', '```json\n{"a": 1}\n```', "```\n[]\n```", "3"],
        ["{'a': 1}", '{"a": 1} and more', "[" * 5000, "```json\n```"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "text\n- a\n  - b\nend"],
        ["* a", "* a\n* b\n- c", "**bold**\n* a", "a - b\n* c", "---\n* a\n***"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a b* and *c*", "**a** then *b*", "*a* **b** *c*"],
        ["*a*", "**a**", "* a\n* b", "**** **", "*a\nb* *c*"],
    ),
    (
        "detectable_format:multiple_sections",
        SECTION,
        ["Section 1\na\nSection 2\nb", "Section1 Section2 Section 3"],
        ["Section 1\na", "section 1 section 2", "Section one Section two"],
    ),
    ("detectable_format:title", {}, ["<<On cats>>\ntext", "a <<b>>"], ["<<>>", "<< >>", "<a>"]),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "Well: My answer is maybe."],
        ["no", "my answer is no"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name], [address]", "[a][b][c]"],
        ["[a]", "[] []", "[a\nb] [c]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["text\nP.P.S. more", "text\np. p. s more"],
        ["text\nP.S. more", "capps"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\n\nP.S. y"], ["x p s y"]),
    ("startend:quotation", {}, ['"all of it"', ' "a"\n'], ['"a" b', '"', "'a'"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So: THE END. ", '"the end."'], ["end"]),
    ("startend:start_checker", {"start_phrase": "Dear"}, [" dear all", '"Dear'], ["My dear"]),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say hi"},
        ["say hi\nHi!", "Say hi"],
        ["Hi! Say hi", "Say  hi"],
    ),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b******"],
        ["a", "a******a", "a******b******c", "a************b", "a *** b"],
    ),
]


@pytest.mark.parametrize(
    ("check_id", "arguments", "good", "bad"),
    CASES,
    ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)],
)
def test_checks(check_id: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert problem_of(check_id, arguments) is None
    for text in good:
        assert CHECKS[check_id](text, **arguments) is True, text
    for text in bad:
        assert CHECKS[check_id](text, **arguments) is False, text


def test_every_check_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)


def test_fractions() -> None:
    ids = ("punctuation:no_comma", "startend:quotation", "change_case:english_lowercase")
    checks: list[tuple[str, dict[str, Any]]] = [(check_id, {}) for check_id in ids]
    assert fraction_followed('"abc"', checks) == 1.0
    assert fraction_followed("abc", checks) == pytest.approx(2 / 3)
    assert fraction_followed("A, c", checks) == 0.0
    assert fraction_followed("anything", []) == 1.0
    assert fraction_followed("", []) == 1.0
    assert fraction_followed(" \n", checks) == 0.0, "an empty response follows nothing"


def test_a_check_that_raises_counts_as_not_followed() -> None:
    with pytest.raises(TypeError):
        CHECKS["startend:end_checker"]("text")
    assert fraction_followed("text", [("startend:end_checker", {}), ("no:such", {})]) == 0.0


def test_fences_are_removed_for_all_checks_but_json() -> None:
    text = '```json\n{"a": 1}\n```'
    first = {"num_words": 3, "relation": "at least"}  # json, a, 1 with the fences
    checks = [("detectable_format:json_format", {}), ("length_constraints:number_words", first)]
    assert CHECKS["length_constraints:number_words"](text, **first)
    assert fraction_followed(text, checks) == 0.5
    other = [("detectable_format:json_format", {})]
    assert fraction_followed('```python\n{"a": 1}\n```', other) == 0.0, "it says what it is"


def test_sentences_against_hand_made_splits() -> None:
    assert sentences("A b. C d? E!") == ["A b.", "C d?", "E!"]
    assert sentences("version 1.2 is out") == ["version 1.2 is out"]
    assert sentences("") == []


@pytest.mark.parametrize(
    ("check_id", "arguments", "message"),
    [
        ("punctuation:no_coma", {}, "no check; did you mean 'punctuation:no_comma'?"),
        ("language:response_language", {"language": "de"}, "detector of languages"),
        ("keywords:existence", {}, "no 'keywords'"),
        ("keywords:existence", {"keywords": "cat"}, "a list of texts is needed"),
        ("keywords:existence", {"keywords": []}, "a list of texts is needed"),
        ("keywords:existence", {"keywords": ["a"], "n": 1}, "the argument 'n'; it takes keywords"),
        ("punctuation:no_comma", {"n": 1}, "the argument 'n'; it takes none"),
        ("length_constraints:number_words", {"num_words": 2.5} | LESS, "a whole number is needed"),
        ("length_constraints:number_words", {"num_words": True} | LESS, "a whole number is needed"),
        (
            "length_constraints:number_words",
            {"num_words": 2, "relation": "around"},
            "relation='around'; allowed are less than, at least",
        ),
        ("startend:end_checker", {"end_phrase": 3}, "text is needed"),
    ],
)
def test_bad_checks_are_named(check_id: str, arguments: dict[str, Any], message: str) -> None:
    problem = problem_of(check_id, arguments)
    assert problem is not None
    assert message in problem


def test_arguments_of_columnar_files() -> None:
    filled = {"num_words": 3.0, "relation": "at least", "keywords": None, "ratio": 0.5}
    plain = plain_arguments(filled)
    assert plain == {"num_words": 3, "relation": "at least", "ratio": 0.5}
    assert isinstance(plain["num_words"], int)
    assert plain_arguments(None) == {}
