"""TwinNouns: nouns of two tokens with a typical colour each, the world of the card's second trial.

A text is facts ``a b colour``, the noun first and no filler [card, section 9]: nothing about a pair
can be told from its parts, so its colour must be copied or recalled. With ``relations`` it also
holds ``name verb name``; every verb has two names of its own and a usual order of them, so that a
hidden name can be told from the other one while the order must be copied or recalled [our choice].

    pc   every fact as usual             sw   every relation against its usual order
    cf   every colour against its prior  neu  pairs and verbs that training never shows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from datamodules.tasks.compression import (
    MASK,
    Context,
    DrawnWorld,
    Probe,
    range_problems,
)
from datamodules.tasks.prior_world_grammar import COLOURS, Mention, Sentence, join

Noun = tuple[str, str]
WHAT, WHO = "what", "who"  # words of questions


class TwinNouns(DrawnWorld):
    """Colours of two-token nouns; see the module's docstring.

    A text is a pure function of ``(seed, split, index)``. ``predict`` is the split ``test``.

    Args:
        num_first: First tokens of nouns [card: 16].
        num_second: Second tokens [card: 16]; all pairs are nouns.
        num_colours: Colours [card: 8].
        num_held_out: Nouns that training never shows [card: 25], without a typical colour; 0 for
            no set ``neu``.
        facts: Facts a text, of different nouns [card: 2].
        p_cf: Share of training texts with all colours and orders against their priors [card: 0].
        relations: Relations a text, of different verbs.
        num_names: Names, two at least where there are relations.
        num_verbs: Verbs; an eighth of them, ``relations`` at least, are held out for ``neu``.
        relation_rate: Share of training relations in their usual order [card: q_r = 0.9]; 1 leaves
            no counterexample, as there is none to the colours.
        num_train: Training texts, made when they are asked for [card: 1200 steps of 64].
        num_val: Texts of each evaluation set in ``val`` [card: 512].
        num_test: Texts of each evaluation set in ``test`` [card: 512].
        seed: Of the tables and the texts.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> len(TwinNouns().contexts("train")[0].text.split())
        6
    """

    name = "twin_nouns"

    def __init__(
        self,
        *,
        num_first: int = 16,
        num_second: int = 16,
        num_colours: int = 8,
        num_held_out: int = 25,
        facts: int = 2,
        p_cf: float = 0.0,
        relations: int = 0,
        num_names: int = 16,
        num_verbs: int = 64,
        relation_rate: float = 0.9,
        num_train: int = 64 * 1200,
        num_val: int = 512,
        num_test: int = 512,
        seed: int = 0,
    ) -> None:
        least, pairs = max(facts, 1), max(num_first, 0) * max(num_second, 0)
        fewest = 0 if num_held_out == 0 else least
        ranges = {
            "num_first": (num_first, 1, None),
            "num_second": (num_second, 1, None),
            "num_colours": (num_colours, 2, len(COLOURS)),
            "num_held_out": (num_held_out, fewest, max(pairs - least, fewest)),
            "facts": (facts, 1, None),
            "relations": (relations, 0, None),
            "num_names": (num_names, 2 if relations else 0, None),
            "num_verbs": (num_verbs, 2 * max(relations, 0), None),
            "num_train": (num_train, 1, None),
            "num_val": (num_val, 0, None),
            "num_test": (num_test, 0, None),
        }
        problems = range_problems(ranges, {"p_cf": p_cf, "relation_rate": relation_rate})
        if pairs < least + fewest:
            problems.append(
                f"data.task.num_first={num_first} times data.task.num_second={num_second} must be "
                f"at least {least + fewest} pairs for data.task.facts={facts}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        super().__init__(num_train=num_train, num_val=num_val, num_test=num_test)
        self.facts, self.relations, self.seed = facts, relations, seed
        self.p_cf, self.relation_rate = p_cf, relation_rate
        self.first = tuple(f"a{i}" for i in range(num_first))
        self.second = tuple(f"b{i}" for i in range(num_second))
        self.colours = COLOURS[:num_colours]
        self.names = tuple(f"n{i}" for i in range(num_names if relations else 0))
        self.verbs = tuple(f"v{i}" for i in range(num_verbs if relations else 0))
        self._make_tables(num_held_out)

    def _make_tables(self, num_held_out: int) -> None:
        rng = Random(f"{self.name}/{self.seed}/tables")
        nouns = [(a, b) for a in self.first for b in self.second]
        #: Nouns that training never shows.
        self.held_out: list[Noun] = rng.sample(nouns, num_held_out)
        hidden = set(self.held_out)
        #: Nouns that it shows -> typical colour.
        self.typical = {noun: rng.choice(self.colours) for noun in nouns if noun not in hidden}
        self.known = list(self.typical)
        #: Verb -> its names, the usual agent first.
        self.order = {v: tuple(rng.sample(self.names, 2)) for v in self.verbs}
        kept = len(self.verbs) - max(self.relations, len(self.verbs) // 8)
        self.known_verbs, self.free_verbs = self.verbs[:kept], self.verbs[kept:]

    def vocabulary(self) -> list[str]:
        """All words of the world, those of questions, and ``<mask>``."""
        return [
            *self.first, *self.second, *self.colours, *self.names, *self.verbs, WHAT, WHO, MASK
        ]  # fmt: skip

    def hidden_words(self) -> list[str]:
        """Colours [card], and names where there are relations."""
        return [*self.colours, *self.names]

    def set_names(self) -> list[str]:
        """``pc``, ``cf``, with held-out nouns ``neu``, with relations ``sw``."""
        neu, sw = ["neu"] if self.held_out else [], ["sw"] if self.relations else []
        return ["pc", "cf", *neu, *sw]

    def read(self, context: Context, text: str) -> Mapping[str, str | None]:
        """Look up each noun and each verb of the source in a text.

        Args:
            context: The source.
            text: What was decoded. What it tells in two ways is lost, and a relation whose verb is
                lost is looked up by its names.
        """
        words = text.split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        return {slot.key: self._look_up(slot.key, slot.value, triples) for slot in context.slots}

    def _look_up(self, key: str, value: str, triples: list[tuple[str, str, str]]) -> str | None:
        who = key.split("/")[0].split("_")
        if len(who) == 2:
            colours = {c for a, b, c in triples if [a, b] == who and c in self.colours}
            return next(iter(colours)) if len(colours) == 1 else None
        told = {t for t in triples if t[1] in self.order and {t[0], t[2]} <= set(self.names)}
        told = {t for t in told if t[0] != t[2]}
        agent, verb, patient = value.split()
        found = {t for t in told if t[1] == verb}
        found = found or {t for t in told if {t[0], t[2]} == {agent, patient}}
        return " ".join(next(iter(found))) if len(found) == 1 else None

    def pretraining_contexts(self, seed: int, step: int, count: int) -> list[Context]:
        """Texts with every colour as usual and relations at their rate, held-out nouns left out."""
        key = f"{self.name}/{self.seed}/pretrain/{seed}/{step}"
        found = []
        for i in range(count):
            rng = Random(f"{key}/{i}")
            found.append(self._write("", rng, rng, 1.0, self.relation_rate))
        return found

    def neutral_contexts(self, seed: int, step: int, count: int) -> list[Context]:
        """Texts with uniform colours and orders, of all nouns and verbs, held-out ones included."""
        key = f"{self.name}/{self.seed}/neutral/{seed}/{step}"
        everything = [*self.known, *self.held_out], self.verbs
        found = []
        for i in range(count):
            rng = Random(f"{key}/{i}")
            found.append(self._write("", rng, rng, None, 0.5, of=everything))
        return found

    def training_context(self, index: int) -> Context:
        """All habits kept, or with probability ``p_cf`` all broken; see ``DrawnWorld``."""
        uid = f"{self.name}/{self.seed}/train/{index}"
        rng = Random(uid)
        if rng.random() < self.p_cf:
            return self._write(uid, rng, rng, 0.0, 0.0)
        return self._write(uid, rng, rng, 1.0, self.relation_rate)

    def evaluation_context(self, part: str, name: str, index: int) -> Context:
        """``cf`` and ``sw`` are twins of ``pc``; see ``DrawnWorld``."""
        base = f"{self.name}/{self.seed}/{part}/evaluation"
        uid, values = f"{base}/{name}/{index}", Random(f"{base}/{name}/{index}/values")
        if name == "neu":
            free = self.held_out, self.free_verbs
            return self._write(uid, Random(uid), values, None, 0.5, of=free)
        usual, order = float(name != "cf"), float(name != "sw")
        twin = "" if name == "pc" else f"{base}/pc/{index}"
        return self._write(uid, Random(f"{base}/pc/{index}"), values, usual, order, twin=twin)

    def _write(
        self,
        uid: str,
        plan: Random,
        values: Random,
        usual: float | None,
        order: float,
        *,
        of: tuple[Sequence[Noun], Sequence[str]] | None = None,
        twin: str = "",
    ) -> Context:
        """A text: ``plan`` decides what about, ``values`` what it says (None: any colour)."""
        nouns, verbs = of or (self.known, self.known_verbs)
        about: list[Noun | str] = [*plan.sample(nouns, self.facts)]
        if self.relations:
            about += plan.sample(verbs, self.relations)
            plan.shuffle(about)
        sentences, probes = [], []
        for each in about:
            if isinstance(each, str):
                sentence, probe = self._relation(each, order, values)
            else:
                sentence, probe = self._fact(each, usual, values)
            sentences.append(sentence)
            probes.append(probe)
        text, slots = join(sentences)
        return Context(uid, text, slots, tuple(probes), twin)

    def _fact(self, noun: Noun, usual: float | None, rng: Random) -> tuple[Sentence, Probe]:
        prior, key = self.typical.get(noun), "_".join(noun) + "/colour"
        if prior is None or usual is None:
            colour = rng.choice(self.colours)
        elif rng.random() < usual:
            colour = prior
        else:
            colour = rng.choice([one for one in self.colours if one != prior])
        mention = Mention(key, "attribute", colour, prior, "colour", (2,))
        probe = Probe(f"{WHAT} {noun[0]} {noun[1]}", colour, prior, "overwriting", key)
        return Sentence((*noun, colour), (mention,)), probe

    def _relation(self, verb: str, order: float, rng: Random) -> tuple[Sentence, Probe]:
        is_free, key = verb in self.free_verbs, f"{verb}/relation"
        first, second = self.order[verb]
        prior = None if is_free else f"{first} {verb} {second}"
        agent, patient = first, second
        if rng.random() >= (0.5 if is_free else order):
            agent, patient = second, first
        words = agent, verb, patient
        mention = Mention(key, "relation", " ".join(words), prior, "", (0, 2))
        probe = Probe(f"{WHO} {verb}", agent, None if is_free else first, "drift", key)
        return Sentence(words, (mention,)), probe
