"""Countdown puzzles: drawn at random, and how an answer is scored.

Scoring [code, by the TRE card, section 4] is 0 or 1: the text ends in a think block and an answer
block; the digit runs of the answer are exactly the given numbers; it holds digits, `+ - * / ( ) .`
and white space only; its value is within 1e-5 of the target. Where we differ: expressions are
parsed, so ``**`` and ``//`` are refused [our choice of the card], and values are exact fractions.
A decimal point counts as there: ``2.5`` uses the numbers 2 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from random import Random

from datamodules.sources import stable_hash
from datamodules.tasks.base import Split
from datamodules.tasks.expressions import (
    ExpressionError,
    Limits,
    digit_runs,
    evaluate_expression,
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TOLERANCE = Fraction(1, 100_000)
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_LIMITS = Limits(is_decimal=True)


class Outcome(StrEnum):
    """What became of a completion; each is a part of the reward, in this order of checks."""

    FORMAT_ERROR = "format_error"
    WRONG_NUMBERS = "wrong_numbers"
    BAD_EXPRESSION = "bad_expression"
    WRONG_VALUE = "wrong_value"
    RIGHT = "reward"


@dataclass(frozen=True)
class Puzzle:
    """Numbers to combine, each exactly once, into a target.

    Args:
        uid: Stable identity.
        numbers: In the order in which they are shown.
        target: The value to reach.
        steps: One way to reach it, as ``a + b = c`` lines; () where unknown.
        solution: The same as one expression, parts separated by spaces; "" where unknown.
        where: ``file:line`` of a puzzle from a file.
    """

    uid: str
    numbers: tuple[int, ...]
    target: int
    steps: tuple[str, ...] = ()
    solution: str = ""
    where: str = ""

    @property
    def key(self) -> str:
        """The same for equal puzzles, however their numbers are ordered."""
        return f"{sorted(self.numbers)} {self.target}"


# ---- Scoring -------------------------------------------------------------------------------------


def find_answer(text: str) -> str | None:
    """The last answer block that ends the text and follows a think block; None without one.

    Linear in the text, unlike a regular expression with two lazy groups.

    Args:
        text: A completion without its end token; one line break at its end is let through.
    """
    think, end_think, answer, end_answer = TAGS
    text = text.removesuffix("\n")
    if not text.endswith(end_answer):
        return None
    head, tag, inside = text.removesuffix(end_answer).rpartition(answer)
    head = head.rstrip()
    if not tag or not head.endswith(end_think) or think not in head.removesuffix(end_think):
        return None
    return inside


def score_answer(text: str, numbers: Sequence[int], target: int) -> Outcome:
    """What a completion is worth. Never raises, never slow.

    Args:
        text: The completion without its end token.
        numbers: Those to use.
        target: The value to reach.

    Example:
        >>> score_answer("<think></think><answer>(1+2)*3</answer>", [1, 2, 3], 9).value
        'reward'
    """
    answer = find_answer(text)
    if answer is None:
        return Outcome.FORMAT_ERROR
    if sorted(digit_runs(answer)) != sorted(numbers):
        return Outcome.WRONG_NUMBERS
    value = evaluate_expression(answer, limits=_LIMITS)
    if isinstance(value, ExpressionError):
        return Outcome.BAD_EXPRESSION
    return Outcome.RIGHT if abs(value - target) < TOLERANCE else Outcome.WRONG_VALUE


# ---- Drawing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PuzzleShape:
    """What puzzles are drawn.

    Args:
        num_operands: How many numbers, one of these.
        min_number: Smallest number.
        max_number: Largest number.
        min_target: Smallest target.
        max_target: Largest target.
        operators: Of the tree behind the target.
    """

    num_operands: tuple[int, ...] = (3, 4)
    min_number: int = 1
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100
    operators: str = "+-*/"


@dataclass(frozen=True)
class _Part:
    """A subtree: its value, its text, and how strongly its outermost operator binds."""

    value: Fraction
    text: str
    strength: int = 3


def draw_puzzle(rng: Random, shape: PuzzleShape) -> Puzzle | None:
    """A random binary tree over random numbers [our choice of the card]; None where it is refused.

    Args:
        rng: Source of randomness.
        shape: Ranges; a value that is not whole, or out of the target range, is refused.
    """
    count = rng.choice(shape.num_operands)
    numbers = [rng.randint(shape.min_number, shape.max_number) for _ in range(count)]
    parts = [_Part(Fraction(number), str(number)) for number in numbers]
    steps = []
    while len(parts) > 1:
        left, right = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice(shape.operators)
        if sign == "/" and right.value == 0:
            return None
        joined = _join(left, sign, right)
        steps.append(f"{left.value} {sign} {right.value} = {joined.value}")
        parts.append(joined)
    value = parts[0].value
    if value.denominator != 1 or not shape.min_target <= value <= shape.max_target:
        return None
    return Puzzle("", tuple(numbers), int(value), tuple(steps), parts[0].text)


def _join(left: _Part, sign: str, right: _Part) -> _Part:
    strength = _PRECEDENCE[sign]
    values = {
        "+": lambda: left.value + right.value,
        "-": lambda: left.value - right.value,
        "*": lambda: left.value * right.value,
        "/": lambda: left.value / right.value,
    }
    one = f"( {left.text} )" if left.strength < strength else left.text
    # a - (b + c), a - (b - c), a / (b * c), a / (b / c); also where it only looks odd without
    needs = right.strength < strength or (right.strength == strength and sign in "-/")
    two = f"( {right.text} )" if needs else right.text
    return _Part(values[sign](), f"{one} {sign} {two}", strength)


class DrawnPuzzles:
    """Puzzles of three splits without repetition: a pure function of its arguments.

    A hash of the puzzle tells its split, so no puzzle of one split is one of another, whatever the
    order of its numbers.

    Args:
        shape: Ranges.
        num_train: Puzzles of the split ``train``.
        num_val: Puzzles of the split ``val``.
        num_test: Puzzles of the split ``test``; ``predict`` is the same.
        seed: Of the puzzles.
    """

    def __init__(
        self, shape: PuzzleShape, *, num_train: int, num_val: int, num_test: int, seed: int
    ) -> None:
        self.shape, self.seed = shape, seed
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self._records: dict[Split, list[Puzzle]] | None = None

    def split_of(self, puzzle: Puzzle) -> Split:
        """The split that a puzzle belongs to, in proportion to the sizes."""
        place = stable_hash("split", self.seed, puzzle.key) / 2**64 * sum(self.sizes.values())
        if place < self.sizes["test"]:
            return "test"
        return "val" if place < self.sizes["test"] + self.sizes["val"] else "train"

    def records(self, split: Split) -> list[Puzzle]:
        """All puzzles of a split.

        Raises:
            ValueError: The ranges do not hold that many different puzzles.
        """
        if self._records is None:
            self._records = self._draw_all()
        return self._records["test" if split == "predict" else split]

    def _draw_all(self) -> dict[Split, list[Puzzle]]:
        rng = Random(f"countdown/{self.seed}")
        found: dict[Split, list[Puzzle]] = {"train": [], "val": [], "test": []}
        seen: set[str] = set()
        patience = 20_000  # draws without a puzzle that was wanted
        while patience and any(len(found[s]) < size for s, size in self.sizes.items()):
            patience -= 1
            puzzle = draw_puzzle(rng, self.shape)
            if puzzle is None or puzzle.key in seen:
                continue
            seen.add(puzzle.key)
            split = self.split_of(puzzle)
            if len(found[split]) < self.sizes[split]:
                uid = f"countdown/{self.seed}/{split}/{len(found[split])}"
                made = (puzzle.numbers, puzzle.target, puzzle.steps, puzzle.solution)
                found[split].append(Puzzle(uid, *made))
                patience = 20_000
        if not patience:
            there = ", ".join(
                f"{len(found[s])} of {size} for {s}" for s, size in self.sizes.items()
            )
            raise ValueError(
                f"data.task.num_train, num_val, num_test: only so many different puzzles were "
                f"found: {there}; ask for fewer, or widen data.task.max_number="
                f"{self.shape.max_number}, data.task.max_target={self.shape.max_target} or "
                f"data.task.num_operands={list(self.shape.num_operands)}"
            )
        return found

    def draw_train(self, rng: Random) -> Puzzle:
        """A fresh puzzle that is none of the splits ``val`` and ``test``.

        Args:
            rng: Source of randomness.
        """
        self.records("train")  # raises where the ranges hold (almost) nothing
        while True:
            puzzle = draw_puzzle(rng, self.shape)
            if puzzle is not None and self.split_of(puzzle) == "train":
                return puzzle
