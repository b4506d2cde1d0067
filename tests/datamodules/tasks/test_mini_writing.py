"""Miniature writing: worth of texts, the judge in code, modes, hidden types, base model."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.base import Pair
from datamodules.tasks.mini_writing import MiniWriting
from datamodules.tasks.mini_writing_pairs import MiniWritingPairs
from datamodules.tasks.mini_writing_world import KINDS, Query, WritingWorld
from lightning_modules.backbones.tiny import word_tokenizer


def make(**options: Any) -> MiniWriting:
    task = MiniWriting(**options)
    task.bind(word_tokenizer(task.vocabulary()))
    return task


def write(task: MiniWriting, text: str, reason: FinishReason = FinishReason.STOP) -> Completion:
    ids = tuple(task.tokenizer.convert_tokens_to_ids([*text.split(), "<eos>"]))
    return Completion(ids, (0.0,) * len(ids), reason)


def asked(task: MiniWriting, kind: str, start: int = 6) -> Prompt:
    found = task.read_question(f"genre{task._genres[kind][0]} w{start}")  # type: ignore[index]
    return task.prompt(found)


@pytest.mark.parametrize(
    ("kind", "text", "utility", "blind"),
    [
        ("long", "w6 w7 w0 w1 w2 w3 w4 w5", 8, 8),
        ("long", "w6 w7 w0 w1 w2 w3 w4 w5 w6 w0", 8, 8),
        ("long", "w6 w7 w1 w1", 3, 6),
        ("long", "w7 w0 w1", 0, 0),
        ("long", "w6", 1, 8),
        ("long", "genre0 w7", 1, 4),
        ("long", "", 0, 0),
        ("short", "w0 w1 w2 w3", 4, 4),
        ("short", "w0 w1 w0 w3", 3, 3),
        ("short", "w0 w1 w2 w3 w4 w5 w6", 2.5, 4),
        ("short", "w0 w0 w0 w0 w1 w2 w3", -0.5, 1),
        ("short", "w0 w1 genre0 w2", 3, 3),
        ("short", "", 0, 0),
    ],
)
def test_utilities(kind: str, text: str, utility: float, blind: float) -> None:
    task = make()
    prompt = asked(task, kind)
    assert task.judged(prompt.record.text, text) == utility
    assert make(length_blind=True).judged(prompt.record.text, text) == blind
    parts = task.verify(prompt, write(task, text))
    assert parts["utility"] == utility / {"long": 8, "short": 4}[kind]
    assert parts["content_length"] == len(text.split())
    assert parts["valid"] == float(text != "")


@pytest.mark.parametrize(
    ("text", "plan", "valid"),
    [
        ("w1 w2", 0, 1),
        ("<plan> </plan> w1 w2", 0, 1),
        ("<plan> w1 </plan> w1 w2", 0, 1),  # a tiny plan is none
        ("<plan> w1 w2 </plan> w1 w2", 1, 1),
        ("<plan> w1 w2 </plan>", 1, 0),
        ("<plan> w1 w2 w3", 0, 0),
        ("w1 <plan> w1 w2 </plan> w2", 0, 0),
        ("<plan> w1 w2 <plan> w3 </plan> w2", 0, 0),
    ],
)
def test_the_mode_of_both_types(text: str, plan: int, valid: int) -> None:
    task = make()
    for kind in KINDS:
        parts = task.verify(asked(task, kind), write(task, text))
        mode = float(valid and plan == (kind == "long"))
        wanted = {"mode": mode, "plan": plan, "valid": valid, "reward": mode}
        assert {name: parts[name] for name in wanted} == wanted


def test_what_judges_and_lengths_see_has_no_plan() -> None:
    task = make()
    prompt = asked(task, "long")
    seen = []
    for plan in ("", "<plan> </plan> ", "<plan> w1 w2 </plan> ", "<plan> w6 w7 w0 w1 w2 </plan> "):
        completion = write(task, plan + "w6 w7 w0")
        seen.append(task.conversation(prompt, completion))
        read = task.read_plan(prompt, completion)
        span = task.render(completion.token_ids[slice(*read.plan_span)])
        assert (span, read.content, read.content_tokens) == (plan.strip(), "w6 w7 w0", 3)
        assert task.verify(prompt, completion)["utility"] == 3 / 8
    chat = (("user", prompt.record.text),)
    assert seen == [(chat, "w6 w7 w0")] * 4
    cut = write(task, "<plan> w1 w2 </plan> w6 w7 w0", FinishReason.LENGTH)
    assert task.conversation(prompt, cut) == (chat, "")
    parts = task.verify(prompt, cut)
    assert (parts["valid"], parts["reward"], parts["utility"], parts["mode"]) == (0, 0, 0, 0)


def test_prefixes_force_their_mode() -> None:
    task = make()
    known = task.tokenizer.get_vocab()
    assert task.plan_prefix("plan") == (known["<plan>"],)
    assert task.plan_prefix("direct") == (known["<plan>"], known["</plan>"])
    prompt, rest = asked(task, "short"), write(task, "w1 w2 </plan> w3").token_ids
    forced = Completion((*task.plan_prefix("plan"), *rest), (0.0,) * 6, FinishReason.STOP)
    assert task.verify(prompt, forced)["plan"] == 1
    direct = (*task.plan_prefix("direct"), *rest[3:])
    assert task.verify(prompt, Completion(direct, (0.0,) * 4, FinishReason.STOP))["reward"] == 1


def test_records_are_balanced_fresh_and_pure() -> None:
    task = make(num_train=40, num_val=6, num_test=8)
    sizes = {split: len(task.records(split)) for split in ("train", "val", "test", "predict")}
    assert sizes == {"train": 40, "val": 6, "test": 8, "predict": 8}
    train = task.records("train")
    assert train == make(num_train=40).records("train")
    assert train[:20] == make(num_train=20).records("train")
    assert train != make(num_train=40, seed=1).records("train")
    assert Counter(query.kind for query in train) == {"long": 20, "short": 20}
    assert len({query.genre for query in train}) == 4
    assert len({query.start for query in train}) == 8
    for query in train:
        prompt = task.prompt(query)
        assert (prompt.domain, task.kind(prompt)) == (query.kind, query.kind)
        assert task.render(prompt.token_ids) == f"{query.text} write"
        assert len(prompt.token_ids) == task.max_prompt_tokens
        asks = task.read_question(query.text)
        assert (asks.kind, asks.genre, asks.start) == (query.kind, query.genre, query.start)
    uids = {r.uid for split in ("train", "val", "test") for r in task.records(split)}
    assert len(uids) == 54


def other_world(task: WritingWorld) -> int:
    """A seed of a world in which every genre has the other type."""
    seeds = range(1, 100)
    return next(s for s in seeds if WritingWorld(world_seed=s)._genres["long"] == short(task))


def short(task: WritingWorld) -> list[int]:
    return task._genres["short"]


def test_the_type_is_in_no_token_and_no_text() -> None:
    task = make()
    swapped = make(world_seed=other_world(task))
    vocabulary = task.vocabulary()
    assert vocabulary == swapped.vocabulary()
    assert not any("long" in word or "short" in word for word in vocabulary)
    for genre in range(4):
        for start in range(8):
            one, other = (t.read_question(f"genre{genre} w{start}") for t in (task, swapped))
            assert {one.kind, other.kind} == {"long", "short"}
            prompts = task.prompt(one), swapped.prompt(other)
            assert prompts[0].token_ids == prompts[1].token_ids
            assert prompts[0].uid == prompts[1].uid
            completion = write(task, "<plan> w1 w2 </plan> w3")
            chat = task.conversation(prompts[0], completion)
            assert chat == swapped.conversation(prompts[1], completion)
            rewards = [p.task.verify(p, completion)["reward"] for p in prompts]
            assert sorted(rewards) == [0, 1]


def pairs(task: MiniWriting, count: int) -> list[Pair]:
    rng, out = Random(5), []
    for index in range(count):
        query = task.draw_query(rng, "", KINDS[index % 2])
        first, second = (" ".join(task.draw_text(rng, query, 0.5)) for _ in range(2))
        out.append(Pair(str(index), query.text, (first, second)))
    return out


def test_the_judge_in_code_is_symmetric_and_flips_as_often_as_asked() -> None:
    task = make(flip=0.1)
    flips, total, elsewhere = 0, 0, 0
    for pair in pairs(task, 2000):
        first, second = (task.judged(pair.question, text) for text in pair.responses)
        margin = task.compare(pair)
        assert margin == -task.compare(pair.swap()) == make_compare(pair)
        assert abs(margin) == abs(first - second)
        total += first != second
        is_flipped = margin != first - second
        flips += is_flipped
        elsewhere += is_flipped and WritingWorld(world_seed=1).compare(pair) == margin
    assert total > 1500
    assert 0.07 < flips / total < 0.13
    assert elsewhere < flips, "flips of another world are others"
    honest = make(flip=0.0)
    for pair in pairs(task, 200):
        first, second = (task.judged(pair.question, text) for text in pair.responses)
        assert honest.compare(pair) == first - second


COMPARE = WritingWorld(flip=0.1)


def make_compare(pair: Pair) -> float:
    """By another object of the same world."""
    return COMPARE.compare(pair)


def test_a_judge_that_is_shown_plans_may_like_them() -> None:
    world, biased = WritingWorld(flip=0.0), WritingWorld(flip=0.0, plan_bonus=1.0)
    question = asked(make(), "long").record.text
    planned = "<plan> w1 w2 w3 </plan> w6 w7 <eos>"
    assert world.judged(question, planned) == world.judged(question, "w6 w7") == 2
    assert biased.judged(question, planned) == 5
    assert biased.judged(question, "w6 w7") == 2
    assert biased.compare(Pair("", question, (planned, "w6 w7 w0"))) == 2
    assert biased.judged(question, "<plan> w6 w7") == 2, "never closed: all plan"
    with pytest.raises(ValueError, match="'genre9 w0' is no query of task 'writing_world'"):
        world.judged("genre9 w0", "w1")


def test_the_base_model_plans_whatever_the_genre() -> None:
    task = make(plan_rate=0.5, empty_rate=0.2)
    shown = task.demonstrations(0, 0, 2000)
    assert shown == task.demonstrations(0, 0, 2000)
    assert shown[:8] != task.demonstrations(0, 1, 8)
    genres: dict[str, list[dict[str, float]]] = {}
    empty = 0
    for one in shown:
        words = task.render(one.prompt_ids).split()
        prompt = task.prompt(task.read_question(" ".join(words[:2])))
        assert (prompt.token_ids, prompt.domain) == (one.prompt_ids, one.domain)
        assert len(one.completion_ids) <= prompt.max_new_tokens
        ids = one.completion_ids
        empty += ids[:2] == task.plan_prefix("direct")
        parts = task.verify(prompt, Completion(ids, (0.0,) * len(ids), FinishReason.STOP))
        assert parts["valid"] == 1
        genres.setdefault(words[0], []).append(parts)
    assert len(genres) == 4
    for parts in genres.values():
        assert 0.42 < sum(p["plan"] for p in parts) / len(parts) < 0.58
        assert sum(p["utility"] for p in parts) / len(parts) < 0.65, "there is much to learn"
    assert 0.07 < empty / len(shown) < 0.13  # a fifth of the half without a plan
    for rate in (0.0, 1.0):
        only = make(plan_rate=rate, empty_rate=0.0).demonstrations(0, 0, 50)
        assert {one.completion_ids[:1] == task.plan_prefix("plan") for one in only} == {rate == 1.0}


def test_writers_without_confusion_and_noise_are_good() -> None:
    task = make(noise=0.0, confusion=0.0, plan_rate=0.0, empty_rate=0.0)
    for one in task.demonstrations(0, 0, 100):
        query = task.read_question(" ".join(task.render(one.prompt_ids).split()[:2]))
        text = task.render(one.completion_ids[:-1])
        numbers = task.numbers(text.split())
        worth = task.utility(query.kind, query.start, numbers)
        assert worth == (min(8, len(numbers)) if query.kind == "long" else worth)
        assert len(set(numbers)) == len(numbers) or query.kind == "long"
        assert len(numbers) in (range(5, 13) if query.kind == "long" else range(2, 8))


def test_any_ids_are_verified() -> None:
    task, rng = make(), Random(0)
    size = len(task.tokenizer)
    some_valid = 0
    for number in range(500):
        ids = tuple(rng.choices([*range(size), -1, 10**9, 7, 8, 15, 16], k=rng.randrange(12)))
        reason = FinishReason.LENGTH if number % 5 == 0 else FinishReason.STOP
        prompt = asked(task, KINDS[number % 2])
        parts = task.verify(prompt, Completion(ids, (0.0,) * len(ids), reason))
        assert set(parts) == {"reward", "mode", "plan", "utility", "content_length", "valid"}
        assert parts["utility"] <= 1
        assert not (number % 5 == 0 and parts["valid"])
        some_valid += int(parts["valid"])
        content = task.conversation(prompt, Completion(ids, (0.0,) * len(ids), reason))[1]
        assert task.compare(Pair("", prompt.record.text, (content, ""))) <= 8
    assert some_valid > 50


def test_both_tasks_share_their_words() -> None:
    for options in ({}, {"num_words": 5, "genres_per_kind": 4}):
        assert MiniWriting(**options).vocabulary() == MiniWritingPairs(**options).vocabulary()
    words = MiniWriting().vocabulary()
    assert len(words) == len(set(words)) == 109


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"genres_per_kind": 0}, "data.task.genres_per_kind=0 must be a whole number"),
        ({"num_words": 1, "flip": 1.5}, r"num_words=1.*data.task.flip=1.5 must be a probability"),
        ({"long_words": 13}, "data.task.long_words=13 must be at most max_words=12"),
        ({"short_words": 9}, "data.task.short_words=9 must be at most num_words=8"),
        ({"min_plan_words": 5}, "data.task.min_plan_words=5 must be at most max_plan_words=4"),
        ({"plan_bonus": -1.0}, "data.task.plan_bonus=-1.0 must be 0 or more"),
        ({"num_val": -1, "plan_rate": 2}, r"data.task.num_val=-1.*data.task.plan_rate=2"),
        ({"empty_rate": -0.1, "noise": 3}, r"data.task.empty_rate=-0.1.*data.task.noise=3"),
        ({"confusion": "x"}, "data.task.confusion='x'"),
        ({"max_words": 2.5}, "data.task.max_words=2.5"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        MiniWriting(**options)


def test_a_query_knows_its_text() -> None:
    query = Query("u", "short", 2, 7)
    assert query.text == "genre2 w7"
    assert make().prompt(query).domain == "short"
