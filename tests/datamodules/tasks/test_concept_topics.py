"""Concepts and topics: the world, its pairs, label noise, evaluation sets."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from datamodules.tasks.base import Split
from datamodules.tasks.concept_topics import ConceptTopics
from datamodules.tasks.embedding import PairSet, RetrievalSet
from lightning_modules.backbones.tiny import word_tokenizer
from run_tools.checks import check_node

SMALL: dict[str, Any] = {"num_train": 60, "num_pretrain": 20, "num_val": 10, "num_test": 15}


def texts(sets: list[PairSet]) -> set[str]:
    return {str(item) for one in sets for row in one.rows for item in (row.query, row.positive)}


def concepts(text: Any, domain: int) -> set[int]:
    found = [re.fullmatch(rf"d{domain}c(\d+)[ab]", word) for word in text.split()]
    return {int(match[1]) for match in found if match}


def noise(text: Any) -> list[str]:
    return [word for word in text.split() if re.fullmatch(r"n\d\d", word)]


def test_pairs_are_what_the_card_says() -> None:
    task = ConceptTopics(**SMALL, label_noise=0)
    sets = task.pairs("train")
    assert [(one.name, len(one.rows)) for one in sets] == [(f"domain_{i}", 60) for i in range(5)]
    assert all(one.in_batch and one.kind == "retrieval" for one in sets)
    for domain, one in enumerate(sets):
        for row in one.rows:
            asked, told = concepts(row.query, domain), concepts(row.positive, domain)
            assert (len(asked), len(told), asked < told) == (3, 6, True)
            assert (len(noise(row.query)), len(noise(row.positive))) == (3, 8)
            assert (len(row.query.split()), len(row.positive.split())) == (6, 14)  # type: ignore[union-attr]
            assert any(told <= set(topic) for topic in task.topics)
    words = Counter(word for text in texts(sets) for word in text.split())
    assert words["n00"] and words["n59"], "all noise words are used"
    redrawn = [
        set(str(row.query).split()) - set(str(row.positive).split()) - set(noise(row.query))
        for one in sets
        for row in one.rows
    ]
    share = sum(map(len, redrawn)) / (3 * len(redrawn))
    assert 0.42 < share < 0.58, "half of a query's words are the other word of their concept"
    ends = [str(row.positive).split()[-1] for one in sets for row in one.rows]
    assert 0.4 < sum(word[0] == "n" for word in ends) / len(ends) < 0.75, "words are shuffled"


def test_the_world_is_a_function_of_the_seed() -> None:
    task, same = ConceptTopics(**SMALL), ConceptTopics(**SMALL)
    assert len(task.topics) == 60 and {len(set(topic)) for topic in task.topics} == {12}
    more = ConceptTopics(**SMALL | {"num_train": 70, "num_test": 20, "label_noise": 0})
    assert same.topics == task.topics == more.topics
    assert same.pairs("train") == task.pairs("train")
    assert same.evaluations("test") == task.evaluations("test")
    longer, shorter = more.pairs("test"), task.pairs("test")
    assert [list(one.rows[:15]) for one in longer] == [list(one.rows) for one in shorter]
    other = ConceptTopics(**SMALL, seed=1)
    assert other.topics != task.topics and not texts(other.pairs("val")) & texts(task.pairs("val"))
    task.pairs("val")[0].rows.clear()  # type: ignore[attr-defined]
    assert task.pairs("val") == same.pairs("val"), "what a caller does to a list stays there"


def test_splits_and_the_warm_start_have_nothing_in_common() -> None:
    task = ConceptTopics(**SMALL)
    names: tuple[Split, ...] = ("train", "val", "test")
    parts = [*(task.pairs(split) for split in names), task.warm_start_pairs()]
    assert [[len(one.rows) for one in part] for part in parts] == [
        [60] * 5, [10] * 5, [15] * 5, [20] * 6,
    ]  # fmt: skip
    uids = [row.uid for part in parts for one in part for row in one.rows]
    assert len(set(uids)) == len(uids)
    both = [texts(part) for part in parts]
    assert sum(map(len, both)) == len(set.union(*both)) == 2 * len(uids)
    assert task.pairs("predict") == task.pairs("test")
    assert ConceptTopics(num_pretrain=0).warm_start_pairs() == []
    nothing = ConceptTopics(num_val=0)
    assert nothing.pairs("val") == [] and nothing.evaluations("val") == []


@pytest.mark.parametrize(("share", "count"), [(0.1, 6), (1.0, 60), (0.01, 0), (0.0, 0)])
def test_label_noise_permutes_a_share_of_the_positives(share: float, count: int) -> None:
    noisy = ConceptTopics(**SMALL, label_noise=share)
    pure = ConceptTopics(**SMALL, label_noise=0)
    for one, right in zip(noisy.pairs("train"), pure.pairs("train"), strict=True):
        pairs = list(zip(one.rows, right.rows, strict=True))
        assert [(a.uid, a.query) for a, _ in pairs] == [(b.uid, b.query) for _, b in pairs]
        assert sum(a.positive != b.positive for a, b in pairs) == count
        assert Counter(a.positive for a, _ in pairs) == Counter(b.positive for _, b in pairs)
    for split in ("val", "test"):
        assert noisy.pairs(split) == pure.pairs(split)  # type: ignore[arg-type]
    assert noisy.warm_start_pairs() == pure.warm_start_pairs()
    assert noisy.evaluations("train") == pure.evaluations("train")


def test_evaluations() -> None:
    task = ConceptTopics(**SMALL, num_domains=7, train_domains=[2, 0], new_domains=[5])
    assert [one.name for one in task.pairs("train")] == ["domain_2", "domain_0", "domain_5"]
    sets = task.evaluations("test")
    groups = ["in_domain", "ood", "in_domain", "ood", "ood", "new", "ood"]
    assert [(one.name, one.group) for one in sets] == [
        (f"domain_{domain}", group) for domain, group in enumerate(groups)
    ]
    rows = {one.name: one.rows for one in task.pairs("test")}
    for one in sets:
        assert isinstance(one, RetrievalSet)
        assert [list(places) for places in one.relevant] == [[i] for i in range(15)]
        if one.name in rows:
            assert list(one.queries) == [row.query for row in rows[one.name]]
            assert list(one.corpus) == [row.positive for row in rows[one.name]]


def test_identical_documents_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    same = staticmethod(lambda rng, domain, concepts, noise: f"{min(concepts) % 3}")
    monkeypatch.setattr(ConceptTopics, "_text", same)
    for one in ConceptTopics(**SMALL).evaluations("val"):
        assert isinstance(one, RetrievalSet)
        assert max(map(len, one.relevant)) > 1
        for index, places in enumerate(one.relevant):
            assert index in places
            assert places == [i for i, text in enumerate(one.corpus) if text == one.corpus[index]]


def test_all_words_are_known() -> None:
    task = ConceptTopics(**SMALL)
    words = task.vocabulary()
    assert len(words) == len(set(words)) == 6 * 120 * 2 + 60
    task.bind(word_tokenizer(words))
    sets = [*task.pairs("train"), *task.pairs("test"), *task.warm_start_pairs()]
    assert {word for text in texts(sets) for word in text.split()} <= set(words)
    with pytest.raises(ValueError, match="'n59'"):
        task.bind(word_tokenizer(words[:-1]))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"num_train": 0}, "data.task.num_train=0 must be at least 1"),
        ({"concepts_per_topic": 5}, "data.task.concepts_per_topic=5 must be at least 6"),
        ({"num_concepts": 11}, "data.task.num_concepts=11 must be at least 12"),
        ({"label_noise": 1.5}, "data.task.label_noise=1.5 must be in [0, 1]"),
        ({"train_domains": [0, 6]}, "data.task.train_domains=[0, 6] must be numbers from 0 to 5"),
        ({"train_domains": [0, 0]}, "data.task.train_domains=[0, 0] must name a domain once"),
        ({"train_domains": []}, "data.task.train_domains=[] must name a domain"),
        ({"new_domains": [3, 4]}, "both have [3]"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError) as error:
        ConceptTopics(**options)
    assert wanted in str(error.value)
    with pytest.raises(ValueError) as error:
        ConceptTopics(**options | {"num_val": -1})
    assert wanted in str(error.value) and "data.task.num_val=-1" in str(error.value)


def test_options_are_checked_by_name_and_type() -> None:
    node = {"_target_": "datamodules.tasks.concept_topics.ConceptTopics", "train_domains": [0]}
    assert check_node("data.task", node) == []
    [wrong] = check_node("data.task", node | {"num_topic": 3})
    assert "data.task.num_topic" in wrong and "'num_topics'" in wrong
