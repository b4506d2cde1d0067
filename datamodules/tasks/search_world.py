"""The procedural multi-hop world: ambiguous names, two hops, passages that look right and mislead.

    question  country of birth of alda bergen the baker
    turn 1    where was alda bergen born           two biographies, an echo, a tour
    turn 2    which country is ashburg in          one fact, an echo, a view
    answer    estmark

A query alone cannot tell the two people of a name apart; question and query together can. The
world is that of the Agentic-R card, section 9 [our choice]: facts and passages are in
``search_world_facts``, the agent in ``search_world_agent``, the judge in ``search_world_judge``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from random import Random

from datamodules.passages import Corpus, Passage
from datamodules.search_texts import END_SEARCH, SEARCH, SEPARATOR, information, words_of_protocol
from datamodules.tasks.base import Demonstration, Split
from datamodules.tasks.search_world_agent import (
    BIRTH_QUERIES,
    COUNTRY_QUERIES,
    QUESTIONS,
    UNKNOWN,
    Asked,
    Kind,
    next_text,
    rank_by_words,
)
from datamodules.tasks.search_world_facts import (
    CITIES,
    COUNTRIES,
    FIRST_NAMES,
    LAST_NAMES,
    PROFESSIONS,
    TEMPLATES,
    Facts,
    Person,
    city_texts,
    country_uid,
    draw_people,
    make_facts,
    make_passages,
    name_texts,
    template_words,
)
from datamodules.tasks.search_world_judge import infer_facts, read_query, score
from datamodules.tasks.searching import SPACED_INSTRUCTION, Question, SearchTask
from datamodules.tasks.verdict_format import token_ids

MAX_DOCS = 20  # passages that an observation of this vocabulary may number
SHOWN = 3  # passages a search in demonstrations, as top-3 of the paper [code]
RANK_NOISE = 1.5  # sd in shared words: what demonstrations are shown is roughly, not quite, lexical
SPARE = 100  # names of nobody that warm starts need
#: In the order in which they take people and cities: more training questions change no others.
_SPLITS: tuple[Split, ...] = ("test", "val", "train")


class SearchWorld(SearchTask):
    """Questions about people who share a name; see the module's docstring.

    Each split has ``single_share`` questions of one hop, half of them for a city's country, half
    for a person's city of birth (group ``single``); the others ask for a person's country of birth
    (group ``multi``). No person, no name and no city question is in two splits; names of all splits
    are made of the same words. ``predict`` is the split ``test``.

    Args:
        num_names: Names, two people each [card: 500].
        num_cities: Cities [card: 150].
        num_train: Questions of ``train`` [card: 300].
        num_val: Questions of ``val``.
        num_test: Questions of ``test`` [card: 400].
        single_share: Share of questions of one hop [our choice; the card's world has none].
        guess: Probability that a guess of the scripted agent is right [card: 0.15].
        max_new_tokens: Most tokens of an episode, observations included; None leaves the module's.
        seed: Of the world.

    Raises:
        ValueError: A value is out of range, or the world is too small for its questions; all such
            values are named at once.

    Example:
        >>> [len(SearchWorld().records(split)) for split in ("train", "val", "test")]
        [300, 100, 400]
    """

    name = "search_world"
    max_prompt_tokens = 64

    def __init__(
        self,
        *,
        num_names: int = 500,
        num_cities: int = 150,
        num_train: int = 300,
        num_val: int = 100,
        num_test: int = 400,
        single_share: float = 0.3,
        guess: float = 0.15,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.num_names, self.num_cities = num_names, num_cities
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self.single_share, self.guess, self.seed = single_share, guess, seed
        self.max_new_tokens = max_new_tokens
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))
        self.facts: Facts = make_facts(seed, num_names, num_cities)
        self._corpus = Corpus(make_passages(seed, self.facts), self.name)
        self._records = self._draw_questions()

    def _problems(self) -> Iterator[str]:
        most_names = len(FIRST_NAMES) * len(LAST_NAMES) - SPARE
        yield from [
            f"data.task.{key}={value} must be from {least} to {most}"
            for key, value, least, most in (
                ("num_names", self.num_names, 1, most_names),
                ("num_cities", self.num_cities, 2, len(CITIES)),
            )
            if not least <= value <= most
        ]
        for split, size in self.sizes.items():
            if size < (split == "train"):
                yield f"data.task.num_{split}={size} must be at least {int(split == 'train')}"
        for key, share in (("single_share", self.single_share), ("guess", self.guess)):
            if not 0 <= share <= 1:
                yield f"data.task.{key}={share} must be in [0, 1]"
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            yield f"data.task.max_new_tokens={self.max_new_tokens} must be at least 1"
        if 0 <= self.single_share <= 1:
            yield from self._shortages()

    def _shortages(self) -> Iterator[str]:
        """Whether every question can have a person or a city of its own."""
        counts = [self._counts(split) for split in _SPLITS]
        names = sum((multi + birth + 1) // 2 for multi, birth, _ in counts)
        cities = sum(city for _, _, city in counts)
        for key, value, needed in (
            ("num_names", self.num_names, names),
            ("num_cities", self.num_cities, cities),
        ):
            if value < needed:
                yield f"data.task.{key}={value} must be at least {needed} for so many questions"

    def _counts(self, split: Split) -> tuple[int, int, int]:
        """Questions for a country of birth, a city of birth and a city's country."""
        single = round(self.single_share * self.sizes[split])
        return self.sizes[split] - single, single - single // 2, single // 2

    # ---------------------------------------------------------------------------------- questions

    def vocabulary(self) -> list[str]:
        """All words: the protocol's, those of prompts, templates and queries, then names."""
        templates = (*TEMPLATES, *BIRTH_QUERIES, *COUNTRY_QUERIES, *QUESTIONS, SPACED_INSTRUCTION)
        cities = sorted(self.facts.countries)
        names = (FIRST_NAMES, LAST_NAMES, PROFESSIONS, cities, COUNTRIES)
        protocol = [*words_of_protocol(MAX_DOCS), SEPARATOR.strip(), "query:", "passage:"]
        return list(dict.fromkeys([*protocol, UNKNOWN, *template_words(templates), *chain(*names)]))

    @property
    def corpus(self) -> Corpus:
        """Four passages a name and three a city."""
        return self._corpus

    def records(self, split: Split) -> Sequence[Question]:
        """Questions of a split, of all kinds mixed.

        Args:
            split: ``predict`` is ``test``.
        """
        return self._records["test" if split == "predict" else split]

    def _draw_questions(self) -> dict[Split, list[Question]]:
        names, cities = list(self.facts.people), list(self.facts.countries)
        drawn: dict[Split, list[Question]] = {}
        for split in _SPLITS:
            rng = Random(f"{self.name}/{self.seed}/questions/{split}")
            multi, birth, city = self._counts(split)
            num_names = (multi + birth + 1) // 2
            mine, names = names[:num_names], names[num_names:]
            asked_cities, cities = cities[:city], cities[city:]
            people = [person for name in mine for person in self.facts.people[name]]
            rng.shuffle(people)
            asked = [self._about("country_of_birth", person) for person in people[:multi]]
            asked += [self._about("city_of_birth", p) for p in people[multi : multi + birth]]
            asked += [
                Asked("country_of_city", one, self.facts.countries[one]) for one in asked_cities
            ]
            rng.shuffle(asked)
            drawn[split] = [self._question(split, one) for one in asked]
        return drawn

    def _about(self, kind: Kind, person: Person) -> Asked:
        country = self.facts.countries[person.city]
        return Asked(kind, person.city, country, person.name, person.profession)

    def _question(self, split: Split, asked: Asked) -> Question:
        biography = Person(asked.name, asked.profession, asked.city).biography_uid
        supporting = {
            "country_of_birth": (biography, country_uid(asked.city)),
            "city_of_birth": (biography,),
            "country_of_city": (country_uid(asked.city),),
        }[asked.kind]
        group = "multi" if len(supporting) > 1 else "single"
        uid = f"{split}/{asked.text.replace(' ', '_')}"
        return Question(uid, asked.text, (asked.answer,), supporting, group, asked)

    # -------------------------------------------------------------------------- agent and judge

    def act(self, question: Question, transcript: str, coin: int) -> str:
        """What the scripted agent writes next, see ``search_world_agent``.

        Args:
            question: Which question.
            transcript: All text after the prompt so far, observations included.
            coin: A random 64-bit number: below ``guess`` of its range a guess is right.
        """
        return next_text(question.extra, transcript, coin < self.guess * 2**64)

    def gold(self, question: Question, query: str) -> tuple[str, ...]:
        """The biography for a query about the person asked for, the country's for one on its city.

        Args:
            question: Which question.
            query: What was searched for; any other one has no gold passage.
        """
        asked, intent = question.extra, read_query(query, self.facts)
        if intent.predicate == "birth" and intent.entity == asked.name:
            return (Person(asked.name, asked.profession, asked.city).biography_uid,)
        is_city = intent.predicate == "country" and intent.entity == asked.city
        return (country_uid(asked.city),) if is_city else ()

    def sub_answers(self, question: Question, queries: Sequence[str], solved: bool) -> list[str]:
        """City or country that each query was after; nothing where the answer was wrong.

        Args:
            question: Which question.
            queries: Of one trajectory, in order.
            solved: Whether its answer was right, by luck too.
        """
        if not solved:
            return [""] * len(queries)
        return infer_facts(question.extra, queries, self.facts)

    def relevance(self, query: str, passages: Sequence[Passage], sub_answer: str) -> list[int]:
        """Scores of the rule-based judge, see ``search_world_judge``.

        Args:
            query: Of the turn.
            passages: Candidates; none influences another.
            sub_answer: As ``sub_answers`` gave it.
        """
        return [score(query, one.text, sub_answer, self.facts, self.seed) for one in passages]

    # -------------------------------------------------------------------------------- warm starts

    def similarity_pairs(self, seed: int, count: int) -> list[tuple[str, str]]:
        """Queries and lexically similar texts, to make a tiny encoder a plausible similarity one.

        About names of nobody in the world, or about its cities with drawn countries. The text is
        any of those on the name or the city, so which of them is useful cannot be learned.

        Args:
            seed: Of the draw.
            count: How many; the first ones stay the same where it grows.

        Returns:
            Pairs of a query in the agent's wordings and the text of a passage.
        """
        return [self._similar(Random(f"{self.name}/similar/{seed}/{i}")) for i in range(count)]

    def _similar(self, rng: Random) -> tuple[str, str]:
        people, city, country = self._draw_apart(rng)
        if rng.random() < 0.5:
            texts = name_texts(rng, people, list(self.facts.countries))
            return rng.choice(BIRTH_QUERIES).format(name=people[0].name), rng.choice(texts)
        return rng.choice(COUNTRY_QUERIES).format(city=city), rng.choice(city_texts(city, country))

    def _draw_apart(self, rng: Random) -> tuple[tuple[Person, Person], str, str]:
        """People of a name of nobody, a city (the first one's) and a country drawn for it."""
        people = draw_people(rng, rng.choice(self.facts.spare_names), self.facts.countries)
        return people, people[0].city, rng.choice(COUNTRIES)

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Whole episodes of the scripted agent, without a loss on observations.

        About names of nobody and cities with drawn countries, so nothing of the world is learned
        by heart. A search shows a noisy lexical top-3 of the texts on the name or city and of
        others. Answers are the agent's: wrong where it read the wrong biography, ``unknown``
        where it found nothing.

        Args:
            seed: Seed of the warm start.
            step: Step of the warm start.
            count: How many.
        """
        rng = Random(f"{self.name}/demonstrations/{self.seed}/{seed}/{step}")
        return [self._demonstrate(rng) for _ in range(count)]

    def _demonstrate(self, rng: Random) -> Demonstration:
        asked, texts = self._draw_episode(rng)
        ids: list[int] = []
        observed: list[bool] = []
        transcript, is_searching = "", True
        while is_searching:
            said = next_text(asked, transcript)
            is_searching = said.startswith(SEARCH)
            query = said.removeprefix(SEARCH).removesuffix(END_SEARCH).strip()
            shown = self._show(rng, query, texts) if is_searching else ""
            for piece, is_shown in ((said, False), (shown, True)):
                new = token_ids(self.tokenizer, piece)
                ids += new
                observed += [is_shown] * len(new)
            transcript = f"{transcript} {said} {shown}"
        group = "multi" if asked.kind == "country_of_birth" else "single"
        prompt, _ = self.writer.prompt(asked.text)
        return Demonstration(prompt, tuple(ids), group, tuple(observed))

    def _draw_episode(self, rng: Random) -> tuple[Asked, list[str]]:
        """A question and all texts of its small world: those on its way and on another's."""
        kind: Kind = "country_of_birth"
        if rng.random() < self.single_share:
            kind = rng.choice(("city_of_birth", "country_of_city"))
        texts, cities = [], list(self.facts.countries)
        for _ in range(2):
            people, city, country = self._draw_apart(rng)
            texts += name_texts(rng, people, cities)
            texts += city_texts(city, country)
            texts += city_texts(people[1].city, rng.choice(COUNTRIES))
        person, home = people[0], country
        is_city = kind == "country_of_city"
        who = ("", "") if is_city else (person.name, person.profession)
        return Asked(kind, city, home, *who), texts

    def _show(self, rng: Random, query: str, texts: Sequence[str]) -> str:
        noise = [rng.gauss(0, RANK_NOISE) for _ in texts]
        places = rank_by_words(query, texts, noise)[:SHOWN]
        return information([Passage(str(place), "", texts[place]) for place in places], True)
