"""Reads the facts of PriorWorld out of a text, whatever the order of its sentences.

A fact about a noun is read off the words of its sentence: in every template the noun and its values
stand together, so their order does not change the meaning. A relation is read by its templates,
since there the order is the meaning. A text that says two things about one fact has lost it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datamodules.tasks.prior_world_grammar import NEGATED, RELATION


@dataclass(frozen=True)
class Told:
    """A relation as a text tells it.

    Args:
        agent: Who did it.
        verb: Base form.
        patient: To whom.
        negated: Whether it is denied.
    """

    agent: str
    verb: str
    patient: str
    negated: bool

    @property
    def value(self) -> str:
        """As in ``Slot``: ``agent verb patient``."""
        return f"{self.agent} {self.verb} {self.patient}"


class Reader:
    """The parser of a world.

    Args:
        nouns: Of the world, nonce nouns among them.
        values: Attribute -> its values; no word is a value of two attributes.
        names: Of the world.
        verbs: Base form and past of each.

    Example:
        >>> reader = Reader(["door"], {"colour": ["red"]}, ["al", "bo"], [("help", "helped")])
        >>> reader.relations("bo was not helped by al .")[0].value
        'al help bo'
    """

    def __init__(
        self,
        nouns: Sequence[str],
        values: Mapping[str, Sequence[str]],
        names: Sequence[str],
        verbs: Sequence[tuple[str, str]],
    ) -> None:
        self.nouns = set(nouns)
        self.attribute_of = {word: name for name, words in values.items() for word in words}
        self.bases = {form: base for base, past in verbs for form in (base, past)}
        blanks = {
            "agent": "|".join(names),
            "patient": "|".join(names),
            "base": "|".join(base for base, _ in verbs),
            "past": "|".join(past for _, past in verbs),
        }
        self.patterns = [
            (_pattern(template, blanks), templates is NEGATED)
            for templates in (NEGATED, RELATION)
            for template in templates
        ]

    def facts(self, text: str) -> dict[str, str | None]:
        """Values by ``noun/attribute``; None where the text says two things.

        Args:
            text: Any text.
        """
        found: dict[str, str | None] = {}
        for sentence in _sentences(text):
            nouns = {word for word in sentence if word in self.nouns}
            if len(nouns) != 1:
                continue
            noun = next(iter(nouns))
            for word in sentence:
                if word in self.attribute_of:
                    key = f"{noun}/{self.attribute_of[word]}"
                    found[key] = word if found.get(key, word) == word else None
        return found

    def relations(self, text: str) -> list[Told]:
        """All relations in their order, each sentence read once.

        Args:
            text: Any text.
        """
        told = []
        for sentence in _sentences(text):
            line = " ".join(sentence)
            for pattern, negated in self.patterns:
                if match := pattern.search(line):
                    part = match.groupdict()
                    verb = self.bases[part.get("base") or part["past"]]
                    if part["agent"] != part["patient"]:
                        told.append(Told(part["agent"], verb, part["patient"], negated))
                    break
        return told


def find_relation(told: Sequence[Told], source: Told) -> Told | None:
    """What a text tells of a relation: by its verb, else by its two names.

    Args:
        told: Relations of the text.
        source: The relation as the source has it; no other of the source has its verb.

    Returns:
        None where the text does not tell it, or tells two things about it.
    """
    names = {source.agent, source.patient}
    found = {one for one in told if one.verb == source.verb}
    found = found or {one for one in told if {one.agent, one.patient} == names}
    return next(iter(found)) if len(found) == 1 else None


def _sentences(text: str) -> list[list[str]]:
    return [part.split() for part in text.split(".")]


def _pattern(template: str, blanks: Mapping[str, str]) -> re.Pattern[str]:
    words = [
        f"(?P<{word[1:-1]}>{blanks[word[1:-1]]})" if word.startswith("{") else re.escape(word)
        for word in template.split()
        if word != "."
    ]
    return re.compile(rf"(?<!\S){' '.join(words)}(?!\S)")
