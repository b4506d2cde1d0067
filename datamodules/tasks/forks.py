"""Fillers and forks: a walk whose uncertain places are not those that matter.

A plan of ``6 length`` positions in random order (``decisions="late"`` puts the decisions last) is
the prompt, one word a position; the completion is a walk along it, one word a position, then any
number of loop words, then the end:

    position     plan word       the warm start writes                            count
    filler       ``filler``      one of 8 synonyms, equally likely                2 length
    decision     ``lureC_asksC`` one of 4 concepts: .55 lured, .25 asked          length
    certain      ``go``          one word with probability .9985                  3 length
    behind all   (nothing)       0 to ``max_loops`` loop words, equally likely    once

The reward is 1 if every decision is the concept asked for. Fillers have more entropy than
decisions (2.08 against 1.15 nats), so branching by entropy alone wastes its chains on synonyms;
embedding rows tell the two apart: synonyms are one concept vector plus 0.3 of noise, concepts are
independent.

Where we differ from the card's sketch (section 9) [our choice]: lure and right concept stand in the
plan, so that the code can be read (the sketch's table knows nothing of it and RL would have to
invent the reading); they agree in half of the decisions, which then has probabilities .55, .15,
.15, .15 as in the sketch, and where they differ .55, .25, .1, .1. Loop words earn nothing and cost
nothing: only the length term of ROSE is against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.base import Demonstration, Split, Task

NUM_CONCEPTS, NUM_SYNONYMS, NUM_CERTAIN = 4, 8, 4
CONCEPTS = [f"turn{i}" for i in range(NUM_CONCEPTS)]
SYNONYMS = [f"and{i}" for i in range(NUM_SYNONYMS)]
CERTAIN = [f"step{i}" for i in range(NUM_CERTAIN)]
LOOP = "hm"
SYNONYM_NOISE = 0.3  # length of what is added to the concept vector of length 1
CERTAINTY = 0.9985


@dataclass(frozen=True)
class Plan:
    """One prompt.

    Args:
        uid: Stable identity.
        words: Plan word of every position.
        asked: Concept (0 to 3) of every decision, in the order of their positions.
    """

    uid: str
    words: tuple[str, ...]
    asked: tuple[int, ...]

    @property
    def decisions(self) -> list[int]:
        """Positions of the decisions."""
        return [i for i, word in enumerate(self.words) if word.startswith("lure")]


def decision_word(lure: int, asked: int) -> str:
    """The plan word of a decision.

    Example:
        >>> decision_word(0, 2)
        'lure0_asks2'
    """
    return f"lure{lure}_asks{asked}"


class Forks(Task):
    """Walks with synonyms, decisions and loops; see the module's docstring.

    Every plan is a pure function of ``(seed, split, index)``.

    Args:
        length: Decisions of a plan; there are twice as many fillers and three times as many
            certain positions.
        num_train: Plans of the split ``train``.
        num_val: Plans of the split ``val``.
        num_test: Plans of the split ``test``.
        seed: Of the plans and the embedding rows.
        max_loops: Most loop words that the warm start writes; a walk with more is wrong.
        decisions: ``mixed`` with the other positions, or ``late``, behind all of them [our choice:
            chains of one prompt can then share most of their words, which is where a tree saves
            most, and nothing before the decisions deserves credit]. Demonstrations stay mixed: from
            late ones alone the warm start often does not learn to read the plan in 400 steps.
        lured: Probability of the lured concept in the warm start.
        asked: Probability of the concept asked for, where it is another.
        agree: Probability that the lured concept is the one asked for.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> task = Forks(length=1)
        >>> len(task.records("train")[0].words)
        6
    """

    name = "forks"

    def __init__(
        self,
        *,
        length: int = 4,
        num_train: int = 1000,
        num_val: int = 64,
        num_test: int = 256,
        seed: int = 0,
        max_loops: int = 8,
        decisions: Literal["mixed", "late"] = "mixed",
        lured: float = 0.55,
        asked: float = 0.25,
        agree: float = 0.5,
    ) -> None:
        self.length, self.seed, self.max_loops = length, seed, max_loops
        self.decisions = decisions
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.lured, self.asked, self.agree = lured, asked, agree
        problems = [
            f"data.task.{name}={value} must be at least {least}"
            for name, value, least in (
                ("length", length, 1),
                ("num_train", num_train, 1),
                ("num_val", num_val, 0),
                ("num_test", num_test, 0),
                ("max_loops", max_loops, 0),
            )
            if value < least
        ]
        problems += [
            f"data.task.{name}={value} must be in [0, 1]"
            for name, value in (("lured", lured), ("asked", asked), ("agree", agree))
            if not 0 <= value <= 1
        ]
        if decisions not in ("mixed", "late"):
            problems.append(f"data.task.decisions={decisions} must be mixed or late")
        if lured + asked > 1:
            problems.append(f"data.task.lured={lured} and data.task.asked={asked} exceed 1")
        if problems:
            raise ValueError("; ".join(problems))
        self._ids: dict[str, int] = {}
        self._words: dict[int, str] = {}

    @property
    def num_positions(self) -> int:
        """Positions of a plan."""
        return 6 * self.length

    def vocabulary(self) -> list[str]:
        """Words of walks, then words of plans."""
        decisions = [decision_word(a, b) for a in range(NUM_CONCEPTS) for b in range(NUM_CONCEPTS)]
        return [*SYNONYMS, *CONCEPTS, *CERTAIN, LOOP, "filler", "go", *decisions, "walk"]

    def embeddings(self, width: int) -> dict[str, Tensor]:
        """Rows ``(width,)`` of length 1 that the words of walks start from.

        Args:
            width: Of the model.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def direction() -> Tensor:
            return torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)

        synonym = direction()
        rows = {word: synonym + SYNONYM_NOISE * direction() for word in SYNONYMS}
        rows |= {word: direction() for word in (*CONCEPTS, *CERTAIN, LOOP)}
        return {word: torch.nn.functional.normalize(row, dim=0) for word, row in rows.items()}

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and look up the ids of all words once."""
        super().bind(tokenizer)
        known = tokenizer.get_vocab()
        self._ids = {word: known[word] for word in self.vocabulary()}
        self._words = {index: word for word, index in self._ids.items()}

    def records(self, split: Split) -> Sequence[Plan]:
        """All plans of a split; ``predict`` is the split ``test``."""
        source = "test" if split == "predict" else split
        return [self._plan(source, index) for index in range(self.sizes[source])]

    def _plan(self, split: str, index: int) -> Plan:
        uid = f"{self.name}/{self.seed}/{self.length}/{split}/{index}"
        return self._draw(uid, Random(uid), self.decisions == "late")

    def _draw(self, uid: str, rng: Random, is_late: bool) -> Plan:
        pairs = []
        for _ in range(self.length):
            asked = rng.randrange(NUM_CONCEPTS)
            others = [concept for concept in range(NUM_CONCEPTS) if concept != asked]
            pairs.append((asked if rng.random() < self.agree else rng.choice(others), asked))
        words = ["filler"] * (2 * self.length) + ["go"] * (3 * self.length)
        words += [decision_word(*pair) for pair in pairs]
        rng.shuffle(words)
        if is_late:
            words.sort(key=lambda word: word.startswith("lure"))  # keeps the order of the rest
        asks = [int(word[-1]) for word in words if word.startswith("lure")]
        return Plan(uid, tuple(words), tuple(asks))

    def prompt(self, record: Plan) -> Prompt:
        """The plan, then the word that starts the walk."""
        ids = tuple(self._ids[word] for word in (*record.words, "walk"))
        return Prompt(record.uid, ids, self, domain=self.name, record=record)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """``reward`` 1 where all decisions are right and the walk has ended in time.

        Also ``decisions`` (share of right ones), ``loops`` (loop words) and ``parsed`` (a walk of
        the right length with nothing but loop words behind it).
        """
        plan: Plan = prompt.record
        ids = list(completion.token_ids)
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        words = [self._words.get(token, "") for token in ids]
        walk, rest = words[: self.num_positions], words[self.num_positions :]
        chosen = [walk[i] if i < len(walk) else "" for i in plan.decisions]
        right = [word == CONCEPTS[c] for word, c in zip(chosen, plan.asked, strict=True)]
        is_whole = completion.finish_reason is FinishReason.STOP
        is_whole &= len(walk) == self.num_positions and len(rest) <= self.max_loops
        is_whole &= all(word == LOOP for word in rest)
        return {
            "reward": float(is_whole and all(right)),
            "decisions": sum(right) / len(right),
            "loops": float(len(rest)),
            "parsed": float(is_whole),
        }

    def weights(self, plan_word: str) -> dict[str, float]:
        """Probabilities of the warm start at a position, by word.

        Example:
            >>> Forks().weights("lure0_asks2")["turn2"]
            0.25
        """
        if plan_word == "filler":
            return dict.fromkeys(SYNONYMS, 1 / NUM_SYNONYMS)
        if plan_word == "go":
            slip = (1 - CERTAINTY) / (NUM_CERTAIN - 1)
            return {word: slip if i else CERTAINTY for i, word in enumerate(CERTAIN)}
        lure, asked = int(plan_word[4]), int(plan_word[-1])
        given = {lure: self.lured} if lure == asked else {lure: self.lured, asked: self.asked}
        left = (1 - sum(given.values())) / (NUM_CONCEPTS - len(given))
        return {word: given.get(i, left) for i, word in enumerate(CONCEPTS)}

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Walks drawn from the table, along fresh plans with mixed decisions."""
        rng = Random(f"{self.name}/demonstrations/{seed}/{step}")
        found = []
        for _ in range(count):
            plan = self._draw("", rng, False)
            walk = []
            for word in plan.words:
                table = self.weights(word)
                walk += rng.choices(list(table), list(table.values()))
            walk += [LOOP] * rng.randint(0, self.max_loops)
            ids = (*(self._ids[word] for word in walk), self.tokenizer.eos_token_id)
            found.append(Demonstration(self.prompt(plan).token_ids, ids, self.name))
        return found
