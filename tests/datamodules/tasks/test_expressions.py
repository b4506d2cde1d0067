"""Expressions: exact values, every refusal a counted outcome, and nothing slow."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from datamodules.tasks.expressions import (
    ExpressionError,
    Limits,
    digit_runs,
    evaluate_expression,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 4 - 3", 3),
        ("100 / 10 / 5", 2),
        ("7 / 2", Fraction(7, 2)),
        ("-3 + 5", 2),
        ("--3", 3),
        ("2 * -3", -6),
        ("1 / 3 * 3", 1),
        ("  (1\n+ 2)\t", 3),
        ("00", 0),
        ("999999999999 * 999999999999", 999999999999**2),
    ],
)
def test_value(text: str, value: int | Fraction) -> None:
    assert evaluate_expression(text) == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("10**10**10", "not_allowed"),
        ("2**3", "not_allowed"),
        ("7//2", "not_allowed"),
        ("+1", "not_allowed"),
        ("1(2)", "not_allowed"),
        ("()", "not_allowed"),
        ("7 % 2", "bad_character"),
        ("abs(1)", "bad_character"),
        ("(1).real", "bad_character"),
        ("__import__('os')", "bad_character"),
        ("1e9", "bad_character"),
        ("0x10", "bad_character"),
        ("1_000", "bad_character"),
        ("2.5", "bad_character"),
        ("\u0663 + 1", "bad_character"),
        ("\u00b2", "bad_character"),
        ("\uff11 + 1", "bad_character"),
        ("1 \u2212 2", "bad_character"),
        ("1\x00", "bad_character"),
        ("\ud800", "bad_character"),
        ("007", "bad_syntax"),
        ("1 2", "bad_syntax"),
        ("1 +", "bad_syntax"),
        ("(1", "bad_syntax"),
        ("1)", "bad_syntax"),
        ("1\n+ 2", "bad_syntax"),
        ("1 / 0", "division_by_zero"),
        ("1 / (2 - 2)", "division_by_zero"),
        ("0 / 0", "division_by_zero"),
        ("9" * 13, "big_number"),
        ("9" * 100_000, "too_long"),
        ("(" * 1000 + "1" + ")" * 1000, "too_long"),
        ("(" * 90 + "1" + ")" * 90, "too_deep"),
        ("-" * 150 + "1", "too_deep"),
        ("1" + "+1" * 60, "too_deep"),
        ("(1+1+1+1+1+1+1+1)*" * 9 + "(1+1+1+1)", "too_many_parts"),
    ],
)
def test_refusals(text: str, error: str) -> None:
    assert evaluate_expression(text) == ExpressionError(error)


def test_nesting_within_the_length_is_still_refused() -> None:
    deep = Limits(length=10_000)
    assert evaluate_expression("(" * 1000 + "1" + ")" * 1000, limits=deep) == "too_deep"
    assert evaluate_expression("(" * 30 + "1" + ")" * 30) == 1


def test_decimals_are_exact_where_allowed() -> None:
    decimal = Limits(is_decimal=True)
    assert evaluate_expression("0.1 + 0.2", limits=decimal) == Fraction(3, 10)
    assert evaluate_expression("2.5 * 4", limits=decimal) == 10
    for text in ("...", "1..2", "1.2.3", "."):
        assert isinstance(evaluate_expression(text, limits=decimal), ExpressionError)


def test_random_trees_agree_with_fractions() -> None:
    """Against values computed beside the text, not from it."""
    rng = random.Random(0)

    def tree(depth: int) -> tuple[str, Fraction | None]:
        if depth == 0 or rng.random() < 0.2:
            number = rng.randint(0, 12)
            return str(number), Fraction(number)
        (left, a), (right, b) = tree(depth - 1), tree(depth - 1)
        sign = rng.choice("+-*/")
        if a is None or b is None or (sign == "/" and b == 0):
            return f"({left}{sign}{right})", None
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]
        return f"({left}{sign}{right})", value

    undefined = 0
    for _ in range(500):
        text, value = tree(4)
        expected = ExpressionError.DIVISION_BY_ZERO if value is None else value
        undefined += value is None
        assert evaluate_expression(text) == expected, text
    assert 10 < undefined < 490


@pytest.mark.filterwarnings("error")
def test_noise_never_raises_and_is_fast() -> None:
    rng, began = random.Random(1), time.process_time()
    for size in range(2000):
        text = "".join(rng.choices("0123456789+-*/(). \n", k=size % 200))
        evaluate_expression(text, limits=Limits(is_decimal=True))
    assert time.process_time() - began < 5


def test_digit_runs() -> None:
    assert digit_runs("(12+3)*012 - 2.5") == [12, 3, 12, 2, 5]
    assert digit_runs("\u0663") == []
    assert digit_runs("1" * 100_000) == [int("1" * 40)]
