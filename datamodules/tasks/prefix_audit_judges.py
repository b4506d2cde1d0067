"""Cases, step truth, noisy judges and words of the prefix-audit task; its options' checks.

A case is a query of ``L`` digits in base ``B`` and two claimed sequences of running sums. An
analysis is a tuple of ``4 L + 2`` values in the order in which it is written: ``x, g, m1, m2``
for every step (digit, running sum, mark of response 1, mark of response 2), then the two counts
of crosses. A mark is 1 for a tick and 0 for a cross.

Two judges write imperfect analyses for the warm start [our choice; rates of the second trial of
our ReflectRM card, section 9, where two-stage inference with them is measured]:

* The lenient judge has a *systematic* fault: it ticks a wrong 0 of response 1. Samples share it,
  so a vote cannot average it out, and it is visible in the analysis.
* Broad noise makes errors of every kind; it teaches the reflection what an error looks like.

[our choice] A mark is judged against the running sum *written in the analysis*, so that every
value has one right answer given what was written before it; :func:`right_value` is that answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
U = TypeVar("U")
TICK, CROSS = 1, 0
FIELDS_PER_STEP = 4
FIELDS = ("x", "g", "m1", "m2", "n1", "n2")
NOUNS = {"pref": "response", "refl": "critique"}


class Case(NamedTuple):
    """One comparison as numbers.

    Args:
        query: The digits to add up.
        claims: Claimed running sums of response 1 and of response 2.
    """

    query: tuple[int, ...]
    claims: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class CaseShape:
    """How cases are drawn; the options of the same names of ``PrefixAudit``."""

    base: int = 3
    length: int = 4
    max_better_errors: int = 3
    max_gap: int = 2


@dataclass(frozen=True)
class JudgeNoise:
    """Error rates of both judges; the options of the same names of ``PrefixAudit``."""

    lenient: float = 0.7
    stray: float = 0.02
    sum_slip: float = 0.02
    broad_sum: float = 0.08
    broad_mark: float = 0.08
    broad_count: float = 0.04
    broad_share: float = 0.5


def running_sums(query: Sequence[int], base: int) -> tuple[int, ...]:
    """True running sums modulo ``base``.

    Example:
        >>> running_sums((2, 0, 1, 1), 3)
        (2, 2, 0, 1)
    """
    sums, total = [], 0
    for digit in query:
        total = (total + digit) % base
        sums.append(total)
    return tuple(sums)


def num_wrong(case: Case, base: int) -> tuple[int, int]:
    """Wrong positions of response 1 and of response 2 with respect to the true sums."""
    truth = running_sums(case.query, base)
    first, second = (
        sum(claimed != right for claimed, right in zip(claims, truth, strict=True))
        for claims in case.claims
    )
    return first, second


def _other(rng: Random, value: int, base: int) -> int:
    """A uniform digit that is not ``value``."""
    return (value + 1 + int(rng.random() * (base - 1))) % base


def draw_case(rng: Random, shape: CaseShape) -> tuple[Case, int]:
    """A fresh case and the slot (1 or 2) of its better response.

    The better response has 0 to ``max_better_errors`` wrong positions (at most ``length - 1``),
    the worse one 1 to ``max_gap`` more (at most ``length``); slots are random.
    """
    base, length = shape.base, shape.length
    query = tuple(int(rng.random() * base) for _ in range(length))
    truth = running_sums(query, base)
    few = rng.randint(0, min(shape.max_better_errors, length - 1))
    many = min(length, few + rng.randint(1, shape.max_gap))
    responses = []
    for num_errors in (few, many):
        claims = list(truth)
        for position in rng.sample(range(length), num_errors):
            claims[position] = _other(rng, claims[position], base)
        responses.append(tuple(claims))
    if rng.random() < 0.5:
        return Case(query, (responses[0], responses[1])), 1
    return Case(query, (responses[1], responses[0])), 2


def right_value(case: Case, prefix: Sequence[int], base: int) -> int:
    """The locally right value of an analysis after ``prefix``, its first values.

    The digit is the query's; the sum continues the last sum of the prefix by the query's digit;
    a mark compares the claim with the sum in the prefix; a count is the number of crosses in
    the prefix. Values after the prefix are not looked at.
    """
    position = len(prefix)
    step, field = divmod(position, FIELDS_PER_STEP)
    length = len(case.query)
    if step == length:
        return sum(prefix[FIELDS_PER_STEP * t + 2 + field] == CROSS for t in range(length))
    if field == 0:
        return case.query[step]
    if field == 1:
        previous = prefix[position - FIELDS_PER_STEP] if step else 0
        return (previous + case.query[step]) % base
    return TICK if case.claims[field - 2][step] == prefix[FIELDS_PER_STEP * step + 1] else CROSS


def gold_values(case: Case, base: int) -> tuple[int, ...]:
    """The one analysis that is locally right everywhere."""
    values: list[int] = []
    for _ in range(FIELDS_PER_STEP * len(case.query) + 2):
        values.append(right_value(case, values, base))
    return tuple(values)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Position of the first value in which two analyses differ, None where they are equal."""
    for position, (left, right) in enumerate(zip(first, second, strict=True)):
        if left != right:
            return position
    return None


def better_slot(case: Case, first: Sequence[int], second: Sequence[int], base: int) -> int | None:
    """Slot of the analysis that is locally right at the first difference.

    Returns:
        1 or 2; None where the analyses are equal or neither is right there.
    """
    position = first_difference(first, second)
    if position is None:
        return None
    right = right_value(case, first[:position], base)
    if first[position] == right:
        return 1
    return 2 if second[position] == right else None


def verdict_of(values: Sequence[int]) -> int:
    """The verdict that follows from the counts: fewer crosses win, a tie goes to slot 1."""
    return 1 if values[-2] <= values[-1] else 2


def lenient_values(rng: Random, case: Case, base: int, noise: JudgeNoise) -> tuple[int, ...]:
    """An analysis of the lenient judge.

    A wrong digit of response 1 that claims 0 is ticked with probability ``lenient``, any other
    wrong digit with ``stray``; a running sum slips with ``sum_slip`` and the slip propagates;
    right digits are always ticked; counts follow the marks.
    """
    draw, total, crosses = rng.random, 0, [0, 0]
    values: list[int] = []
    for digit, first, second in zip(case.query, *case.claims, strict=True):
        total = (total + digit) % base
        if draw() < noise.sum_slip:
            total = _other(rng, total, base)
        rate = noise.lenient if first == 0 else noise.stray
        mark_1 = TICK if first == total or draw() < rate else CROSS
        mark_2 = TICK if second == total or draw() < noise.stray else CROSS
        crosses[0] += mark_1 == CROSS
        crosses[1] += mark_2 == CROSS
        values += (digit, total, mark_1, mark_2)
    return (*values, *crosses)


def broad_values(rng: Random, case: Case, base: int, noise: JudgeNoise) -> tuple[int, ...]:
    """An analysis with errors of every kind, each at its own rate.

    Each sum is wrong with ``broad_sum`` and the next one continues from it [our choice: as a
    slip of the lenient judge does]; each mark is flipped with ``broad_mark``; each count follows
    the marks or, with ``broad_count``, is uniform on 0 to ``length``.
    """
    draw, total, crosses = rng.random, 0, [0, 0]
    values: list[int] = []
    for digit, *claims in zip(case.query, *case.claims, strict=True):
        total = (total + digit) % base
        if draw() < noise.broad_sum:
            total = _other(rng, total, base)
        values += (digit, total)
        for slot, claimed in enumerate(claims):
            is_tick = (claimed == total) != (draw() < noise.broad_mark)
            crosses[slot] += not is_tick
            values.append(TICK if is_tick else CROSS)
    for count in crosses:
        is_random = draw() < noise.broad_count
        values.append(rng.randint(0, len(case.query)) if is_random else count)
    return tuple(values)


def either_values(rng: Random, case: Case, base: int, noise: JudgeNoise) -> tuple[int, ...]:
    """An analysis of broad noise with probability ``broad_share``, else of the lenient judge."""
    judge = broad_values if rng.random() < noise.broad_share else lenient_values
    return judge(rng, case, base, noise)


@dataclass(frozen=True)
class Lexicon(Generic[T]):
    """The words of the task, or their token ids, and how they are strung together.

    Args:
        steps: Step numbers ``#0`` to ``#L``.
        query: Digits of the query, claims of response 1, claims of response 2.
        fields: Words of the analysis, of critique 1 and of critique 2; each a tuple for the
            fields ``x g m1 m2 n1 n2`` with one word for each value.
        verdicts: Domain to the verdict words of slot 1 and slot 2.
        asks: Domain to the last word of its prompts.
    """

    steps: tuple[T, ...]
    query: tuple[tuple[T, ...], ...]
    fields: tuple[tuple[tuple[T, ...], ...], ...]
    verdicts: dict[str, tuple[T, ...]]
    asks: dict[str, T]

    def map(self, function: Callable[[T], U]) -> Lexicon[U]:
        """The same lexicon with ``function`` applied to every word."""

        def each(words: tuple[T, ...]) -> tuple[U, ...]:
            return tuple(function(word) for word in words)

        return Lexicon(
            each(self.steps),
            tuple(each(words) for words in self.query),
            tuple(tuple(each(words) for words in voice) for voice in self.fields),
            {domain: each(words) for domain, words in self.verdicts.items()},
            {domain: function(word) for domain, word in self.asks.items()},
        )

    def question(self, case: Case) -> list[T]:
        """``#t x r1 r2`` for every step."""
        digits, first, second = self.query
        out: list[T] = []
        rows = zip(self.steps, case.query, *case.claims, strict=False)  # one step number more
        for step, digit, claim_1, claim_2 in rows:
            out += (step, digits[digit], first[claim_1], second[claim_2])
        return out

    def lines(self, voices: Sequence[int], analyses: Sequence[Sequence[int]]) -> list[T]:
        """Step numbers and values, the analyses interleaved value by value.

        Args:
            voices: For every analysis the row of ``fields`` it is written in.
            analyses: Values of every analysis.
        """
        out: list[T] = []
        for position, column in enumerate(zip(*analyses, strict=True)):
            if position % FIELDS_PER_STEP == 0:
                out.append(self.steps[position // FIELDS_PER_STEP])
            for voice, value in zip(voices, column, strict=True):
                out.append(self.table(position, voice)[value])
        return out

    def table(self, position: int, voice: int = 0) -> tuple[T, ...]:
        """What position ``position`` of an analysis may hold, in the order of the values."""
        step, field = divmod(position, FIELDS_PER_STEP)
        is_count = step == len(self.steps) - 1
        return self.fields[voice][field + FIELDS_PER_STEP if is_count else field]

    def everything(self) -> list[T]:
        """All words, each once."""
        fields = [word for voice in self.fields for table in voice for word in table]
        verdicts = [word for pair in self.verdicts.values() for word in pair]
        query = [word for table in self.query for word in table]
        return [*self.steps, *query, *fields, *verdicts, *self.asks.values()]


def make_lexicon(base: int, length: int) -> Lexicon[str]:
    """The words for digits below ``base`` and ``length`` steps."""
    digits, counts = range(base), range(length + 1)

    def voice(name: str) -> tuple[tuple[str, ...], ...]:
        sums = [tuple(f"{name}{field}{value}" for value in digits) for field in FIELDS[:2]]
        marks = [tuple(f"{name}{field}:{mark}" for mark in ("no", "ok")) for field in FIELDS[2:4]]
        ends = [tuple(f"{name}{field}={value}" for value in counts) for field in FIELDS[4:]]
        return (*sums, *marks, *ends)

    return Lexicon(
        steps=tuple(f"#{step}" for step in range(length + 1)),
        query=tuple(tuple(f"{kind}{value}" for value in digits) for kind in ("x", "r1=", "r2=")),
        fields=(voice("a."), voice("c1."), voice("c2.")),
        verdicts={key: (f"{noun}1_wins", f"{noun}2_wins") for key, noun in NOUNS.items()},
        asks={key: f"which_{noun}?" for key, noun in NOUNS.items()},
    )


def check_options(whole: dict[str, Any], shares: dict[str, Any], seed: Any) -> None:
    """Refuse values out of range, all at once."""
    bounds = {"base": (2, 10), "length": (1, 16), "max_gap": (1, None)}
    problems = []
    for key, value in {**whole, "seed": seed}.items():
        low, high = (None, None) if key == "seed" else bounds.get(key, (0, None))
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if is_whole and (low is None or value >= low) and (high is None or value <= high):
            continue
        allowed = "" if low is None else f" of at least {low}"
        allowed = f" from {low} to {high}" if high is not None else allowed
        problems.append(f"data.task.{key}={value!r}: must be a whole number{allowed}")
    for key, value in shares.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and 0.0 <= value <= 1.0):
            problems.append(f"data.task.{key}={value!r}: must be a probability from 0 to 1")
    if problems:
        raise ValueError("task 'prefix_audit' cannot be built:\n  " + "\n  ".join(problems))
