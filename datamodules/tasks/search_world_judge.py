"""The rule-based judge of the search world: local relevance and the facts that queries were after.

    passage                                                score
    about the query's entity, and states what is asked     90
    about the query's entity only                          30
    anything else                                           5
    the sub-answer is known and not in the passage         35 at most

plus noise of standard deviation 2, rounded to 5 (card, section 9 [our choice]). Like the judge of
the paper it sees neither the question nor other turns [code: step3-1]: the biography of the wrong
person is as good as the right one until the sub-answer tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from datamodules.tasks.search_world_agent import Asked, first_city, first_country
from datamodules.tasks.search_world_facts import Facts

FULL, ENTITY_ONLY, NOTHING, WITHOUT_SUB_ANSWER = 90, 30, 5, 35
NOISE_SD, STEP = 2.0, 5
_BIRTH_WORDS = frozenset(("born", "birth", "birthplace"))


@dataclass(frozen=True)
class Intent:
    """What a query is after.

    Args:
        entity: A name or a city; "" where there is none that the world knows.
        predicate: ``birth``, ``country``, or "" for neither.
    """

    entity: str = ""
    predicate: Literal["birth", "country", ""] = ""


def read_query(query: str, facts: Facts) -> Intent:
    """The intent of any query, the agent's own wordings and others.

    Args:
        query: Words.
        facts: Names and cities that exist.

    Returns:
        A name is asked for birth, a city for its country; the first name wins over cities.
    """
    words = query.split()
    pairs = [" ".join(words[i : i + 2]) for i in range(len(words) - 1)]
    name = next((pair for pair in pairs if pair in facts.people), "")
    if name:
        return Intent(name, "birth" if _BIRTH_WORDS & set(words) else "")
    city = next((word for word in words if word in facts.countries), "")
    return Intent(city, "country" if city and "country" in words else "")


def score(query: str, text: str, sub_answer: str, facts: Facts, seed: int) -> int:
    """Relevance of one passage; a pure function of its arguments.

    Args:
        query: Of the turn.
        text: Of the passage.
        sub_answer: The fact that the query is after; "" for *not sure*.
        facts: Names and cities that exist.
        seed: Of the world, and so of the noise.

    Returns:
        A multiple of 5 in 0..100.
    """
    noise = Random(f"search_world/{seed}/judge/{query}/{text}").gauss(0, NOISE_SD)
    noisy = round((plain_score(read_query(query, facts), text) + noise) / STEP) * STEP
    if sub_answer and f" {sub_answer} " not in f" {text} ":
        noisy = min(noisy, WITHOUT_SUB_ANSWER)
    return max(0, min(100, noisy))


def plain_score(intent: Intent, text: str) -> int:
    """Relevance without noise and sub-answer.

    Args:
        intent: Of the query.
        text: Of the passage.
    """
    if not intent.entity or f" {intent.entity} " not in f" {text} ":
        return NOTHING
    states = {"birth": first_city, "country": first_country}.get(intent.predicate)
    return FULL if states is not None and states(intent.entity, text) else ENTITY_ONLY


def infer_facts(asked: Asked, queries: Sequence[str], facts: Facts) -> list[str]:
    """The fact that each query of a right trajectory was after, "" for *not sure*.

    Args:
        asked: The question.
        queries: Of the trajectory, in order.
        facts: Names and cities that exist.

    Returns:
        The city of birth for queries about the person asked for, the country for queries about
        the city on the way; nothing of others.
    """
    wanted = {("country", asked.city): asked.country}
    if asked.name:
        wanted["birth", asked.name] = asked.city
    intents = [read_query(query, facts) for query in queries]
    return [wanted.get((intent.predicate, intent.entity), "") for intent in intents]
