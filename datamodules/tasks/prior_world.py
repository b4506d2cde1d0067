"""PriorWorld: short texts of a world with habits, and texts that break them [card, section 4].

Every noun has a typical colour, material and place, every verb a usual order of the names around
it: tables that the seed fixes. Training texts keep to them at given rates; evaluation sets break
one habit at a time, each text beside a twin that keeps it:

    pc   everything as usual                      neu  nonce nouns and free verbs: no habit at all
    cf   every attribute against its prior        neg  every relation is denied
    sw   every relation against its usual order

Nonce nouns and free verbs also stand in training texts, with uniform values and orders, so that
``neu`` measures copying and not unknown words [our choice].
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from datamodules.tasks.compression import (
    MASK,
    Context,
    DrawnWorld,
    range_problems,
)
from datamodules.tasks.prior_world_grammar import (
    COLOURS,
    MATERIALS,
    NAMES,
    NONCE,
    NOUNS,
    NUMBERS,
    PLACES,
    VERBS,
    grammar_words,
)
from datamodules.tasks.prior_world_reader import Reader, Told, find_relation
from datamodules.tasks.prior_world_writer import Habits, WorldWriter

#: Habits of the evaluation sets; each but ``neu`` differs from ``pc`` in one of them.
SETS = {
    "pc": Habits(1.0, 1.0, 0.0),
    "cf": Habits(0.0, 1.0, 0.0),
    "sw": Habits(1.0, 0.0, 0.0),
    "neu": Habits(None, 0.5, 0.0),
    "neg": Habits(1.0, 1.0, 1.0),
}


class PriorWorld(DrawnWorld):
    """Facts and relations with priors; see the module's docstring.

    A text is a pure function of ``(seed, split, index)``. ``predict`` is the split ``test``.

    Args:
        num_nouns: Nouns with typical values [card: 32].
        num_nonce: Nouns without [our choice].
        num_colours: Values of ``colour`` [card: 8].
        num_materials: Values of ``material`` [card: 6]; 0 leaves the attribute out.
        num_places: Values of ``place`` [card: 8]; 0 leaves the attribute out.
        num_numbers: Values of ``number`` (slots of kind ``number``); 0 leaves it out.
        num_names: Names [card: 16].
        num_verbs: Verbs with a usual order of names [card: 8]; each verb ranks the names in its own
            way, and the usual agent is the higher one.
        num_free_verbs: Verbs without [our choice].
        facts: Facts a text, of different nouns [card: 4].
        relations: Relations a text, of different verbs [card: 2].
        prior_rate: Share of training attributes with the typical value [card: q = 0.95].
        relation_rate: Share of training relations in their usual order [card: q_r = 0.9].
        negation_rate: Share of training relations that are denied [card: 0.1].
        free_rate: Share of training statements about nonce nouns or free verbs [our choice].
        paraphrase_rate: Share of sentences that are not in their canonical form [our choice].
        noun_first: Nouns stand before their values, so that a decoder's prior can act [card,
            section 9]; False adds templates with the value first.
        p_cf: Share of training texts in which all attributes and orders are against their priors
            [card, section 6].
        num_train: Training texts, made when they are asked for.
        num_val: Texts of each evaluation set in ``val`` [card: 512].
        num_test: Texts of each evaluation set in ``test`` [card: 512].
        seed: Of the tables and the texts.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> task = PriorWorld(num_val=2)
        >>> [one.name for one in task.evaluations("val")]
        ['pc', 'cf', 'sw', 'neu', 'neg']
    """

    name = "prior_world"

    def __init__(
        self,
        *,
        num_nouns: int = 32,
        num_nonce: int = 8,
        num_colours: int = 8,
        num_materials: int = 6,
        num_places: int = 8,
        num_numbers: int = 0,
        num_names: int = 16,
        num_verbs: int = 8,
        num_free_verbs: int = 2,
        facts: int = 4,
        relations: int = 2,
        prior_rate: float = 0.95,
        relation_rate: float = 0.9,
        negation_rate: float = 0.1,
        free_rate: float = 0.1,
        paraphrase_rate: float = 0.5,
        noun_first: bool = True,
        p_cf: float = 0.0,
        num_train: int = 64 * 1200,
        num_val: int = 512,
        num_test: int = 512,
        seed: int = 0,
    ) -> None:
        own = max(relations, 0), max(facts, 0)
        ranges = {
            "num_nouns": (num_nouns, own[1], len(NOUNS)),
            "num_nonce": (num_nonce, own[1], len(NONCE)),
            "num_colours": (num_colours, 2, len(COLOURS)),
            "num_materials": (num_materials, 0, len(MATERIALS)),
            "num_places": (num_places, 0, len(PLACES)),
            "num_numbers": (num_numbers, 0, len(NUMBERS)),
            "num_names": (num_names, 2, len(NAMES)),
            "num_verbs": (num_verbs, own[0], len(VERBS) - max(num_free_verbs, 0)),
            "num_free_verbs": (num_free_verbs, own[0], len(VERBS)),
            "facts": (facts, 1, len(NONCE)),
            "relations": (relations, 0, len(VERBS) // 2),
            "num_train": (num_train, 1, None),
            "num_val": (num_val, 0, None),
            "num_test": (num_test, 0, None),
        }
        shares = {
            "prior_rate": prior_rate,
            "relation_rate": relation_rate,
            "negation_rate": negation_rate,
            "free_rate": free_rate,
            "paraphrase_rate": paraphrase_rate,
            "p_cf": p_cf,
        }
        problems = range_problems(ranges, shares)
        problems += [
            f"data.task.{key}=1 must be 0 (none) or at least 2: one value is no choice"
            for key in ("num_materials", "num_places", "num_numbers")
            if ranges[key][0] == 1
        ]
        if problems:
            raise ValueError("; ".join(problems))
        super().__init__(num_train=num_train, num_val=num_val, num_test=num_test)
        self.relations, self.seed = relations, seed
        self.p_cf = p_cf
        self.habits = Habits(prior_rate, relation_rate, negation_rate)
        self.nouns, self.nonce = NOUNS[:num_nouns], NONCE[:num_nonce]
        self.names = NAMES[:num_names]
        self.verbs = VERBS[:num_verbs]
        self.free_verbs = VERBS[num_verbs : num_verbs + num_free_verbs]
        sizes = {"colour": num_colours, "material": num_materials, "place": num_places}
        words = {"colour": COLOURS, "material": MATERIALS, "place": PLACES, "number": NUMBERS}
        sizes["number"] = num_numbers
        self.values = {name: words[name][:size] for name, size in sizes.items() if size}
        self.writer = WorldWriter(
            values=self.values,
            nouns=(self.nouns, self.nonce),
            verbs=(self.verbs, self.free_verbs),
            names=self.names,
            facts=facts,
            relations=relations,
            free_rate=free_rate,
            paraphrase_rate=paraphrase_rate,
            noun_first=noun_first,
            key=f"{self.name}/{seed}/tables",
        )
        self.reader = Reader(
            [*self.nouns, *self.nonce], self.values, self.names, [*self.verbs, *self.free_verbs]
        )

    # ---------------------------------------------------------------- what a task is

    def vocabulary(self) -> list[str]:
        """All words of the world, those of questions, and ``<mask>``."""
        values = [word for words in self.values.values() for word in words]
        verbs = [form for verb in (*self.verbs, *self.free_verbs) for form in verb]
        words = [*self.nouns, *self.nonce, *values, *self.names, *verbs, *grammar_words(), MASK]
        return list(dict.fromkeys(words))

    def hidden_words(self) -> list[str]:
        """Values of attributes: a noun tells them, while nothing else tells a hidden name."""
        return [word for words in self.values.values() for word in words]

    def set_names(self) -> list[str]:
        """``pc``, ``cf``, ``sw``, ``neu`` and ``neg``; without relations no ``sw`` and ``neg``."""
        return [name for name in SETS if self.relations or name not in ("sw", "neg")]

    def read(self, context: Context, text: str) -> Mapping[str, str | None]:
        """Parse a text, whatever the order and wording of its sentences.

        Args:
            context: The source.
            text: What was decoded; None for what it lost or tells in two ways.
        """
        facts, told = self.reader.facts(text), self.reader.relations(text)
        found: dict[str, str | None] = {slot.key: facts.get(slot.key) for slot in context.slots}
        for slot in context.slots:
            if slot.kind == "relation":
                agent, verb, patient = slot.value.split()
                one = find_relation(told, Told(agent, verb, patient, False))
                found[slot.key] = one.value if one else None
                found[f"{verb}/negation"] = None if one is None else ("no", "yes")[one.negated]
        return found

    def pretraining_contexts(self, seed: int, step: int, count: int) -> list[Context]:
        """Texts at the training rates, none of them against its priors as a whole (``p_cf``)."""
        return self._fresh("pretrain", self.habits, seed, step, count)

    def neutral_contexts(self, seed: int, step: int, count: int) -> list[Context]:
        """Texts of the same grammar with uniform values, orders and denials."""
        negation = 0.5 if self.habits.negation else 0.0
        return self._fresh("neutral", Habits(None, 0.5, negation), seed, step, count)

    # ---------------------------------------------------------------- how texts are made

    def _fresh(self, kind: str, habits: Habits, seed: int, step: int, count: int) -> list[Context]:
        keys = [f"{self.name}/{self.seed}/{kind}/{seed}/{step}/{i}" for i in range(count)]
        plans = [(Random(key), Random(f"{key}/values")) for key in keys]
        return [
            self.writer.write("", self.writer.plan(rng), habits, values) for rng, values in plans
        ]

    def training_context(self, index: int) -> Context:
        """Habits at the training rates, or with probability ``p_cf`` all against their priors."""
        uid = f"{self.name}/{self.seed}/train/{index}"
        rng = Random(uid)
        against = Habits(0.0, 0.0, self.habits.negation)
        habits = against if rng.random() < self.p_cf else self.habits
        return self.writer.write(uid, self.writer.plan(rng), habits, Random(f"{uid}/values"))

    def evaluation_context(self, part: str, name: str, index: int) -> Context:
        """Index by index twins of ``pc``, but for ``neu``; see ``DrawnWorld``."""
        base = f"{self.name}/{self.seed}/{part}/evaluation"
        shared = "neu" if name == "neu" else "pc"
        plan = self.writer.plan(Random(f"{base}/{shared}/{index}"), float(name == "neu"))
        uid, values = f"{base}/{name}/{index}", Random(f"{base}/{name}/{index}/values")
        twin = "" if name in ("pc", "neu") else f"{base}/pc/{index}"
        return self.writer.write(uid, plan, SETS[name], values, twin)
