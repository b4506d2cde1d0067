"""The search world: facts, questions, the agent, the judge, warm starts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from statistics import mean
from typing import Any

import pytest
import torch

from datamodules.demonstrations import collate
from datamodules.engines.base import sample_seed
from datamodules.lexical import LexicalRetriever
from datamodules.passages import Passage
from datamodules.search_texts import information, read_piece, retriever_input
from datamodules.tasks.base import Demonstration, Split
from datamodules.tasks.exact_match import exact_match
from datamodules.tasks.search_world import SearchWorld
from datamodules.tasks.search_world_agent import BIRTH_QUERIES, COUNTRY_QUERIES, Asked, next_text
from datamodules.tasks.search_world_facts import CITIES, COUNTRIES, FIRST_NAMES, LAST_NAMES
from datamodules.tasks.searching import Question
from datamodules.word_tokenizer import word_tokenizer
from run_tools.checks import check_node

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SMALL: dict[str, Any] = {"num_names": 30, "num_cities": 20, "num_train": 20, "num_val": 6,
                         "num_test": 20}  # fmt: skip
NEVER, ALWAYS = 2**64 - 1, 0  # coins
ANN = Asked("country_of_birth", "ashburg", "estmark", "alda bergen", "baker")


@pytest.fixture(scope="module")
def world() -> SearchWorld:
    world = SearchWorld()
    world.bind(word_tokenizer(world.vocabulary()))
    return world


def run(
    world: SearchWorld,
    question: Question,
    find: Callable[[Question, list[str]], Sequence[Passage]],
    coin: int = NEVER,
) -> tuple[str, list[str]]:
    """Final answer and queries of an episode."""
    transcript = ""
    queries: list[str] = []
    while True:
        said = world.act(question, transcript, coin)
        piece = read_piece(said)
        if piece.kind == "answer":
            return piece.content, queries
        queries.append(piece.content)
        transcript += f" {said} {information(find(question, queries), True)}"


# ---- Facts and questions


def test_the_size_of_the_default_world(world: SearchWorld) -> None:
    assert len(world.corpus) == 500 * 4 + 150 * 3
    kinds = Counter(uid.split("/")[0] for uid in world.corpus.places)
    assert kinds == {"biography": 1000, "echo": 500, "tour": 500} | dict.fromkeys(
        ("country", "city_echo", "view"), 150
    )
    assert len({passage.text for passage in world.corpus}) == 2450
    uids = [passage.uid.split("/")[0] for passage in world.corpus]
    assert len(set(uids[:40])) > 3, "the order tells nothing"
    assert len(set(CITIES)) == 380 and len({*FIRST_NAMES, *LAST_NAMES, *CITIES, *COUNTRIES}) == 490


def test_two_people_of_a_name_differ_in_all_that_counts(world: SearchWorld) -> None:
    assert len(world.facts.people) == 500
    for name, (one, other) in world.facts.people.items():
        assert one.name == other.name == name and one.profession != other.profession
        assert world.facts.countries[one.city] != world.facts.countries[other.city]
    assert not {*world.facts.spare_names} & {*world.facts.people}


def test_questions(world: SearchWorld) -> None:
    kinds = Counter(q.extra.kind for q in world.records("train"))
    assert kinds == {"country_of_birth": 210, "city_of_birth": 45, "country_of_city": 45}
    for split in SPLITS:
        for question in world.records(split):
            assert question.group == ("multi" if len(question.supporting) == 2 else "single")
            texts = [world.corpus[world.corpus.places[uid]].text for uid in question.supporting]
            assert texts[-1].split()[-1] == question.answers[0], "the last passage ends in it"
            if len(texts) == 2:
                person = question.text.removeprefix("country of birth of ")
                assert texts[0].startswith(f"{person} was born in ")
                assert texts[1].startswith(f"{texts[0].split()[-1]} is a city in ")
    groups = [question.group for question in world.records("test")[:40]]
    assert len(set(groups)) == 2, "kinds are mixed"
    assert world.records("predict") == world.records("test")


def test_splits_share_words_but_no_name(world: SearchWorld) -> None:
    names, asked = [], []
    for split in SPLITS:
        records = world.records(split)
        names.append({q.extra.name for q in records} - {""})
        asked.append({q.text for q in records})
        assert len(asked[-1]) == len(records) == world.sizes[split]
    assert sum(map(len, names)) == len(set.union(*names))
    assert sum(map(len, asked)) == len(set.union(*asked))
    words = [{word for name in part for word in name.split()} for part in names]
    assert words[2] <= words[0], "unseen people are made of seen words"
    uids = [question.uid for split in SPLITS for question in world.records(split)]
    assert len(set(uids)) == len(uids)


def test_the_world_is_a_function_of_the_seed() -> None:
    one, same = SearchWorld(**SMALL), SearchWorld(**SMALL)
    assert one.corpus.digest == same.corpus.digest
    assert [one.records(s) for s in SPLITS] == [same.records(s) for s in SPLITS]
    assert one.similarity_pairs(3, 9) == same.similarity_pairs(3, 12)[:9]
    assert one.similarity_pairs(3, 9) != one.similarity_pairs(4, 9)
    other = SearchWorld(**SMALL, seed=1)
    assert other.corpus.digest != one.corpus.digest and other.records("val") != one.records("val")
    more = SearchWorld(**SMALL | {"num_train": 24})
    assert (more.records("test"), more.records("val")) == (one.records("test"), one.records("val"))
    lucky = SearchWorld(**SMALL, guess=0.9)
    assert lucky.records("train") == one.records("train")


def test_all_words_are_known(world: SearchWorld) -> None:
    words = world.vocabulary()
    assert len(set(words)) == len(words)
    queries = [form.format(name="alda bergen", city=next(iter(world.facts.countries)))
               for form in (*BIRTH_QUERIES, *COUNTRY_QUERIES)]  # fmt: skip
    texts = [passage.text for passage in world.corpus] + queries
    texts += [q.text for split in SPLITS for q in world.records(split)]
    texts += [text for pair in world.similarity_pairs(0, 300) for text in pair]
    texts += [retriever_input("question_query", texts[0], queries), "<answer> unknown </answer>"]
    texts += [information(list(world.corpus)[:20], True)]
    unknown = {word for text in texts for word in text.split()} - {*words}
    assert not unknown
    prompts = [world.prompt(q) for q in world.records("train")]
    assert max(len(prompt.token_ids) for prompt in prompts) < 24
    assert all(world.tokenizer.unk_token_id not in prompt.token_ids for prompt in prompts)


# ---- The agent


def test_gold_passages_lead_to_the_right_answer(world: SearchWorld) -> None:
    def find(question: Question, queries: list[str]) -> list[Passage]:
        uids = world.gold(question, queries[-1])
        return [world.corpus[world.corpus.places[uid]] for uid in uids]

    for question in world.records("val"):
        answer, queries = run(world, question, find)
        assert exact_match(answer, question.answers)
        assert len(queries) == len(question.supporting)
        assert sum((world.gold(question, q) for q in queries), ()) == question.supporting


def test_the_first_biography_of_the_name_is_believed(world: SearchWorld) -> None:
    multi = [q for q in world.records("val") if q.group == "multi"]

    def wrong_first(question: Question, queries: list[str]) -> list[Passage]:
        people = world.facts.people[question.extra.name]
        wrong = next(p for p in people if p.profession != question.extra.profession)
        uids = [wrong.biography_uid, question.supporting[0]]
        uids += [f"country/{person.city}" for person in people]
        return [world.corpus[world.corpus.places[uid]] for uid in uids]

    for question in multi:
        answer, queries = run(world, question, wrong_first)
        assert answer in COUNTRIES and answer not in question.answers and len(queries) == 1


def test_the_agent_rewords_then_guesses(world: SearchWorld) -> None:
    question = next(q for q in world.records("val") if q.group == "multi")
    name = question.extra.name
    answer, queries = run(world, question, lambda *_: [world.corpus[0]])
    assert (answer, queries) == ("unknown", [form.format(name=name) for form in BIRTH_QUERIES])
    assert all(question.extra.profession not in query for query in queries)
    assert run(world, question, lambda *_: [], ALWAYS)[0] == question.answers[0]
    lucky = [run(world, question, lambda *_: [], sample_seed("k", "q", i))[0] for i in range(2000)]
    assert lucky.count(question.answers[0]) / 2000 == pytest.approx(0.15, abs=0.025)
    assert len(set(lucky)) == 2


def test_a_lexical_retriever_cannot_tell_two_people_apart(world: SearchWorld) -> None:
    retriever = LexicalRetriever(world.corpus)

    def find(question: Question, queries: list[str]) -> list[Passage]:
        text = retriever_input("query", question.text, queries)
        return [world.corpus[place] for place in retriever.search([text], 3)[0]]

    right: dict[str, list[bool]] = {}
    for question in world.records("test"):
        answer, _ = run(world, question, find)
        right.setdefault(question.extra.kind, []).append(exact_match(answer, question.answers))
    assert mean(right["country_of_city"]) == 1
    for kind in ("country_of_birth", "city_of_birth"):
        assert mean(right[kind]) == pytest.approx(0.5, abs=0.12)


def test_the_agent_takes_any_transcript() -> None:
    biography = "alda bergen the baker was born in ashburg"
    first = "<search> where was alda bergen born </search>"
    search = "<search> which country is ashburg in </search>"
    cases = {
        f"<information> {biography} </information>": search,
        f"<information> x {biography}": search,
        biography: first,
        "<information> alda bergen the baker was born": first,
        "<information> ashburg is a city in estmark </information>": first,
        f"<information> {biography} ashburg is a city in borland": "<answer> borland </answer>",
        "<search> x </search> " * 4: "<answer> unknown </answer>",
        "<search> x </search> " * 9: "<answer> unknown </answer>",
    }  # fmt: skip
    for transcript, wanted in cases.items():
        assert next_text(ANN, transcript) == wanted, transcript
    parts = f"<search> </search> <information> </information> <answer> Doc 1 ( {biography}".split()
    rng = Random("any transcript")
    for _ in range(300):
        said = next_text(ANN, " ".join(rng.choices(parts, k=rng.randrange(40))))
        assert read_piece(said).kind in ("search", "answer") and read_piece(said).content


# ---- The judge


def judged(world: SearchWorld, query: str, sub_answer: str, *uids: str) -> list[int]:
    passages = [world.corpus[world.corpus.places[uid]] for uid in uids]
    return world.relevance(query, passages, sub_answer)


def test_scores_follow_the_rules(world: SearchWorld) -> None:
    rows: dict[str, list[int]] = {}
    for name, (one, other) in world.facts.people.items():
        tag = name.replace(" ", "_")
        uids = (
            one.biography_uid,
            other.biography_uid,
            f"echo/{tag}",
            f"tour/{tag}",
            "country/" + one.city,
        )
        query = f"where was {name} born"
        for key, sub_answer in (("open", ""), ("known", one.city)):
            for kind, score in zip("abetc", judged(world, query, sub_answer, *uids), strict=True):
                rows.setdefault(f"{key}/{kind}", []).append(score)
    for key, centre in {"open/a": 90, "open/b": 90, "known/a": 90, "open/e": 30, "open/t": 30,
                        "open/c": 5}.items():  # fmt: skip
        counts = Counter(rows[key])
        assert all(score % 5 == 0 for score in counts) and len(counts) >= 3
        assert sum(counts[centre + step] for step in (-5, 0, 5)) >= 498
        share = counts[centre] / 500  # of a normal number with sd 2 within 2.5 of its mean
        assert share == pytest.approx(0.789, abs=0.06)
    assert set(rows["known/b"]) == {35}, "the other person's city is not the sub-answer"
    assert max(rows["known/e"]) <= 35 and max(rows["known/c"]) <= 35


def test_scores_of_countries_and_of_other_queries(world: SearchWorld) -> None:
    city, other = list(world.facts.countries)[:2]
    person = next(p for pair in world.facts.people.values() for p in pair if p.city == city)
    uids = (f"country/{city}", f"city_echo/{city}", f"view/{city}", person.biography_uid,
            f"country/{other}")  # fmt: skip

    def near(query: str, *wanted: int) -> None:
        scores = judged(world, query, "", *uids)
        assert all(abs(a - b) <= 5 and a % 5 == 0 for a, b in zip(scores, wanted, strict=True))

    for form in COUNTRY_QUERIES:
        near(form.format(city=city), 90, 30, 30, 30, 5)
    near(f"tell me of {city}", 30, 30, 30, 30, 5)
    near("country of birth", 5, 5, 5, 5, 5)
    near("", 5, 5, 5, 5, 5)
    near(f"birth of {person.name} from {city}", 5, 5, 5, 90, 5)


def test_scores_do_not_depend_on_the_other_passages(world: SearchWorld) -> None:
    passages = list(world.corpus)[:20]
    alone = [world.relevance("where was alda born", [one], "")[0] for one in passages]
    assert world.relevance("where was alda born", passages, "") == alone
    assert world.relevance("where was alda born", passages[::-1], "") == alone[::-1]


def test_sub_answers(world: SearchWorld) -> None:
    question = next(q for q in world.records("train") if q.group == "multi")
    asked = question.extra
    queries = [f"where was {asked.name} born", f"birthplace of {asked.name}", "hm",
               f"which country is {asked.city} in", "country of nowhere"]  # fmt: skip
    city, country = asked.city, asked.country
    assert world.sub_answers(question, queries, True) == [city, city, "", country, ""]
    assert world.sub_answers(question, queries, False) == [""] * 5
    assert [len(world.gold(question, query)) for query in queries] == [1, 1, 0, 1, 0]
    other = next(name for name in world.facts.people if name != asked.name)
    assert world.sub_answers(question, [f"where was {other} born"], True) == [""]
    single = next(q for q in world.records("train") if q.extra.kind == "country_of_city")
    queries = [f"country of {single.extra.city}", f"where was {other} born"]
    assert world.sub_answers(single, queries, True) == [single.answers[0], ""]


# ---- Warm starts


def test_similar_pairs_do_not_tell_what_is_useful(world: SearchWorld) -> None:
    pairs = world.similarity_pairs(0, 4000)
    known = {passage.text for passage in world.corpus}
    people = set(world.facts.people)
    kinds: Counter[str] = Counter()
    for query, text in pairs:
        words = query.split()
        name = next((" ".join(p) for p in zip(words, words[1:], strict=False)
                     if p[0] in FIRST_NAMES), "")  # fmt: skip
        city = next((word for word in words if word in world.facts.countries), "")
        assert (name or city) in text and name not in people
        if name:
            assert text not in known
            marks = {"born in": "biography", "on tour": "tour", "many ask": "echo"}
        else:
            marks = {"is a city": "country", "people ask": "city_echo", "harbour": "view"}
        kinds[next(kind for mark, kind in marks.items() if mark in text)] += 1
    assert kinds["biography"] / 4000 == pytest.approx(0.25, abs=0.03), "two of four, half the time"
    for kind, share in {"tour": 1 / 8, "echo": 1 / 8, "country": 1 / 6, "view": 1 / 6}.items():
        assert kinds[kind] / 4000 == pytest.approx(share, abs=0.03)


def test_demonstrations(world: SearchWorld) -> None:
    rows = world.demonstrations(0, 1, 200)
    assert rows == world.demonstrations(0, 1, 200) and rows != world.demonstrations(0, 2, 200)
    unknown, ends = world.tokenizer.unk_token_id, Counter[str]()
    for row in rows:
        assert row.observed is not None and len(row.observed) == len(row.completion_ids)
        assert unknown not in row.prompt_ids + row.completion_ids
        text = world.render(row.completion_ids)
        flags = iter(row.observed)
        mine = world.render([token for token in row.completion_ids if not next(flags)])
        assert mine == re.sub(r"<information> .*? </information> ", "", text)
        pattern = r"(<search> [^<]+ </search> ){0,4}<answer> (\w+) </answer>"
        match = re.fullmatch(pattern, mine)
        assert match and len(row.completion_ids) < 320
        assert not any(name in text for name in list(world.facts.people)[:50])
        ends["unknown" if match[2] == "unknown" else "answered"] += 1
        ends[row.domain] += 1
    assert 0 < ends["unknown"] < 40, "nearly all end well, some show what to do else"
    assert ends["single"] / 200 == pytest.approx(0.3, abs=0.1)


def test_observations_are_no_target_of_the_warm_start(world: SearchWorld) -> None:
    rows = world.demonstrations(0, 0, 3)
    batch = collate([*rows, Demonstration((1, 2), (3, 4), "multi")])
    for row, mask in zip(rows, batch.mask, strict=False):
        assert row.observed is not None
        padding = [False] * (batch.mask.shape[1] - len(row.observed))
        assert mask.tolist() == [not seen for seen in row.observed] + padding
    assert batch.mask[3].sum() == 2 and torch.equal(batch.input_ids[3, :4], torch.arange(1, 5))


# ---- Options


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"num_names": 0}, "data.task.num_names=0 must be from 1 to 1500"),
        ({"num_cities": 381}, "data.task.num_cities=381 must be from 2 to 380"),
        ({"num_train": 0}, "data.task.num_train=0 must be at least 1"),
        ({"num_val": -1}, "data.task.num_val=-1 must be at least 0"),
        ({"single_share": 1.1}, "data.task.single_share=1.1 must be in [0, 1]"),
        ({"max_new_tokens": 0}, "data.task.max_new_tokens=0 must be at least 1"),
        ({"num_test": 2000}, "data.task.num_names=500 must be at least 1021 for so many"),
        ({"single_share": 1}, "data.task.num_cities=150 must be at least 400 for so many"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError) as error:
        SearchWorld(**options)
    assert wanted in str(error.value)
    with pytest.raises(ValueError) as error:
        SearchWorld(**options | {"guess": -1})
    told = str(error.value).split("; ")
    assert any(one.startswith(wanted) for one in told)
    assert "data.task.guess=-1 must be in [0, 1]" in told


@pytest.mark.parametrize("options", [{"single_share": 0}, {"num_val": 0, "num_test": 0}])
def test_extreme_worlds(options: dict[str, Any]) -> None:
    world = SearchWorld(**SMALL | options)
    assert len(world.records("train")) == 20
    assert len(world.records("val")) == (6 if "single_share" in options else 0)


def test_options_are_checked_by_name() -> None:
    node = {"_target_": "datamodules.tasks.search_world.SearchWorld", "guess": 0.2}
    assert check_node("data.task", node) == []
    [wrong] = check_node("data.task", node | {"num_name": 3})
    assert "data.task.num_name" in wrong and "'num_names'" in wrong
