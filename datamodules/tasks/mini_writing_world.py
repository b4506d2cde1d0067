"""The world of the miniature writing tasks: queries, texts, what they are worth, noisy writers.

The miniature of our UniCreative card, section 9 [tested there]. A query is a genre and a start
word s of M content words; half of the genres want long texts, half short ones, and nobody is told
which:

======= ==================================================== ======================================
type    utility of a text                                    most
======= ==================================================== ======================================
long    positions that follow the walk s, s + 1, ... mod M   ``long_words``
short   distinct words among the first ``short_words``,      ``short_words``
        less 0.5 for every word behind them
======= ==================================================== ======================================

As text, a query is ``genre3 w5`` and a text ``w5 w6 w7``. The judge in code has two faults that a
method may have to stand: it errs in a part of the pairs (``flip``), and where it is shown a plan
(``<plan> w1 w2 </plan> w5 w6``) it may like it (``plan_bonus``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from datamodules.sources import stable_hash
from datamodules.tasks.base import Pair, Split
from datamodules.tasks.planning import Kind

KINDS: tuple[Kind, Kind] = ("long", "short")
TAGS = ("<plan>", "</plan>")
ASK = "write"
CRITERIA_ASK, JUDGEMENT_ASK = "which_criterion?", "which_text?"
CRITERION_WORDS = ("coherence", "sparkle")
VERDICTS = ("A_wins", "B_wins")
SLOTS = ("A", "B")
#: Of a slot: a plan's word or tag, behind the end of its text, a word that no text should hold.
PLAN, GAP, OTHER = "plan", "over", "other"
MARKS = tuple(f"{walk}.{first}" for walk in ("on", "off") for first in ("new", "again"))
SPECIAL = ("<pad>", "<unk>", "<eos>")  # every word-level tokenizer has them
EXTRA_COST = 0.5  # utility that a word too many costs a short text [tested on the card]


@dataclass(frozen=True)
class Query:
    """What is to be written.

    Args:
        uid: Stable identity.
        kind: Hidden type.
        genre: Number of the genre, which has this type.
        start: First word of the walk.
    """

    uid: str
    kind: Kind
    genre: int
    start: int

    @property
    def text(self) -> str:
        """As text; the type is not in it.

        Example:
            >>> Query("", "long", 3, 5).text
            'genre3 w5'
        """
        return f"genre{self.genre} w{self.start}"


def plan_words(words: Sequence[str]) -> list[bool]:
    """Whether each word is a tag or stands behind an opening one that is not closed yet.

    Example:
        >>> plan_words(["<plan>", "w1", "</plan>", "w2"])
        [True, True, True, False]
    """
    out, is_inside = [], False
    for word in words:
        is_inside = word == TAGS[0] or (is_inside and word != TAGS[1])
        out.append(is_inside or word == TAGS[1])
    return out


def option_problems(whole: Mapping[str, tuple[Any, int]], shares: Mapping[str, Any]) -> list[str]:
    """What is wrong with options: a message for each.

    Args:
        whole: Name to value and least value, of whole numbers.
        shares: Name to value, of probabilities.
    """
    problems = [
        f"data.task.{name}={value!r} must be a whole number of at least {least}"
        for name, (value, least) in whole.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < least
    ]
    return problems + [
        f"data.task.{name}={value!r} must be a probability, 0 to 1"
        for name, value in shares.items()
        if not isinstance(value, int | float) or not 0 <= value <= 1
    ]


class WritingWorld:
    """Options, records and judge of both miniature writing tasks.

    Args:
        genres_per_kind: Genres of each type; 2 as in the card's measured run.
        num_words: Content words M.
        long_words: Positions of the walk that count.
        short_words: Words that a short text should have.
        max_words: Most words of a drawn text.
        min_plan_words: Fewest words of a plan; fewer are none.
        max_plan_words: Most words of a drawn plan.
        flip: Probability that the judge in code takes a pair the wrong way round.
        plan_bonus: Utility that each word of a plan adds where that judge is shown plans.
        length_blind: Whether judges ignore the length, so that a length reward has something to
            do: a long text then counts by its share of right positions, and no word of a short
            text costs anything.
        confusion: Writers: probability of the manner of a random type instead of the genre's.
        world_seed: Of the types of the genres and of the flips. Apart from ``seed``, so that a
            policy and the judge of another run live in one world.
        num_train: Records of the split ``train``.
        num_val: Records of the split ``val``.
        num_test: Records of the split ``test``; ``predict`` is the same.
        seed: Of the records.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> world = WritingWorld()
        >>> world.utility("long", 6, [6, 7, 0, 5]), world.utility("short", 6, [1, 2, 2, 3, 4])
        (3.0, 2.5)
    """

    name = "writing_world"

    def __init__(
        self,
        *,
        genres_per_kind: int = 2,
        num_words: int = 8,
        long_words: int = 8,
        short_words: int = 4,
        max_words: int = 12,
        min_plan_words: int = 2,
        max_plan_words: int = 4,
        flip: float = 0.1,
        plan_bonus: float = 0.0,
        length_blind: bool = False,
        confusion: float = 1.0,
        world_seed: int = 0,
        num_train: int = 400,
        num_val: int = 64,
        num_test: int = 128,
        seed: int = 0,
    ) -> None:
        self.genres_per_kind, self.num_words = genres_per_kind, num_words
        self.long_words, self.short_words, self.max_words = long_words, short_words, max_words
        self.min_plan_words, self.max_plan_words = min_plan_words, max_plan_words
        self.flip, self.plan_bonus, self.length_blind = flip, plan_bonus, length_blind
        self.confusion, self.world_seed, self.seed = confusion, world_seed, seed
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))
        genres = list(range(2 * genres_per_kind))
        Random(f"writing_world/kinds/{world_seed}").shuffle(genres)
        self._genres: dict[Kind, list[int]] = {
            "long": sorted(genres[:genres_per_kind]),
            "short": sorted(genres[genres_per_kind:]),
        }
        self._number_of = {f"w{number}": number for number in range(num_words)}

    def _problems(self) -> list[str]:
        """What is wrong with the options; a subclass adds its own."""
        least = {"num_words": 2}
        names = ["genres_per_kind", "num_words", "long_words", "short_words", "max_words"]
        names += ["min_plan_words", "max_plan_words"]
        whole = {name: (getattr(self, name), least.get(name, 1)) for name in names}
        whole |= {f"num_{split}": (size, 0) for split, size in self.sizes.items()}
        problems = option_problems(whole, {"flip": self.flip, "confusion": self.confusion})
        if not self.plan_bonus >= 0:
            problems.append(f"data.task.plan_bonus={self.plan_bonus} must be 0 or more")
        if problems:
            return problems  # what follows compares numbers
        problems += [
            f"data.task.{low}={getattr(self, low)} must be at most {high}={getattr(self, high)}"
            for low, high in (
                ("short_words", "num_words"),
                ("long_words", "max_words"),
                ("short_words", "max_words"),
                ("min_plan_words", "max_plan_words"),
            )
            if getattr(self, low) > getattr(self, high)
        ]
        return problems

    # ---- Words -----------------------------------------------------------------------------------

    def vocabulary(self) -> list[str]:
        """The words of both tasks, so that a judge can read what a policy writes; 109 by default.

        A policy needs only the first 15.
        """
        marked = [f"{word}.{mark}" for word in self._number_of for mark in MARKS]
        return [
            *self._number_of,
            *(f"genre{genre}" for genre in range(2 * self.genres_per_kind)),
            *TAGS,
            ASK,
            CRITERIA_ASK,
            JUDGEMENT_ASK,
            *CRITERION_WORDS,
            *VERDICTS,
            *(f"#{step}" for step in range(self.num_steps)),
            *(f"{slot}.{word}" for slot in SLOTS for word in (*marked, PLAN, GAP, OTHER)),
        ]

    @property
    def num_steps(self) -> int:
        """Words of a text that a judge model can read: a drawn plan, its tags and a drawn text."""
        return self.max_plan_words + 2 + self.max_words

    def numbers(self, words: Sequence[str]) -> list[int]:
        """Content words as numbers, any other word as -1."""
        return [self._number_of.get(word, -1) for word in words]

    def slot_words(self, slot: str, query: Query, text: str) -> list[str]:
        """A text as a judge model reads it: a word for each of its words.

        A content word tells its slot, itself, whether it is on the walk and whether it is new,
        such as ``A.w5.on.new``.

        Args:
            slot: ``A`` or ``B``.
            query: What is asked.
            text: The text; its plan, if it is shown, is not part of the walk.
        """
        words, walk, seen = text.split(), query.start, set()
        out = []
        for word, is_plan in zip(words, plan_words(words), strict=True):
            if is_plan:
                out.append(f"{slot}.{PLAN}")
                continue
            number = self._number_of.get(word)
            is_on, is_new = number == walk % self.num_words, word not in seen
            mark = MARKS[2 * (not is_on) + (not is_new)]
            out.append(f"{slot}.{OTHER}" if number is None else f"{slot}.{word}.{mark}")
            walk += 1
            seen.add(word)
        return out

    def read_question(self, question: str) -> Query:
        """The query of a text such as ``genre3 w5``; its uid is the text.

        Raises:
            ValueError: It is not one of this world.
        """
        genre, _, start = question.partition(" ")
        kinds = [kind for kind in KINDS if genre in [f"genre{g}" for g in self._genres[kind]]]
        if not kinds or start not in self._number_of:
            raise ValueError(
                f"{question!r} is no query of task '{self.name}': give 'genre<0 to "
                f"{2 * self.genres_per_kind - 1}> w<0 to {self.num_words - 1}>', as in 'genre1 w5'"
            )
        return Query(question, kinds[0], int(genre.removeprefix("genre")), self._number_of[start])

    # ---- Worth -----------------------------------------------------------------------------------

    def utility(
        self, kind: Kind, start: int, numbers: Sequence[int], *, blind: bool = False
    ) -> float:
        """What a text is worth, see the module's docstring; an empty one is worth 0.

        Args:
            kind: Hidden type of the query.
            start: Its first word.
            numbers: The text; -1 for a word that is no content word.
            blind: Whether its length does not matter, see ``length_blind``.
        """
        if kind == "long":
            walk = numbers[: self.long_words]
            right = sum(number == (start + i) % self.num_words for i, number in enumerate(walk))
            return right * self.long_words / max(len(walk), 1) if blind else float(right)
        distinct = len(set(numbers[: self.short_words]) - {-1})
        extra = max(0, len(numbers) - self.short_words)
        return distinct - (0.0 if blind else EXTRA_COST * extra)

    def best(self, kind: Kind) -> int:
        """The highest utility."""
        return self.long_words if kind == "long" else self.short_words

    def judged(self, question: str, text: str) -> float:
        """Utility of a text as judges see it, without flips.

        Args:
            question: The query.
            text: A text, with its plan where judges are shown plans. Any word is read: what
                follows an opening tag is plan up to the closing one.

        Raises:
            ValueError: The question is not one of this world.
        """
        query = self.read_question(question)
        are_plan = plan_words(words := [word for word in text.split() if word != SPECIAL[2]])
        content = [word for word, is_plan in zip(words, are_plan, strict=True) if not is_plan]
        num_plan = sum(word not in TAGS for word in words) - len(content)
        numbers = self.numbers(content)
        worth = self.utility(query.kind, query.start, numbers, blind=self.length_blind)
        return worth + self.plan_bonus * num_plan

    def compare(self, pair: Pair) -> float:
        """The judge in code: utility of response 1 less that of response 2, flipped now and then.

        A flip is a pure function of ``world_seed``, the question and both texts in any order, so
        exchanging the slots only changes the sign.

        Args:
            pair: Two texts of one query; its label is not looked at.

        Raises:
            ValueError: The question is not one of this world.
        """
        first, second = (self.judged(pair.question, text) for text in pair.responses)
        place = stable_hash(self.world_seed, pair.question, *sorted(pair.responses)) / 2**64
        return second - first if place < self.flip else first - second

    # ---- Drawing ---------------------------------------------------------------------------------

    def uids(self, split: Split) -> list[str]:
        """Of the records of a split, with even places for long texts; ``predict`` is ``test``."""
        source = "test" if split == "predict" else split
        return [f"{self.name}/{self.seed}/{source}/{i}" for i in range(self.sizes[source])]

    def draw_query(self, rng: Random, uid: str, kind: Kind) -> Query:
        """A query of a type."""
        return Query(uid, kind, rng.choice(self._genres[kind]), rng.randrange(self.num_words))

    def draw_text(self, rng: Random, query: Query, noise: float) -> list[str]:
        """Words of a writer who knows neither type well.

        In the manner of long texts it is the walk, about as long as it should be or longer; in
        that of short ones it is distinct words, two fewer to three more than there should be.

        Args:
            rng: Where chance comes from.
            query: What is asked.
            noise: Probability that a word becomes any content word.
        """
        kind = rng.choice(KINDS) if rng.random() < self.confusion else query.kind
        if kind == "long":
            size = rng.randint(max(1, self.long_words - 3), self.max_words)
            clean = [(query.start + i) % self.num_words for i in range(size)]
        else:
            most = min(self.short_words + 3, self.num_words, self.max_words)
            size = rng.randint(max(1, self.short_words - 2), most)
            clean = rng.sample(range(self.num_words), size)
        return [
            f"w{rng.randrange(self.num_words) if rng.random() < noise else number}"
            for number in clean
        ]
