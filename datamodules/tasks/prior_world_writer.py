"""Writes the texts of PriorWorld: tables of what is usual, plans, values, sentences.

A plan says what a text tells about and in which words, habits say which values it tells: texts of
one plan are twins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from datamodules.tasks.compression import Context, Probe, SlotKind
from datamodules.tasks.prior_world_grammar import (
    NEGATED,
    NOUN_FIRST,
    QUESTIONS,
    RELATION,
    Mention,
    Sentence,
    fact_templates,
    fill,
    join,
)

T = TypeVar("T")
KINDS: Mapping[str, SlotKind] = {"number": "number"}  # of all others: attribute


@dataclass(frozen=True)
class Habits:
    """How often a text keeps to the world's habits.

    Args:
        prior: Share of attributes with their typical value, the others are uniform among the rest;
            None for uniform values.
        order: Share of relations in their usual order.
        negation: Share of relations that are denied.
    """

    prior: float | None
    order: float
    negation: float


@dataclass(frozen=True)
class Fact:
    """A statement about a noun, without values.

    Args:
        noun: Of the world.
        attributes: That it tells.
        template: In these words.
    """

    noun: str
    attributes: tuple[str, ...]
    template: str


@dataclass(frozen=True)
class Relation:
    """A statement about two names, without their order.

    Args:
        verb: Base form and past.
        names: Both, in the order for a verb without a usual one.
        template: Number of the wording.
    """

    verb: tuple[str, str]
    names: tuple[str, str]
    template: int


class WorldWriter:
    """The tables of a world and its texts.

    Args:
        values: Attribute -> its values, two at least.
        nouns: With typical values, and without.
        verbs: Base form and past, with a usual order of names, and without.
        names: Of the world.
        facts: Facts a text.
        relations: Relations a text.
        free_rate: Share of statements about nouns and verbs without a prior.
        paraphrase_rate: Share of sentences that are not in their canonical form.
        noun_first: Only templates with the noun before its values.
        key: Decides the tables.
    """

    def __init__(
        self,
        *,
        values: Mapping[str, Sequence[str]],
        nouns: tuple[Sequence[str], Sequence[str]],
        verbs: tuple[Sequence[tuple[str, str]], Sequence[tuple[str, str]]],
        names: Sequence[str],
        facts: int,
        relations: int,
        free_rate: float,
        paraphrase_rate: float,
        noun_first: bool,
        key: str,
    ) -> None:
        self.values, self.nouns, self.verbs, self.names = values, nouns, verbs, names
        self.facts, self.relations, self.noun_first = facts, relations, noun_first
        self.free_rate, self.paraphrase_rate = free_rate, paraphrase_rate
        self.frames = [each for each in NOUN_FIRST if set(each) <= set(values)]
        rng = Random(key)
        #: Noun and attribute -> typical value.
        self.typical = {
            (noun, name): rng.choice(list(options))
            for noun in nouns[0]
            for name, options in values.items()
        }
        #: Verb -> names, usual agents first.
        self.ranking = {base: rng.sample(names, len(names)) for base, _ in verbs[0]}

    def plan(self, rng: Random, free_rate: float | None = None) -> list[Fact | Relation]:
        """What a text tells and how, without the values.

        Args:
            rng: Decides.
            free_rate: In place of the world's.
        """
        rate = self.free_rate if free_rate is None else free_rate
        statements: list[Fact | Relation] = []
        for noun in _mixed(rng, *self.nouns, self.facts, rate):
            attributes = rng.choice(self.frames)
            templates = fact_templates(attributes, self.noun_first)
            statements.append(Fact(noun, attributes, templates[self._wording(rng, templates)]))
        for verb in _mixed(rng, *self.verbs, self.relations, rate):
            first, second = rng.sample(self.names, 2)
            statements.append(Relation(verb, (first, second), self._wording(rng, RELATION)))
        rng.shuffle(statements)
        return statements

    def _wording(self, rng: Random, templates: Sequence[str]) -> int:
        is_canonical = rng.random() >= self.paraphrase_rate
        other = rng.randrange(1, len(templates))
        return 0 if is_canonical else other

    def write(
        self,
        uid: str,
        plan: Sequence[Fact | Relation],
        habits: Habits,
        rng: Random,
        twin: str = "",
    ) -> Context:
        """A text of a plan, with its slots and questions.

        Args:
            uid: Of the context.
            plan: What it tells.
            habits: Which values it tells.
            rng: Decides them.
            twin: Of the context.
        """
        sentences: list[Sentence] = []
        probes: list[Probe] = []
        for each in plan:
            if isinstance(each, Fact):
                sentence, asked = self._fact(each, habits, rng)
            else:
                sentence, asked = self._relation(each, habits, rng)
            sentences.append(sentence)
            probes += asked
        text, slots = join(sentences)
        return Context(uid, text, slots, tuple(probes), twin)

    def _fact(self, fact: Fact, habits: Habits, rng: Random) -> tuple[Sentence, list[Probe]]:
        values = {name: self._value(fact.noun, name, habits, rng) for name in fact.attributes}
        words, places = fill(fact.template, {"noun": fact.noun, **values})
        mentions, probes = [], []
        for name, value in values.items():
            key, prior = f"{fact.noun}/{name}", self.typical.get((fact.noun, name))
            question = " ".join(fill(QUESTIONS[name], {"noun": fact.noun})[0])
            probes.append(Probe(question, value, prior, "overwriting", key))
            kind = KINDS.get(name, "attribute")
            mentions.append(Mention(key, kind, value, prior, name, (places[name],)))
        return Sentence(words, tuple(mentions)), probes

    def _value(self, noun: str, name: str, habits: Habits, rng: Random) -> str:
        usual = self.typical.get((noun, name))
        if usual is None or habits.prior is None:
            return rng.choice(self.values[name])
        if rng.random() < habits.prior:
            return usual
        return rng.choice([value for value in self.values[name] if value != usual])

    def _relation(
        self, relation: Relation, habits: Habits, rng: Random
    ) -> tuple[Sentence, list[Probe]]:
        base, past = relation.verb
        usual = self._usual_order(relation)
        agent, patient = usual or relation.names
        if usual and rng.random() >= habits.order:
            agent, patient = patient, agent
        negated = rng.random() < habits.negation
        template = (NEGATED if negated else RELATION)[relation.template]
        filled = {"agent": agent, "patient": patient, "base": base, "past": past}
        words, places = fill(template, filled)
        prior = f"{usual[0]} {base} {usual[1]}" if usual else None
        spots = tuple(sorted(places.values()))
        denied = tuple(i for i, word in enumerate(words) if word == "not")
        mentions = (
            Mention(f"{base}/relation", "relation", f"{agent} {base} {patient}", prior, "", spots),
            Mention(f"{base}/negation", "negation", "yes" if negated else "no", "no", "", denied),
        )
        who, did = (" ".join(fill(QUESTIONS[q], filled)[0]) for q in ("agent", "negation"))
        answer = "no" if negated else "yes"
        return Sentence(words, mentions), [
            Probe(who, agent, usual[0] if usual else None, "drift", f"{base}/relation"),
            Probe(did, answer, "yes", "drift", f"{base}/negation"),
        ]

    def _usual_order(self, relation: Relation) -> tuple[str, str] | None:
        ranking = self.ranking.get(relation.verb[0])
        if ranking is None:
            return None
        first, second = sorted(relation.names, key=ranking.index)
        return first, second


def _mixed(rng: Random, usual: Sequence[T], free: Sequence[T], count: int, rate: float) -> list[T]:
    """Different members, each of the second kind with a probability."""
    num_free = sum(rng.random() < rate for _ in range(count))
    return [*rng.sample(usual, count - num_free), *rng.sample(free, num_free)]
