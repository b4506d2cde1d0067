"""TwinNouns: the table, texts drawn when asked for, evaluation sets, reading."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from datamodules.tasks.compression import Context
from datamodules.tasks.twin_nouns import TwinNouns

SMALL: dict[str, Any] = {"num_val": 60, "num_test": 60}
RELATED: dict[str, Any] = SMALL | {"relations": 2}


def sets_of(task: TwinNouns) -> dict[str, list[Context]]:
    return {one.name: list(one.contexts) for one in task.evaluations("test")}


def triples(context: Context) -> list[tuple[str, ...]]:
    words = context.text.split()
    return [tuple(words[i : i + 3]) for i in range(0, len(words), 3)]


def test_the_world_of_the_card() -> None:
    task = TwinNouns(**SMALL)
    assert len(task.vocabulary()) == 16 + 16 + 8 + 3
    assert (len(task.typical), len(task.held_out)) == (231, 25)
    assert not set(task.typical) & set(task.held_out)
    assert set(Counter(task.typical.values())) == set(task.colours)
    assert task.hidden_words() == list(task.colours)
    for context in task.contexts("train")[:500]:
        assert len(context.text.split()) == 6
        nouns = [(a, b) for a, b, _ in triples(context)]
        assert len(set(nouns)) == 2
        assert [c for *_, c in triples(context)] == [task.typical[noun] for noun in nouns]
        for slot, (_, _, colour) in zip(context.slots, triples(context), strict=True):
            [(start, end)] = slot.spans
            assert context.text[start:end] == slot.value == slot.prior == colour
            assert (slot.kind, slot.name) == ("attribute", "colour")


def test_training_texts_are_drawn_when_asked_for() -> None:
    task = TwinNouns(num_train=10**12)
    train = task.contexts("train")
    assert len(train) == 10**12
    assert train[123_456_789] == train[123_456_789] != train[123_456_788]
    assert train[-1] == train[10**12 - 1]
    assert train[3:6] == [train[3], train[4], train[5]]
    with pytest.raises(IndexError):
        train[10**12]
    assert TwinNouns(num_train=5).contexts("train")[4] == train[4]
    assert TwinNouns(num_train=5, seed=1).contexts("train")[4].text != train[4].text
    assert len(TwinNouns().contexts("train")) == 64 * 1200
    few = TwinNouns(num_train=3).contexts("train")
    assert len(list(few)) == 3, "iterating ends"


def test_evaluation_sets() -> None:
    task = TwinNouns(**SMALL)
    sets = sets_of(task)
    assert list(sets) == ["pc", "cf", "neu"]
    assert {len(found) for found in sets.values()} == {60}
    usual = {context.uid: context for context in sets["pc"]}
    for context in sets["pc"]:
        assert all(slot.value == slot.prior for slot in context.slots)
    for context in sets["cf"]:
        assert all(slot.value != slot.prior for slot in context.slots)
        pairs = zip(triples(context), triples(usual[context.twin]), strict=True)
        assert all(one[:2] == other[:2] and one[2] != other[2] for one, other in pairs)
    wrong = Counter(slot.value for context in sets["cf"] for slot in context.slots)
    assert set(wrong) == set(task.colours)
    for context in sets["neu"]:
        assert all(slot.prior is None for slot in context.slots)
        assert {(a, b) for a, b, _ in triples(context)} <= set(task.held_out)
    assert task.contexts("val") == task.evaluations("val")[0].contexts
    assert [c.text for c in task.contexts("val")] != [c.text for c in task.contexts("test")]
    without = TwinNouns(**SMALL, num_held_out=0)
    assert [one.name for one in without.evaluations("val")] == ["pc", "cf"]
    assert len(without.typical) == 256


def test_relations_have_roles_to_flip() -> None:
    task = TwinNouns(**RELATED)
    sets = sets_of(task)
    assert list(sets) == ["pc", "cf", "neu", "sw"]
    assert set(task.names) < set(task.hidden_words())
    usual = {context.uid: context for context in sets["pc"]}
    for context in sets["sw"]:
        assert len(context.text.split()) == 12
        for slot, other in zip(context.slots, usual[context.twin].slots, strict=True):
            if slot.kind == "relation":
                assert slot.value.split() == other.value.split()[::-1]
                assert slot.prior == other.value == other.prior
            else:
                assert slot == other
    free = {t[1] for c in sets["neu"] for t in triples(c) if t[1] in task.verbs}
    trained = {t[1] for c in task.contexts("train")[:2000] for t in triples(c)} & set(task.verbs)
    assert free <= set(task.free_verbs) and trained == set(task.known_verbs)
    found = [s for c in task.contexts("train")[:2000] for s in c.slots if s.kind == "relation"]
    assert 0.88 < sum(s.value == s.prior for s in found) / len(found) < 0.92


def test_counterfactual_share() -> None:
    task = TwinNouns(**RELATED, p_cf=0.25, relation_rate=1.0)
    broken = [{s.value == s.prior for s in c.slots} for c in task.contexts("train")[:2000]]
    assert all(len(kinds) == 1 for kinds in broken)
    assert 0.22 < sum(kinds == {False} for kinds in broken) / len(broken) < 0.28


def test_reading() -> None:
    task = TwinNouns(**RELATED)
    for found in sets_of(task).values():
        for context in found:
            right = {slot.key: slot.value for slot in context.slots}
            assert task.read(context, context.text) == right
            moved = " ".join(" ".join(t) for t in reversed(triples(context)))
            assert task.read(context, moved) == right
            assert task.read(context, "") == dict.fromkeys(right)
    context = sets_of(task)["pc"][0]
    for slot in context.slots:
        other = dict(task.read(context, context.text))
        if slot.kind == "relation":
            flipped = " ".join(slot.value.split()[::-1])
            text = context.text.replace(slot.value, flipped)
            assert task.read(context, text) == other | {slot.key: flipped}
            agent, verb, patient = slot.value.split()
            text = context.text.replace(slot.value, f"{agent} {agent} {patient}")
            assert task.read(context, text)[slot.key] is None
        else:
            noun = slot.key.split("/")[0].replace("_", " ")
            colour = next(one for one in task.colours if one != slot.value)
            text = context.text.replace(f"{noun} {slot.value}", f"{noun} {colour}")
            assert task.read(context, text) == other | {slot.key: colour}
            assert task.read(context, f"{context.text} {noun} {colour}")[slot.key] is None


def test_a_lost_verb_is_looked_up_by_its_names() -> None:
    task = TwinNouns(**RELATED)
    context = sets_of(task)["pc"][0]
    slot = next(slot for slot in context.slots if slot.kind == "relation")
    agent, verb, patient = slot.value.split()
    spare = next(v for v in task.verbs if v not in context.text.split())
    assert (
        task.read(context, f"{patient} {spare} {agent}")[slot.key] == f"{patient} {spare} {agent}"
    )


def test_questions_are_in_the_vocabulary() -> None:
    task = TwinNouns(**RELATED)
    for found in sets_of(task).values():
        for context in found:
            for probe, slot in zip(context.probes, context.slots, strict=True):
                words = f"{probe.question} {probe.answer} {probe.prior or ''}".split()
                assert set(words) <= set(task.vocabulary())
                assert probe.key == slot.key and probe.answer in slot.value.split()


def test_pretraining_is_usual_and_neutral_is_not() -> None:
    task = TwinNouns()

    def facts(texts: list[str]) -> list[tuple[str, ...]]:
        return [t for text in texts for t in triples(Context("", text))]

    usual = facts(task.pretraining_texts(0, 0, 400))
    assert all(task.typical[a, b] == c for a, b, c in usual)
    neutral = facts(task.neutral_texts(0, 0, 800))
    assert {(a, b) for a, b, _ in neutral} > set(task.held_out)
    hits = [task.typical.get((a, b)) == c for a, b, c in neutral]
    assert 0.07 < sum(hits) / len(hits) < 0.17
    assert task.neutral_texts(0, 0, 2) != task.neutral_texts(0, 1, 2)
    assert task.neutral_texts(0, 0, 2) != task.neutral_texts(1, 0, 2)


def test_wrong_options_are_refused_together() -> None:
    with pytest.raises(ValueError) as caught:
        TwinNouns(num_colours=1, num_held_out=256, p_cf=2, relations=-1, num_train=0)
    message = str(caught.value)
    assert "data.task.num_colours=1 must be from 2 to 16" in message
    assert "data.task.num_held_out=256 must be from 2 to 254" in message
    assert "data.task.p_cf=2 must be in [0, 1]" in message
    assert "data.task.relations=-1 must be at least 0" in message
    assert "data.task.num_train=0 must be at least 1" in message
    with pytest.raises(ValueError, match="must be at least 4 pairs for data.task.facts=2"):
        TwinNouns(num_first=1, num_second=3, num_held_out=2)
