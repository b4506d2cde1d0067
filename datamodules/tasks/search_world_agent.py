"""The scripted agent of the search world: what it reads in a transcript, what it writes next.

It asks where a name was born and drops the profession: that is the ambiguity. It believes the
first biography of the name in the order in which passages were shown, whoever's it is, asks for
the country of that city, and rewords where nothing was found. After ``MAX_TURNS`` searches it
guesses (card, section 9 [our choice]).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from datamodules.search_texts import ANSWER, END_ANSWER, END_SEARCH, SEARCH
from datamodules.tasks.search_world_facts import TEMPLATES, template_words
from datamodules.tasks.searching import read_transcript

Kind = Literal["country_of_birth", "city_of_birth", "country_of_city"]
MAX_TURNS = 4
UNKNOWN = "unknown"
BIRTH_QUERIES = (
    "where was {name} born",
    "birthplace of {name}",
    "city of birth of {name}",
    "{name} was born in which city",
)
COUNTRY_QUERIES = (
    "which country is {city} in",
    "country of {city}",
    "{city} is in which country",
    "name of the country of {city}",
)
_QUESTIONS: dict[Kind, str] = {
    "country_of_birth": "country of birth of {name} the {profession}",
    "city_of_birth": "city of birth of {name} the {profession}",
    "country_of_city": "country of {city}",
}
QUESTIONS = tuple(_QUESTIONS.values())
NAME_WEIGHT = 3  # in shared words: names are rarer than words of templates
_COMMON = frozenset(template_words((*TEMPLATES, *BIRTH_QUERIES, *COUNTRY_QUERIES)))


@dataclass(frozen=True)
class Asked:
    """What a question of the world is after.

    Args:
        kind: One of three.
        city: Of birth, or the one asked about.
        country: Of the city.
        name: Of the person; "" where a city is asked about.
        profession: Of the person.
    """

    kind: Kind
    city: str
    country: str
    name: str = ""
    profession: str = ""

    @property
    def text(self) -> str:
        """The question.

        Example:
            >>> Asked("country_of_birth", "ashburg", "estmark", "alda bergen", "baker").text
            'country of birth of alda bergen the baker'
        """
        return _QUESTIONS[self.kind].format(
            name=self.name, profession=self.profession, city=self.city
        )

    @property
    def answer(self) -> str:
        """The right one."""
        return self.city if self.kind == "city_of_birth" else self.country


def next_text(asked: Asked, transcript: str, is_lucky: bool = False) -> str:
    """What the agent writes next.

    Args:
        asked: The question.
        transcript: All behind the prompt, observations included; any text will do.
        is_lucky: Whether a guess would be right.

    Returns:
        One search or one answer, as words.

    Example:
        >>> next_text(Asked("country_of_city", "ashburg", "estmark"), "")
        '<search> which country is ashburg in </search>'
    """
    shown, queries = read_transcript(transcript)
    city: str | None = asked.city
    if asked.kind != "country_of_city":
        city = first_city(asked.name, shown)
    found = city
    if city and asked.kind != "city_of_birth":
        found = first_country(city, shown)
    if found:
        return f"{ANSWER} {found} {END_ANSWER}"
    if len(queries) >= MAX_TURNS:
        return f"{ANSWER} {asked.answer if is_lucky else UNKNOWN} {END_ANSWER}"
    forms = COUNTRY_QUERIES if city else BIRTH_QUERIES
    wordings = [form.format(name=asked.name, city=city) for form in forms]
    fresh = [wording for wording in wordings if wording not in queries]
    return f"{SEARCH} {(fresh or wordings)[0]} {END_SEARCH}"


def first_city(name: str, shown: str) -> str | None:
    """The city of the first biography of a name, whichever of the two people it is about.

    Args:
        name: First and last name.
        shown: Passages, as words.
    """
    found = re.search(rf"(?:^|\s){re.escape(name)} the \w+ was born in (\w+)(?:\s|$)", shown)
    return found[1] if found else None


def first_country(city: str, shown: str) -> str | None:
    """The country of a city, where a passage tells it.

    Args:
        city: Its name.
        shown: Passages, as words.
    """
    found = re.search(rf"(?:^|\s){re.escape(city)} is a city in (\w+)(?:\s|$)", shown)
    return found[1] if found else None


def rank_by_words(query: str, texts: Sequence[str], noise: Sequence[float]) -> list[int]:
    """Numbers of texts by the words that they share with a query, as a lexical retriever would.

    Args:
        query: What is searched for.
        texts: To be ranked. A shared word counts ``NAME_WEIGHT`` where it is a name's, else 1.
        noise: Added to the count, one a text.

    Returns:
        The best first; ties by number.

    Example:
        >>> rank_by_words("which country is rome in", ["which country is oslo in", "rome"], [0, 1])
        [0, 1]
    """
    weights = {word: 1 if word in _COMMON else NAME_WEIGHT for word in query.split()}
    found = [set(text.split()) for text in texts]
    shared = [sum(weight for word, weight in weights.items() if word in one) for one in found]
    scores = [count + extra for count, extra in zip(shared, noise, strict=True)]
    return sorted(range(len(texts)), key=lambda place: -scores[place])
