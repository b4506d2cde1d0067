"""Arithmetic that a model wrote, read safely: parsed by ``ast`` under limits, never evaluated.

Allowed are numbers, ``+ - * /``, unary minus and parentheses. All else is an outcome to count, not
an exception: powers, floor division, names, calls, huge numbers, division by zero. Values are exact
fractions. Work is bounded by the length of the text, which is checked first.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction


class ExpressionError(StrEnum):
    """Why an expression has no value."""

    EMPTY = "empty"
    TOO_LONG = "too_long"
    BAD_CHARACTER = "bad_character"
    TOO_DEEP = "too_deep"
    TOO_MANY_PARTS = "too_many_parts"
    BIG_NUMBER = "big_number"
    BAD_SYNTAX = "bad_syntax"
    NOT_ALLOWED = "not_allowed"
    DIVISION_BY_ZERO = "division_by_zero"


@dataclass(frozen=True)
class Limits:
    """How much an expression may hold [our choice: far above what six numbers need].

    Args:
        length: Characters.
        depth: Levels of the tree, and of nested parentheses.
        parts: Numbers and operators.
        digits: Digits of one number.
        is_decimal: Whether numbers may have a decimal point.
    """

    length: int = 200
    depth: int = 40
    parts: int = 80
    digits: int = 12
    is_decimal: bool = False


class _Refused(Exception):
    """Carries the reason out of the walk."""


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# ASCII only: \d would also match digits of other scripts. Letters are out, so no 1e9, 0x1 or 1j.
_CHARACTERS = re.compile(r"[0-9+\-*/(). \t\r\n]*", re.ASCII)
_NUMBER = re.compile(r"[0-9.]+", re.ASCII)
_DIGITS = re.compile(r"[0-9]+", re.ASCII)
DEFAULT_LIMITS = Limits()


def evaluate_expression(
    text: str, *, limits: Limits = DEFAULT_LIMITS
) -> Fraction | ExpressionError:
    """The exact value of an expression, or why it has none. Never raises, never slow.

    Args:
        text: What was written.
        limits: How much it may hold.

    Example:
        >>> evaluate_expression("(1 + 2) / 4")
        Fraction(3, 4)
        >>> evaluate_expression("10**10**10").value
        'not_allowed'
    """
    try:
        return _Walk(text, limits).value(_parse(text, limits), 1)
    except _Refused as refused:
        return ExpressionError(refused.args[0])


def _parse(text: str, limits: Limits) -> ast.expr:
    """The tree of a text that is short and shallow enough for Python's own parser."""
    if len(text) > limits.length:
        raise _Refused(ExpressionError.TOO_LONG)
    text = text.strip()
    if not text:
        raise _Refused(ExpressionError.EMPTY)
    if not _CHARACTERS.fullmatch(text) or ("." in text and not limits.is_decimal):
        raise _Refused(ExpressionError.BAD_CHARACTER)
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth > limits.depth:
            raise _Refused(ExpressionError.TOO_DEEP)
    if any(len(number) > limits.digits for number in _NUMBER.findall(text)):
        raise _Refused(ExpressionError.BIG_NUMBER)
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _Refused(ExpressionError.BAD_SYNTAX) from error


class _Walk:
    """One walk over a tree; it counts what it meets."""

    def __init__(self, text: str, limits: Limits) -> None:
        self.text, self.limits, self.parts = text.strip(), limits, 0

    def value(self, node: ast.expr, depth: int) -> Fraction:
        self.parts += 1
        if depth > self.limits.depth:
            raise _Refused(ExpressionError.TOO_DEEP)
        if self.parts > self.limits.parts:
            raise _Refused(ExpressionError.TOO_MANY_PARTS)
        match node:
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                first, second = self.value(left, depth + 1), self.value(right, depth + 1)
                if isinstance(op, ast.Div) and second == 0:
                    raise _Refused(ExpressionError.DIVISION_BY_ZERO)
                return _OPERATORS[type(op)](first, second)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand, depth + 1)
            case ast.Constant(value=int() | float()):
                # From the text, not from the float: 0.1 is one tenth.
                return Fraction(ast.get_source_segment(self.text, node) or "")
        raise _Refused(ExpressionError.NOT_ALLOWED)


def digit_runs(text: str) -> list[int]:
    """All runs of ASCII digits as integers, in order; the first 40 digits of each.

    Args:
        text: What was written; ``2.5`` holds the runs 2 and 5.
    """
    return [int(run[:40]) for run in _DIGITS.findall(text)]
