"""The sentences of PriorWorld: words, templates, and texts that know where their facts stand.

A statement is a fact about a noun (one attribute, or colour and place) or a relation between two
names. Each kind has four templates or more of one meaning; the first is the canonical one
[card, section 4]. Templates are words parted by spaces, ``{...}`` are filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from datamodules.tasks.compression import Slot, SlotKind

COLOURS = (
    "red", "blue", "green", "white", "black", "yellow", "brown", "grey",
    "pink", "purple", "orange", "golden", "silver", "violet", "beige", "teal",
)  # fmt: skip
MATERIALS = (
    "wood", "stone", "glass", "iron", "paper", "wool", "clay", "leather", "copper", "rubber",
)  # fmt: skip
PLACES = (
    "kitchen", "garden", "cellar", "attic", "office", "garage", "hall", "library", "barn", "cabin",
    "station", "market",
)  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
NOUNS = (
    "apple", "lamp", "chair", "book", "bottle", "clock", "basket", "drum", "kite", "mirror",
    "pillow", "ladder", "ring", "shoe", "table", "vase", "wagon", "bell", "candle", "door",
    "flute", "glove", "hammer", "jar", "key", "letter", "map", "needle", "plate", "rope",
    "spoon", "tent", "umbrella", "violin", "window", "anchor", "brush", "coat", "desk", "fence",
)  # fmt: skip
NONCE = (
    "blick", "dax", "fep", "gorp", "lorp", "nupe", "tove", "wug", "zav", "mib", "pim", "kiki",
)  # fmt: skip
NAMES = (
    "alice", "bob", "carol", "david", "emma", "frank", "grace", "henry", "irene", "jack",
    "karen", "leo", "maria", "nick", "olga", "peter", "quinn", "rosa", "sam", "tina",
)  # fmt: skip
#: Base form and the form behind "was", which is also the past.
VERBS = (
    ("help", "helped"), ("push", "pushed"), ("call", "called"), ("chase", "chased"),
    ("follow", "followed"), ("watch", "watched"), ("thank", "thanked"), ("visit", "visited"),
    ("blame", "blamed"), ("warn", "warned"), ("greet", "greeted"), ("answer", "answered"),
)  # fmt: skip

#: Attributes of a fact -> templates in which the noun stands before every value.
NOUN_FIRST = {
    ("colour",): (
        "the {noun} is {colour} .", "the {noun} looks {colour} .",
        "there is a {noun} that is {colour} .", "the {noun} has a {colour} look .",
    ),
    ("material",): (
        "the {noun} is made of {material} .", "the {noun} consists of {material} .",
        "there is a {noun} of {material} .", "the {noun} looks like {material} .",
    ),
    ("place",): (
        "the {noun} is in the {place} .", "the {noun} stands in the {place} .",
        "there is a {noun} in the {place} .", "you find the {noun} in the {place} .",
    ),
    ("number",): (
        "the {noun} has {number} parts .", "the {noun} consists of {number} parts .",
        "there is a {noun} with {number} parts .", "you find the {noun} in {number} parts .",
    ),
    ("colour", "place"): (
        "the {noun} in the {place} is {colour} .",
        "the {noun} that is {colour} is in the {place} .",
        "you find the {noun} in the {place} that is {colour} .",
        "there is a {noun} in the {place} that looks {colour} .",
    ),
}  # fmt: skip
#: Templates in which a value stands before the noun: a decoder says it before its prior can act.
VALUE_FIRST = {
    ("colour",): ("there is a {colour} {noun} .", "you find a {colour} {noun} ."),
    ("material",): ("of {material} is the {noun} .", "{material} is what the {noun} is made of ."),
    ("place",): ("in the {place} there is a {noun} .", "in the {place} stands the {noun} ."),
    ("number",): ("of {number} parts is the {noun} .", "there are {number} parts of the {noun} ."),
    ("colour", "place"): (
        "the {colour} {noun} is in the {place} .", "in the {place} there is a {colour} {noun} .",
        "there is a {colour} {noun} in the {place} .", "the {place} has a {colour} {noun} .",
    ),
}  # fmt: skip
RELATION = (
    "{agent} {past} {patient} .", "{patient} was {past} by {agent} .",
    "it was {agent} who {past} {patient} .", "it was {patient} whom {agent} {past} .",
)  # fmt: skip
NEGATED = (
    "{agent} did not {base} {patient} .", "{patient} was not {past} by {agent} .",
    "it was {agent} who did not {base} {patient} .",
    "it was {patient} whom {agent} did not {base} .",
)  # fmt: skip
QUESTIONS = {
    "colour": "what colour is the {noun} ?",
    "material": "what is the {noun} made of ?",
    "place": "where is the {noun} ?",
    "number": "what number of parts has the {noun} ?",
    "agent": "who {past} somebody ?",
    "negation": "did {agent} {base} {patient} ?",
}


def fact_templates(attributes: tuple[str, ...], noun_first: bool) -> tuple[str, ...]:
    """Templates of a fact, the canonical one first.

    Args:
        attributes: That it tells.
        noun_first: Only those with the noun before the values; else the card's canonical one
            ("the red apple is in the hall .") leads where there is one.

    Returns:
        Four or more.
    """
    if noun_first:
        return NOUN_FIRST[attributes]
    both = NOUN_FIRST[attributes], VALUE_FIRST[attributes]
    return both[1] + both[0] if len(attributes) > 1 else both[0] + both[1]


def grammar_words() -> list[str]:
    """Words of all templates and questions that are not filled in."""
    fact = [t for group in (NOUN_FIRST, VALUE_FIRST) for found in group.values() for t in found]
    texts = [*fact, *RELATION, *NEGATED, *QUESTIONS.values(), "yes no"]
    words = [word for text in texts for word in text.split() if not word.startswith("{")]
    return list(dict.fromkeys(words))


@dataclass(frozen=True)
class Mention:
    """A fact of a sentence and the words that tell it.

    Args:
        key: As in ``Slot``.
        kind: As in ``Slot``.
        value: As in ``Slot``.
        prior: As in ``Slot``.
        name: As in ``Slot``.
        words: Numbers of the words that carry the value.
    """

    key: str
    kind: SlotKind
    value: str
    prior: str | None
    name: str
    words: tuple[int, ...]


@dataclass(frozen=True)
class Sentence:
    """Words, and what they tell.

    Args:
        words: In order.
        mentions: Facts.
    """

    words: tuple[str, ...]
    mentions: tuple[Mention, ...] = ()


def fill(template: str, values: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Words of a template, and which word each blank has become.

    Args:
        template: Words parted by spaces, ``{blank}`` among them.
        values: Blank -> one word.

    Returns:
        Words, and blank -> number of its word.

    Example:
        >>> fill("the {noun} is {colour} .", {"noun": "door", "colour": "red"})[1]
        {'noun': 1, 'colour': 3}
    """
    words, blanks = _parse(template)
    filled = list(words)
    for blank, place in blanks.items():
        filled[place] = values[blank]
    return tuple(filled), blanks


def join(sentences: Sequence[Sentence]) -> tuple[str, tuple[Slot, ...]]:
    """The text of sentences, words parted by one space, and its slots with their spans.

    Args:
        sentences: In order.
    """
    slots: list[Slot] = []
    words: list[str] = []
    start = 0
    for sentence in sentences:
        spans = []
        for word in sentence.words:
            spans.append((start, start + len(word)))
            start += len(word) + 1
        words += sentence.words
        for one in sentence.mentions:
            where = tuple(spans[place] for place in one.words)
            slots.append(Slot(one.key, one.kind, one.value, one.prior, where, one.name))
    return " ".join(words), tuple(slots)


@cache
def _parse(template: str) -> tuple[list[str], dict[str, int]]:
    words = template.split()
    return words, {w[1:-1]: number for number, w in enumerate(words) if w.startswith("{")}
