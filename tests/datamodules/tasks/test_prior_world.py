"""PriorWorld: habits, evaluation sets and their twins, the parser, questions, refused options."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from random import Random
from typing import Any

import pytest

from datamodules.tasks.compression import Context, ContextSet, Slot
from datamodules.tasks.prior_world import SETS, PriorWorld
from datamodules.tasks.prior_world_grammar import (
    COLOURS,
    MATERIALS,
    NAMES,
    NEGATED,
    NONCE,
    NOUN_FIRST,
    NOUNS,
    NUMBERS,
    PLACES,
    RELATION,
    VERBS,
    fact_templates,
    fill,
    grammar_words,
)
from datamodules.word_tokenizer import word_tokenizer

SMALL: dict[str, Any] = {"num_val": 40, "num_test": 40, "num_train": 1500}


def sets_of(task: PriorWorld) -> dict[str, ContextSet]:
    return {one.name: one for one in task.evaluations("test")}


def values(context: Context) -> dict[str, str]:
    return {slot.key: slot.value for slot in context.slots}


def everything(task: PriorWorld) -> list[Context]:
    sets = [context for one in task.evaluations("test") for context in one.contexts]
    return [*sets, *task.contexts("train")[:300]]


def test_texts_are_what_the_card_says() -> None:
    task = PriorWorld(**SMALL)
    lengths = [len(context.text.split()) for context in task.contexts("train")]
    assert 25 < sum(lengths) / len(lengths) < 42
    vocabulary = task.vocabulary()
    assert len(set(vocabulary)) == len(vocabulary) < 150
    for context in everything(task):
        assert context.text.count(" .") == 6
        kinds = Counter(slot.kind for slot in context.slots)
        assert kinds["relation"] == kinds["negation"] == 2
        assert 4 <= kinds["attribute"] <= 8
        assert set(context.text.split()) <= set(vocabulary)
        for probe in context.probes:
            assert set(f"{probe.question} {probe.answer}".split()) <= set(vocabulary)


def test_no_word_has_two_roles() -> None:
    groups = [COLOURS, MATERIALS, PLACES, NUMBERS, NOUNS, NONCE, NAMES]
    groups += [tuple(form for verb in VERBS for form in verb), tuple(grammar_words())]
    for first, second in combinations(groups, 2):
        assert not set(first) & set(second)
    assert all(len(set(group)) == len(group) for group in groups)


@pytest.mark.parametrize("noun_first", [True, False])
def test_every_kind_of_sentence_has_four_templates(noun_first: bool) -> None:
    for attributes in NOUN_FIRST:
        templates = fact_templates(attributes, noun_first)
        assert len(set(templates)) == len(templates) >= 4
        for template in templates:
            blanks = {"noun": "N", **dict.fromkeys(attributes, "V")}
            words, _ = fill(template, blanks)
            assert words.count("V") == len(attributes) and words.count("N") == 1
            if noun_first:
                assert words.index("N") < words.index("V")
    assert len(RELATION) == len(NEGATED) == 4


def test_spans_carry_the_values() -> None:
    task = PriorWorld(**SMALL, num_numbers=4)
    for context in everything(task):
        for slot in context.slots:
            words = [context.text[start:end] for start, end in slot.spans]
            if slot.kind in ("attribute", "number"):
                assert words == [slot.value]
            elif slot.kind == "relation":
                agent, verb, patient = slot.value.split()
                assert len(words) == 3 and {agent, patient} < set(words)
                assert any(word in (verb, dict(VERBS)[verb]) for word in words)
            else:
                assert words == (["not"] if slot.value == "yes" else [])


def test_training_keeps_the_rates() -> None:
    task = PriorWorld(**SMALL, prior_rate=0.8, relation_rate=0.7, negation_rate=0.2)
    slots = [slot for context in task.contexts("train") for slot in context.slots]

    def check(found: list[bool], share: float) -> None:
        sigma = math.sqrt(share * (1 - share) / len(found))
        assert abs(sum(found) / len(found) - share) < 4 * sigma

    check([s.value == s.prior for s in slots if s.kind == "attribute" and s.prior], 0.8)
    check([s.value == s.prior for s in slots if s.kind == "relation" and s.prior], 0.7)
    check([s.value == "yes" for s in slots if s.kind == "negation"], 0.2)
    check([s.prior is None for s in slots if s.kind == "relation"], 0.1)


def test_counterfactual_share_of_training() -> None:
    task = PriorWorld(**SMALL, p_cf=0.3, prior_rate=1.0, relation_rate=1.0, free_rate=0.0)
    broken = [
        {slot.value == slot.prior for slot in context.slots if slot.kind != "negation"}
        for context in task.contexts("train")
    ]
    assert all(len(kinds) == 1 for kinds in broken), "a text breaks all habits or none"
    assert 0.25 < sum(kinds == {False} for kinds in broken) / len(broken) < 0.35


def test_evaluation_sets_break_one_habit_each() -> None:
    task = PriorWorld(**SMALL)
    sets = sets_of(task)
    assert list(sets) == list(SETS) == ["pc", "cf", "sw", "neu", "neg"]
    assert {len(one.contexts) for one in sets.values()} == {40}
    broken = {"cf": "attribute", "sw": "relation", "neg": "negation"}
    for name, one in sets.items():
        for context in one.contexts:
            for slot in context.slots:
                if name == "neu":
                    assert slot.kind == "negation" or slot.prior is None
                else:
                    assert (slot.value != slot.prior) == (slot.kind == broken.get(name))


def test_twins_differ_in_what_the_set_is_about() -> None:
    task = PriorWorld(**SMALL)
    sets = sets_of(task)
    usual = {context.uid: context for context in sets["pc"].contexts}
    assert not any(c.twin for name in ("pc", "neu") for c in sets[name].contexts)
    for name, kind in (("cf", "attribute"), ("sw", "relation"), ("neg", "negation")):
        for context in sets[name].contexts:
            twin = usual[context.twin]
            assert [slot.key for slot in context.slots] == [slot.key for slot in twin.slots]
            for slot, other in zip(context.slots, twin.slots, strict=True):
                assert (slot.value == other.value) == (slot.kind != kind)
            if name != "neg":
                pairs = zip(context.text.split(), twin.text.split(), strict=True)
                changed = sum(one != other for one, other in pairs)
                count = sum(slot.kind == kind for slot in context.slots)
                assert changed == (count if name == "cf" else 2 * count)
    mirrored = values(sets["sw"].contexts[0])
    for key, value in values(usual[sets["sw"].contexts[0].twin]).items():
        if key.endswith("/relation"):
            assert mirrored[key].split() == value.split()[::-1]


def test_the_parser_reads_every_sentence_in_any_order() -> None:
    for task in (PriorWorld(**SMALL), PriorWorld(**SMALL, noun_first=False, num_numbers=8)):
        rng = Random("order")
        for context in everything(task):
            sentences = context.text.split(" . ")
            rng.shuffle(sentences)
            text = " . ".join(sentences)
            assert task.read(context, context.text) == values(context)
            assert task.read(context, text) == values(context)
            assert task.read(context, text.replace(" .", ".")) == values(context)


def test_paraphrases_keep_roles_and_flips_change_them() -> None:
    task = PriorWorld(**SMALL)
    slot = Slot("help/relation", "relation", "alice help bob", None)
    context = Context("x", "alice helped bob .", (slot, Slot("help/negation", "negation", "no")))
    told = {"help/relation": "alice help bob", "help/negation": "no"}
    assert task.read(context, "bob was helped by alice .") == told
    assert task.read(context, "it was bob whom alice helped") == told
    flipped = {"help/relation": "bob help alice", "help/negation": "no"}
    assert task.read(context, "bob helped alice .") == flipped
    denied = told | {"help/negation": "yes"}
    assert task.read(context, "it was alice who did not help bob .") == denied
    assert task.read(context, "bob was not helped by alice .") == denied
    other = {"help/relation": "alice push bob", "help/negation": "no"}
    assert task.read(context, "alice pushed bob .")["help/relation"] == other["help/relation"]


@pytest.mark.parametrize(
    "text",
    [
        "", ". . .", "alice", "alice helped", "helped alice bob", "alice helped alice .",
        "alice helped bob . bob helped alice .", "the lamp is red . the lamp is blue .",
        "the lamp is red blue .", "the lamp and the chair is red .", "<unk> \x00 \U0001f600 {noun}",
    ],
)  # fmt: skip
def test_whatever_is_decoded_is_read(text: str) -> None:
    task = PriorWorld(**SMALL)
    slots = (
        Slot("lamp/colour", "attribute", "red", "blue"),
        Slot("help/relation", "relation", "alice help bob"),
        Slot("help/negation", "negation", "no"),
    )
    found = task.read(Context("x", "", slots), text)
    assert found == dict.fromkeys(("lamp/colour", "help/relation", "help/negation"))


def test_questions_ask_for_slots() -> None:
    task = PriorWorld(**SMALL)
    for name, one in sets_of(task).items():
        for context in one.contexts:
            slots = {slot.key: slot for slot in context.slots}
            assert [probe.key for probe in context.probes] == [slot.key for slot in context.slots]
            for probe in context.probes:
                slot = slots[probe.key]
                if slot.kind == "attribute":
                    assert (probe.answer, probe.prior) == (slot.value, slot.prior)
                    assert probe.kind == "overwriting"
                elif slot.kind == "relation":
                    assert probe.answer == slot.value.split()[0] and probe.kind == "drift"
                    if name == "sw":
                        assert probe.prior == slot.value.split()[2]
                else:
                    assert probe.answer == {"no": "yes", "yes": "no"}[slot.value]


def test_texts_are_functions_of_the_seed_and_splits_are_apart() -> None:
    task, same, other = (PriorWorld(**SMALL, seed=seed) for seed in (0, 0, 1))
    texts = {
        name: [context.text for context in one.contexts] for name, one in sets_of(task).items()
    }
    assert texts == {n: [c.text for c in one.contexts] for n, one in sets_of(same).items()}
    train = [context.text for context in task.contexts("train")]
    assert train == [context.text for context in same.contexts("train")]
    assert train[:50] != [context.text for context in other.contexts("train")[:50]]
    assert task.writer.typical != other.writer.typical
    fewer = PriorWorld(**(SMALL | {"num_train": 10, "num_test": 5}))
    assert [c.text for c in fewer.contexts("train")] == train[:10]
    assert [c.text for c in fewer.evaluations("test")[1].contexts] == texts["cf"][:5]
    val = {c.text for one in task.evaluations("val") for c in one.contexts}
    test = {text for found in texts.values() for text in found}
    assert not set(train) & test and not set(train) & val and not val & test
    uids = [c.uid for part in ("val", "test") for s in task.evaluations(part) for c in s.contexts]  # type: ignore[arg-type]
    assert len(set(uids)) == len(uids) == 400


def test_pretraining_and_neutral_texts() -> None:
    task = PriorWorld(**SMALL, prior_rate=1.0)
    assert task.pretraining_texts(3, 4, 5) == task.pretraining_texts(3, 4, 5)
    assert task.pretraining_texts(3, 4, 5) != task.pretraining_texts(3, 5, 5)
    assert task.pretraining_texts(3, 4, 2) == task.pretraining_texts(3, 4, 5)[:2]

    def usual_share(texts: list[str]) -> float:
        found = [task.reader.facts(text) for text in texts]
        hits = [
            value == task.writer.typical[noun, name]
            for facts in found
            for (noun, name), value in ((tuple(key.split("/")), v) for key, v in facts.items())
            if noun in task.nouns
        ]
        return sum(hits) / len(hits)

    assert usual_share(task.pretraining_texts(0, 0, 200)) == 1
    assert 0.08 < usual_share(task.neutral_texts(0, 0, 300)) < 0.2


def test_demonstrations_verify_and_vocabulary() -> None:
    task = PriorWorld(**SMALL)
    tokenizer = word_tokenizer(task.vocabulary())
    task.bind(tokenizer)
    row = task.demonstrations(0, 0, 3)[0]
    assert row.prompt_ids == (tokenizer.eos_token_id,)
    assert row.completion_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in row.completion_ids
    assert set(task.hidden_words()) < set(task.vocabulary())


def test_smaller_worlds() -> None:
    task = PriorWorld(**SMALL, num_materials=0, num_places=0, relations=0)
    assert [one.name for one in task.evaluations("val")] == ["pc", "cf", "neu"]
    assert {s.name for c in task.contexts("train")[:50] for s in c.slots} == {"colour"}
    assert PriorWorld(num_val=0).evaluations("val") == []
    assert task.evaluations("predict") is task.evaluations("test")
    plain = PriorWorld(**SMALL, paraphrase_rate=0, noun_first=False)
    canonical = [fact_templates(frame, False)[0].split()[0] for frame in NOUN_FIRST]
    starts = {text.split()[0] for c in plain.contexts("train")[:50] for text in c.text.split(" . ")}
    assert starts <= {*canonical, *NAMES}


def test_wrong_options_are_refused_together() -> None:
    with pytest.raises(ValueError) as caught:
        PriorWorld(num_nouns=3, prior_rate=1.5, num_verbs=99, num_places=1, p_cf=-1, num_val=-1)
    message = str(caught.value)
    assert "data.task.num_nouns=3 must be from 4 to 40" in message
    assert "data.task.num_verbs=99 must be from 2 to 10" in message
    assert "data.task.prior_rate=1.5 must be in [0, 1]" in message
    assert "data.task.p_cf=-1 must be in [0, 1]" in message
    assert "data.task.num_val=-1 must be at least 0" in message
    assert "data.task.num_places=1 must be 0 (none) or at least 2" in message
    assert message.count("; ") == 5


def test_a_slot_that_occurs_twice_is_refused() -> None:
    slot = Slot("lamp/colour", "attribute", "red")
    with pytest.raises(ValueError, match="a.txt:3: the slot 'lamp/colour' occurs twice"):
        Context("x", "the lamp is red .", (slot, slot), where="a.txt:3")
