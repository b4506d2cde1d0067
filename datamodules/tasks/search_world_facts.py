"""The facts of the procedural search world, their passages, and the words all of it is made of.

    text        words                                                    found for
    biography   NAME the PROFESSION was born in CITY                     its person
    echo        repeats "where was NAME born", tells nothing             its name
    tour        NAME sang in two cities, tells nothing of birth          its name
    country     CITY is a city in COUNTRY                                its city
    city echo   repeats "which country is CITY in", tells nothing        its city
    view        CITY has a harbour, tells nothing of countries           its city

Every name is shared by two people of different profession, born in cities of different countries,
so a wrong biography always leads to a wrong country. Card, section 9 [our choice]; all texts are
lower-case words parted by single spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

from datamodules.passages import Passage


def compound(starts: str, ends: str) -> tuple[str, ...]:
    """Every start with every end, as names.

    Args:
        starts: Syllables parted by spaces.
        ends: Likewise.

    Example:
        >>> compound("al be", "da ric")
        ('alda', 'alric', 'beda', 'beric')
    """
    return tuple("".join(pair) for pair in product(starts.split(), ends.split()))


FIRST_NAMES = compound("al be ca do el fi gu ha", "da ric mon len tis")
LAST_NAMES = compound("ber kor lin mar nor pol ras ved", "gen holt sky ton witz")
CITIES = compound(
    "ash bre cor dun elm fal gor hol iva jor kel lan mir nes orm pel qui rav sol tar",
    "abad burg by dale eth field gate ham inz ka ley mouth nitz ora polis quay rest port vik",
)
COUNTRIES = compound("bor cal est fin gal hun ill jut kar lus", "ania land mark")
PROFESSIONS = (
    *("actor", "baker", "chemist", "dancer", "farmer", "judge", "lawyer", "miner"),
    *("nurse", "painter", "pilot", "poet", "potter", "sailor", "singer", "tailor"),
)

BIOGRAPHY = "{name} the {profession} was born in {city}"
ECHO = "where was {name} born many ask where was {name} born but nobody can say"
TOUR = "{name} went on tour in spring and sang in {city} and {other}"
COUNTRY = "{city} is a city in {country}"
CITY_ECHO = "which country is {city} in people ask which country {city} is in again and again"
VIEW = "{city} has an old harbour and a market by the river"
TEMPLATES = (BIOGRAPHY, ECHO, TOUR, COUNTRY, CITY_ECHO, VIEW)


@dataclass(frozen=True)
class Person:
    """One of the two people of a name.

    Args:
        name: First and last name.
        profession: Tells the two apart.
        city: Of birth.
    """

    name: str
    profession: str
    city: str

    @property
    def biography(self) -> str:
        """The one text that knows where the person was born."""
        return BIOGRAPHY.format(name=self.name, profession=self.profession, city=self.city)

    @property
    def biography_uid(self) -> str:
        """Id of that passage."""
        return f"biography/{self.name.replace(' ', '_')}/{self.profession}"


@dataclass(frozen=True)
class Facts:
    """What is true in a world.

    Args:
        people: Both people of each name.
        countries: Country of each city.
        spare_names: Names of nobody, for warm starts.
    """

    people: dict[str, tuple[Person, Person]]
    countries: dict[str, str]
    spare_names: tuple[str, ...]


def make_facts(seed: int, num_names: int, num_cities: int) -> Facts:
    """Draw the facts of a world; a pure function of its arguments.

    Args:
        seed: Of the world.
        num_names: Shared names, below ``len(FIRST_NAMES) * len(LAST_NAMES)``.
        num_cities: From 2 to ``len(CITIES)``.
    """
    rng = Random(f"search_world/{seed}/facts")
    cities = rng.sample(CITIES, num_cities)
    countries = rng.sample(COUNTRIES, len(COUNTRIES))
    home = {city: countries[place % len(countries)] for place, city in enumerate(cities)}
    names = [f"{first} {last}" for first, last in product(FIRST_NAMES, LAST_NAMES)]
    rng.shuffle(names)
    people = {name: draw_people(rng, name, home) for name in names[:num_names]}
    return Facts(people, home, tuple(names[num_names:]))


def draw_people(rng: Random, name: str, countries: dict[str, str]) -> tuple[Person, Person]:
    """Two people of one name: other professions, cities of other countries.

    Args:
        rng: Random stream.
        name: First and last name.
        countries: Country of each city; two countries at least.
    """
    first, second = rng.sample(PROFESSIONS, 2)
    city = rng.choice(list(countries))
    others = [one for one, country in countries.items() if country != countries[city]]
    return Person(name, first, city), Person(name, second, rng.choice(others))


def name_texts(rng: Random, people: Sequence[Person], cities: Sequence[str]) -> list[str]:
    """All that is written about a name: its biographies, the echo, the tour.

    Args:
        rng: Draws the cities of the tour.
        people: Of the name.
        cities: Of the world; two at least.
    """
    name = people[0].name
    city, other = rng.sample(cities, 2)
    tour = TOUR.format(name=name, city=city, other=other)
    return [*(person.biography for person in people), ECHO.format(name=name), tour]


def city_texts(city: str, country: str) -> list[str]:
    """All that is written about a city: its country, the echo, the view.

    Args:
        city: Its name.
        country: Where it is.
    """
    return [form.format(city=city, country=country) for form in (COUNTRY, CITY_ECHO, VIEW)]


def make_passages(seed: int, facts: Facts) -> list[Passage]:
    """All passages of a world, shuffled, so that ties of a retriever favour nobody.

    Args:
        seed: Of the world.
        facts: Of ``make_facts``.

    Returns:
        Four passages a name and three a city, without titles.
    """
    rng = Random(f"search_world/{seed}/passages")
    cities, found = list(facts.countries), []
    for name, people in facts.people.items():
        tag = name.replace(" ", "_")
        uids = [*(person.biography_uid for person in people), f"echo/{tag}", f"tour/{tag}"]
        found += list(zip(uids, name_texts(rng, people, cities), strict=True))
    for city, country in facts.countries.items():
        uids = [country_uid(city), f"city_echo/{city}", f"view/{city}"]
        found += list(zip(uids, city_texts(city, country), strict=True))
    rng.shuffle(found)
    return [Passage(uid, "", text) for uid, text in found]


def country_uid(city: str) -> str:
    """Id of the passage that tells a city's country.

    Example:
        >>> country_uid("ashburg")
        'country/ashburg'
    """
    return f"country/{city}"


def template_words(templates: Sequence[str]) -> list[str]:
    """Words of templates without their places, each once.

    Example:
        >>> template_words(["which country is {city} in", "country of {city}"])
        ['which', 'country', 'is', 'in', 'of']
    """
    words = " ".join(templates).split()
    return list(dict.fromkeys(word for word in words if not word.startswith("{")))
