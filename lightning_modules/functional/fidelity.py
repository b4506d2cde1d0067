"""What became of the facts of a text: kept, overwritten by the prior, or lost.

Definitions of the compressor card, section 2.1 [our choice: the paper names the failures and its
formulas were not seen]. All functions take aligned values, one a slot: what the source says, what
the world makes one expect (None: nothing) and what was decoded (None: the fact is not there).
Values are compared as they are: whoever read them out of a text has brought them into one form.

Rates leave as sums and counts (see ``sums``); ``net_overwriting`` is taken from metrics that were
added up already. ``paired_tests`` compares the marks of single slots, ``fidelity_text`` whole
texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lightning_modules.functional.sums import Metrics, masked_sum_count, means

Value = str | None

_UNITS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_DIGITS = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?")
_NUMBERS = {word: number for number, word in enumerate(_UNITS)} | {
    word: 10 * number for number, word in enumerate(_TENS, start=2)
}


@dataclass(frozen=True)
class SlotOutcomes:
    """What became of S slots, each mark a ``(S,)`` tensor of bool on the CPU.

    Args:
        right: The source's value was decoded.
        overwritten: The prior's value was decoded, and it is not the source's.
        lost: Nothing was decoded.
        conflict: There is a prior and the source contradicts it.
        agree: There is a prior and the source says the same.
    """

    right: Tensor
    overwritten: Tensor
    lost: Tensor
    conflict: Tensor
    agree: Tensor

    def metrics(self) -> Metrics:
        """The rates of the card, section 2.1.

        - ``fact_fidelity``: FF, right slots over all;
        - ``fact_fidelity_conflict``, ``fact_fidelity_agree``: the same over slots that contradict
          their prior, and over those that agree with it;
        - ``knowledge_overwriting``: KO, overwritten over slots that contradict their prior;
        - ``other_error``: 1 - KO - FF over the same slots, what was lost included;
        - ``overwriting_share``: KO / (1 - FF) over the same: of the wrong ones those that the prior
          explains. A blind choice among C values gives 1 / (C - 1);
        - ``slot_lost``: slots without a decoded value over all.

        Returns:
            ``name -> (sum, count)`` of 0-d tensors, without a prefix; a count is 0 where no slot
            is of that sort.

        Example:
            >>> found = slot_outcomes(["white", "red"], ["red", "red"], ["red", "red"]).metrics()
            >>> means(found)["fact_fidelity"], means(found)["knowledge_overwriting"]
            (0.5, 1.0)
        """
        wrong = self.conflict & ~self.right
        return {
            "fact_fidelity": masked_sum_count(self.right),
            "fact_fidelity_conflict": masked_sum_count(self.right, self.conflict),
            "fact_fidelity_agree": masked_sum_count(self.right, self.agree),
            "knowledge_overwriting": masked_sum_count(self.overwritten, self.conflict),
            "other_error": masked_sum_count(wrong & ~self.overwritten, self.conflict),
            "overwriting_share": masked_sum_count(self.overwritten, wrong),
            "slot_lost": masked_sum_count(self.lost),
        }


def slot_outcomes(
    source: Sequence[str], prior: Sequence[Value], decoded: Sequence[Value]
) -> SlotOutcomes:
    """Compare decoded values with the source and with the prior.

    Args:
        source: S values of the text.
        prior: S values that one would expect; None where there is no prior.
        decoded: S values that came back; None where the fact is lost.

    Returns:
        Marks of the S slots, in their order.

    Raises:
        ValueError: The three are not of one length.

    Example:
        >>> slot_outcomes(["white", "red"], ["red", None], ["red", "red"]).right.tolist()
        [False, True]
    """
    _same_length(source=source, prior=prior, decoded=decoded)
    rows = list(zip(source, prior, decoded, strict=True))
    return SlotOutcomes(
        right=_marks([out == said for said, _, out in rows]),
        overwritten=_marks([out is not None and out == usual != said for said, usual, out in rows]),
        lost=_marks([out is None for _, _, out in rows]),
        conflict=_marks([usual is not None and usual != said for said, usual, _ in rows]),
        agree=_marks([usual == said for said, usual, _ in rows]),
    )


def net_overwriting(metrics: Metrics, null: Metrics) -> float | None:
    """KO - KO0: overwriting beyond that of a decoder which reads another text's memory.

    Args:
        metrics: Metrics of ``slot_outcomes``, added up.
        null: The same slots decoded from shuffled memories.

    Returns:
        From -1 to 1; None where no slot contradicts its prior.

    Example:
        >>> net_overwriting({"knowledge_overwriting": (3, 4)}, {"knowledge_overwriting": (1, 4)})
        0.5
    """
    found = means(metrics).get("knowledge_overwriting")
    chance = means(null).get("knowledge_overwriting")
    return None if found is None or chance is None else found - chance


def role_flips(source: Sequence[str], decoded: Sequence[Value]) -> Tensor:
    """Relations that came back with agent and patient exchanged.

    A value is ``agent verb patient``: the first word, the words between, the last word.

    Args:
        source: S relations.
        decoded: S relations that came back; None where they are lost.

    Returns:
        ``(S,)`` bool: same verb, the two names exchanged. The mean is RF (card, section 2.1), over
        all relations, those that were lost included.

    Raises:
        ValueError: Lengths differ, or a source has fewer than three words or one name twice.

    Example:
        >>> role_flips(["ann hit bob", "ann hit bob"], ["bob hit ann", None]).tolist()
        [True, False]
    """
    _same_length(source=source, decoded=decoded)
    flips = []
    for place, (said, out) in enumerate(zip(source, decoded, strict=True)):
        parts = said.split()
        if len(parts) < 3 or parts[0] == parts[-1]:
            wanted = "'agent verb patient' with two different names"
            raise ValueError(f"source[{place}]={said!r} must be {wanted}")
        flips.append(out is not None and out.split() == [parts[-1], *parts[1:-1], parts[0]])
    return _marks(flips)


def negation_flips(source: Sequence[str], decoded: Sequence[Value]) -> Tensor:
    """Negations that came back as their opposite.

    Args:
        source: S values, ``yes`` or ``no``.
        decoded: S values that came back; anything but the opposite is no flip.

    Returns:
        ``(S,)`` bool.

    Raises:
        ValueError: Lengths differ, or a source is neither ``yes`` nor ``no``.

    Example:
        >>> negation_flips(["yes", "no", "no"], ["no", "no", None]).tolist()
        [True, False, False]
    """
    _same_length(source=source, decoded=decoded)
    opposite = {"yes": "no", "no": "yes"}
    for place, said in enumerate(source):
        if said not in opposite:
            raise ValueError(f"source[{place}]={said!r} must be 'yes' or 'no'")
    return _marks([opposite[said] == out for said, out in zip(source, decoded, strict=True)])


def number_flips(source: Sequence[str], decoded: Sequence[Value]) -> Tensor:
    """Numbers that came back as other numbers; ``3``, ``3.0`` and ``three`` are the same.

    Args:
        source: S numbers; see ``read_number``.
        decoded: S values that came back; what is no number is lost, not flipped.

    Returns:
        ``(S,)`` bool.

    Raises:
        ValueError: Lengths differ, or a source is no number.

    Example:
        >>> number_flips(["3", "1,200", "7"], ["three", "1300", "many"]).tolist()
        [False, True, False]
    """
    _same_length(source=source, decoded=decoded)
    flips = []
    for place, (said, out) in enumerate(zip(source, decoded, strict=True)):
        wanted, found = read_number(said), None if out is None else read_number(out)
        if wanted is None:
            raise ValueError(f"source[{place}]={said!r} must be a number")
        flips.append(found is not None and found != wanted)
    return _marks(flips)


def flip_metrics(name: str, flips: Tensor, right: Tensor) -> Metrics:
    """Rate of flips, and their share of the errors.

    Args:
        name: Of the flips: ``role_flip``, ``negation_flip`` or ``number_flip``.
        flips: ``(S,)`` bool.
        right: ``(S,)`` bool: the source's value was decoded, as ``SlotOutcomes`` has it. A number
            that is right in another spelling is neither.

    Returns:
        ``name`` over all slots, ``name_share`` over the wrong ones.

    Raises:
        ValueError: A slot is both right and flipped, or shapes differ.

    Example:
        >>> flips = torch.tensor([True, False, False])
        >>> means(flip_metrics("role_flip", flips, torch.tensor([False, False, True])))
        {'role_flip': 0.3333333333333333, 'role_flip_share': 0.5}
    """
    if flips.shape != right.shape or (flips & right).any():
        raise ValueError("flips and right must be (S,) and never both true")
    return {name: masked_sum_count(flips), f"{name}_share": masked_sum_count(flips, ~right)}


def read_number(text: str) -> Fraction | None:
    """The number that a text is: digits (sign, decimals, commas), or English words up to 99.

    Args:
        text: Nothing but the number.

    Returns:
        Its exact value; None where it is no such number.

    Example:
        >>> read_number("-1,200.50") == Fraction(-2401, 2), read_number("forty-two")
        (True, Fraction(42, 1))
    """
    words = text.lower().replace("-", " ").split()
    if words and all(word in _NUMBERS for word in words):
        return _spelled(text, [_NUMBERS[word] for word in words])
    plain = text.strip()
    return Fraction(plain.replace(",", "")) if _DIGITS.fullmatch(plain) else None


def exact_matches(source: Sequence[object], decoded: Sequence[object]) -> Tensor:
    """Texts that came back as they were (EM), as words, token ids or strings.

    Args:
        source: N texts.
        decoded: N texts that came back.

    Returns:
        ``(N,)`` bool.

    Raises:
        ValueError: Lengths differ.

    Example:
        >>> exact_matches([[1, 2], [3]], [[1, 2], [3, 4]]).tolist()
        [True, False]
    """
    _same_length(source=source, decoded=decoded)
    return _marks(
        [_plain(one) == _plain(other) for one, other in zip(source, decoded, strict=True)]
    )


def _plain(text: object) -> object:
    """A sequence in a form in which lists equal tuples."""
    return tuple(text) if isinstance(text, Sequence) and not isinstance(text, str) else text


def _spelled(text: str, parts: list[int]) -> Fraction | None:
    """Value of one number word, or of a ten and a unit."""
    if text.strip().startswith("-"):
        return None
    if len(parts) == 1:
        return Fraction(parts[0])
    fits = len(parts) == 2 and parts[0] >= 20 and 1 <= parts[1] <= 9
    return Fraction(sum(parts)) if fits else None


def _marks(values: list[bool]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def _same_length(**values: Sequence[object]) -> None:
    """Refuse lists of values that cannot be aligned."""
    sizes = {name: len(rows) for name, rows in values.items()}
    if len(set(sizes.values())) > 1:
        given = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise ValueError(f"values must be aligned, got {given}")
