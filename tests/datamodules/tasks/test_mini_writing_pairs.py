"""Pairs of miniature texts: labels, skew, prompts of both kinds, outputs, margins, weak judge."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from datamodules.experience import Candidates, Completion, FinishReason
from datamodules.tasks.base import Pair
from datamodules.tasks.criteria import CRITERIA, JUDGEMENT, Criteria
from datamodules.tasks.mini_writing import MiniWriting
from datamodules.tasks.mini_writing_pairs import MiniWritingPairs
from datamodules.tasks.mini_writing_world import CRITERION_WORDS, VERDICTS, WritingWorld
from lightning_modules.backbones.tiny import word_tokenizer


def make(**options: Any) -> MiniWritingPairs:
    task = MiniWritingPairs(**options)
    task.bind(word_tokenizer(task.vocabulary()))
    return task


def write(
    task: MiniWritingPairs, text: str, reason: FinishReason = FinishReason.STOP
) -> Completion:
    ids = tuple(task.tokenizer.convert_tokens_to_ids(text.split()))
    return Completion(ids, (0.0,) * len(ids), reason)


def question_of(task: WritingWorld, kind: str, start: int) -> str:
    return f"genre{task._genres[kind][0]} w{start}"  # type: ignore[index]


COHERENCE = Criteria("coherence", ("coherence",))


def test_pairs_are_pure_labelled_and_balanced() -> None:
    task = make(num_train=1000, num_val=40, num_test=48)
    train = task.records("train")
    assert train[:300] == make(num_train=300).records("train")
    assert train != make(num_train=1000, seed=1).records("train")
    assert task.records("predict") == task.records("test")
    for pair in train:
        first, second = (task.judged(pair.question, text) for text in pair.responses)
        assert pair.label == (1 if first > second else 2)
        assert first != second and pair.extra["gap"] == abs(first - second)
        assert pair.extra["kind"] == task.read_question(pair.question).kind
        assert re.fullmatch(r"genre\d w\d", pair.question)
        for text in pair.responses:
            assert re.fullmatch(r"w\d( w\d){1,11}", text)
        assert task.pair_of(pair.question, pair.responses).label == pair.label
    assert 0.75 < sum(pair.label == 1 for pair in train) / 1000 < 0.85
    for split in ("val", "test"):
        counts = Counter((p.extra["kind"], p.label) for p in task.records(split))
        assert len(counts) == 4 and len(set(counts.values())) == 1
    assert Counter(pair.extra["kind"] for pair in train) == {"long": 500, "short": 500}
    uids = {pair.uid for split in ("train", "val", "test") for pair in task.records(split)}
    assert len(uids) == 1088


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_the_planted_skew(rate: float) -> None:
    task = make(first_better_rate=rate, num_train=400)
    share = sum(pair.label == 1 for pair in task.records("train")) / 400
    assert abs(share - rate) < 0.08 * (rate == 0.5) + 1e-9
    # the text that is better does not depend on its slot
    other = make(first_better_rate=1 - rate, num_train=400).records("train")
    for one, two in zip(task.records("train"), other, strict=True):
        assert set(one.responses) == set(two.responses)
        better = {pair.responses[(pair.label or 0) - 1] for pair in (one, two)}
        assert len(better) == 1


def test_a_judge_that_is_blind_for_length_has_other_labels() -> None:
    question = question_of(make(), "long", 5)
    responses = ("w5 w6 w7", "w5 w6 w7 w0 w0")
    assert make().pair_of(question, responses).label == 2
    assert make(length_blind=True).pair_of(question, responses).label == 1
    assert make().pair_of(question, ("w5 w6", "w5 w6 w0")).label is None


def test_judgement_prompts_set_words_side_by_side() -> None:
    task = make()
    question = question_of(task, "long", 7)
    pair = task.pair_of(question, ("w7 w0 w0", "w1"))
    prompt = task.judgement_prompt(pair, COHERENCE)
    assert task.render(prompt.token_ids) == (
        f"{question} coherence #0 A.w7.on.new B.w1.off.new #1 A.w0.on.new B.over "
        "#2 A.w0.off.again B.over which_text?"
    )
    assert (prompt.domain, prompt.label, prompt.record) == (JUDGEMENT, 1, pair)
    bare = task.judgement_prompt(pair, None)
    assert bare.token_ids == (*prompt.token_ids[:2], *prompt.token_ids[3:])
    assert task.judgement_prompt(pair, Criteria(error="nothing")).token_ids == bare.token_ids
    assert task.preference_prompt(pair).token_ids == bare.token_ids
    both = task.judgement_prompt(pair, task.static_criteria)
    assert task.render(both.token_ids[2:4]) == "coherence sparkle"
    swapped = task.judgement_prompt(pair.swap(), COHERENCE)
    assert "#0 A.w1.off.new B.w7.on.new #1 A.over" in task.render(swapped.token_ids)
    assert swapped.label == 2
    assert len({p.uid for p in (prompt, bare, both, swapped)}) == 4
    with pytest.raises(ValueError, match=r"criteria 'w1' are not of .* coherence, sparkle"):
        task.judgement_prompt(pair, Criteria("w1", ("w1",)))


def test_swapped_prompts_are_mirror_images() -> None:
    task = make(num_test=50)
    mirror = {"A": "B", "B": "A"}
    for pair in task.records("test"):
        one, two = (
            task.render(task.judgement_prompt(p, COHERENCE).token_ids).split()
            for p in (pair, pair.swap())
        )
        flipped = [re.sub(r"^[AB](?=\.)", lambda m: mirror[m.group()], word) for word in two]
        assert one[:3] == two[:3] and one != two
        for step in range(3, len(one) - 1, 3):
            assert one[step : step + 3] == [flipped[step], flipped[step + 2], flipped[step + 1]]


def test_a_judge_reads_what_a_policy_writes() -> None:
    task, policy = make(), MiniWriting()
    policy.bind(task.tokenizer)
    question = question_of(task, "long", 5)
    pair = task.pair_of(question, ("<plan> w1 w2 </plan> w5 genre0 w7 <pad>", ""))
    words = task.render(task.judgement_prompt(pair, None).token_ids).split()
    assert [word for word in words if word.startswith("A.")] == [
        *["A.plan"] * 4, "A.w5.on.new", "A.other", "A.w7.on.new", "A.other"
    ]  # fmt: skip
    assert words.count("B.over") == 8
    longest = " ".join(["w1"] * 40)
    prompt = task.judgement_prompt(task.pair_of(question, (longest, "w5")), task.static_criteria)
    assert len(prompt.token_ids) == task.max_prompt_tokens
    for shown in policy.demonstrations(0, 0, 100):
        query = policy.read_question(" ".join(policy.render(shown.prompt_ids).split()[:2]))
        completion = Completion(
            shown.completion_ids, (0.0,) * len(shown.completion_ids), FinishReason.STOP
        )
        text = policy.conversation(policy.prompt(query), completion)[1]
        whole = policy.render(shown.completion_ids)
        pair = task.pair_of(query.text, (text, whole))
        assert pair.label is None, "a plan is worth nothing"
        assert len(task.judgement_prompt(pair, None).token_ids) <= (task.max_prompt_tokens or 0)


def test_texts_and_queries_from_elsewhere_are_refused() -> None:
    task = make()
    with pytest.raises(ValueError, match=r"response 2 .* has 1 words .* such as 'hello'"):
        task.pair_of("genre0 w5", ("w5", "w6 hello"))
    for question in ("genre0", "genre4 w1", "genre0 w8", "w1 genre0", "genre0 w1 w2", ""):
        with pytest.raises(ValueError, match="is no query of task 'mini_writing_pairs'"):
            task.pair_of(question, ("w5", "w6"))
        with pytest.raises(ValueError, match="is no query of task 'mini_writing_pairs'"):
            task.criteria_prompt(question)
    with pytest.raises(ValueError, match="such as 'hello'"):
        task.judgement_prompt(Pair("u", "genre0 w5", ("hello", "w1")), None)


def test_criteria_know_the_query_alone() -> None:
    task = make(num_train=200)
    prompts: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for pair in task.records("train"):
        for one in (pair, pair.swap(), replace(pair, responses=("w1", "w2"), uid="other")):
            prompt = task.criteria_prompt(one.question)
            prompts.setdefault(one.question, set()).add((prompt.uid, prompt.token_ids))
            assert (prompt.domain, prompt.label, prompt.record) == (CRITERIA, None, pair.question)
            assert task.render(prompt.token_ids) == f"{pair.question} which_criterion?"
    assert len(prompts) > 25
    assert all(len(found) == 1 for found in prompts.values())
    assert len({found.pop() for found in prompts.values()}) == len(prompts)


def test_the_type_is_in_no_token_of_a_judge() -> None:
    task = make()
    seeds = range(1, 100)
    kinds = task._genres
    worlds = (make(world_seed=seed) for seed in seeds)
    swapped = next(w for w in worlds if w._genres["long"] == kinds["short"])
    for genre in range(4):
        pairs = [t.pair_of(f"genre{genre} w3", ("w3 w4 w5 w6 w7", "w1")) for t in (task, swapped)]
        assert {pair.extra["kind"] for pair in pairs} == {"long", "short"}
        one, two = (
            t.judgement_prompt(pair, None) for t, pair in zip((task, swapped), pairs, strict=True)
        )
        assert (one.uid, one.token_ids) == (two.uid, two.token_ids)
        criteria = [t.criteria_prompt(f"genre{genre} w3") for t in (task, swapped)]
        assert criteria[0].token_ids == criteria[1].token_ids


def test_outputs_are_read_strictly() -> None:
    task = make()
    pair = task.pair_of("genre0 w5", ("w5", "w6 w7"))
    judged, asked = task.judgement_prompt(pair, None), task.criteria_prompt("genre0 w5")
    for slot, word in enumerate(VERDICTS, start=1):
        for text in (word, f"{word} <eos>"):
            verdict = task.parse(judged, write(task, text))
            assert (verdict.winner, verdict.analysis, verdict.error) == (slot, "", None)
    for word in CRITERION_WORDS:
        assert task.parse_criteria(asked, write(task, f"{word} <eos>")) == Criteria(word, (word,))
    for text in ("", "<eos>", "A_wins B_wins <eos>", "<eos> A_wins", "w1 <eos>", "coherence <eos>"):
        assert task.parse(judged, write(task, text)).winner is None
        assert task.parse(judged, write(task, text)).error
    for text in ("", "coherence sparkle <eos>", "A_wins <eos>"):
        assert task.parse_criteria(asked, write(task, text)).error
    cut = FinishReason.LENGTH
    assert task.parse(judged, write(task, "A_wins", cut)).error == "unfinished: length"
    assert task.parse_criteria(asked, write(task, "sparkle", cut)).text == ""
    assert task.parse(asked, write(task, "A_wins <eos>")).winner is None
    label = pair.label or 0
    right, wrong = (write(task, f"{VERDICTS[slot - 1]} <eos>") for slot in (label, 3 - label))
    assert task.verify(judged, right) == {"reward": 1.0, "valid": 1.0}
    assert task.verify(judged, wrong) == {"reward": 0.0, "valid": 1.0}


def test_no_output_makes_the_parsers_raise() -> None:
    task, rng = make(), Random(0)
    judged = task.judgement_prompt(task.pair_of("genre0 w5", ("w5", "w6")), None)
    asked = task.criteria_prompt("genre0 w5")
    words = [*VERDICTS, *CRITERION_WORDS, "<eos>"]
    known = [*task.tokenizer.convert_tokens_to_ids(words), 0, 1, 9, -1, 10**9]
    winners, names = Counter[int | None](), Counter[str]()
    for _ in range(500):
        ids = tuple(rng.choices(known, k=rng.randrange(4)))
        completion = Completion(ids, (0.0,) * len(ids), rng.choice(list(FinishReason)))
        verdict, criteria = task.parse(judged, completion), task.parse_criteria(asked, completion)
        assert (verdict.winner is None) == (verdict.error is not None)
        assert (criteria.text == "") == (criteria.error is not None) == (criteria.names == ())
        winners[verdict.winner] += 1
        names[criteria.text] += 1
    assert set(winners) == {None, 1, 2}
    assert set(names) == {"", *CRITERION_WORDS}


def test_margins_come_from_the_candidates() -> None:
    task = make()
    prompt = task.judgement_prompt(task.pair_of("genre0 w5", ("w5", "w6")), None)
    a, b, other, more = task.tokenizer.convert_tokens_to_ids([*VERDICTS, "w1", "w2"])

    def margin(ids: list[int], text: str = "A_wins <eos>") -> float | None:
        table = torch.tensor([ids, [9] * len(ids)])
        logprobs = torch.tensor([[-0.5, -1.0, -3.0][: len(ids)], [0.0] * len(ids)])
        completion = replace(write(task, text), candidates=Candidates(table, logprobs))
        return task.verdict_margin(prompt, completion)

    assert margin([a, b, other]) == 0.5
    assert margin([b, other, a]) == -2.5
    assert margin([a, other, more]) == 2.5, "slot 2 counts as the least"
    assert margin([other, b, more]) == -2.0
    assert margin([other, more]) == 0.0
    assert margin([a, b, other], "B_wins <eos>") == 0.5, "whatever was drawn"
    assert margin([a, b, other], "w1 <eos>") is None
    assert task.verdict_margin(prompt, write(task, "A_wins <eos>")) is None
    nothing = Candidates(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3))
    assert task.verdict_margin(prompt, replace(write(task, "A_wins"), candidates=nothing)) is None


def demonstrated(task: MiniWritingPairs, count: int) -> dict[str, list[tuple[list[str], str]]]:
    found: dict[str, list[tuple[list[str], str]]] = {CRITERIA: [], JUDGEMENT: []}
    for one in task.demonstrations(0, 0, count):
        said = task.render(one.completion_ids).split()
        assert said[1:] == ["<eos>"]
        found[one.domain].append((task.render(one.prompt_ids).split(), said[0]))
    return found


def label_of(task: MiniWritingPairs, words: list[str]) -> int | None:
    texts = [
        " ".join(m[1] for w in words if (m := re.match(rf"{slot}\.(w\d)", w))) for slot in "AB"
    ]
    return task.pair_of(" ".join(words[:2]), (texts[0], texts[1])).label


def test_demonstrations_come_from_a_weak_judge() -> None:
    task = make()
    assert task.demonstrations(0, 3, 20) == task.demonstrations(0, 3, 20)
    assert task.demonstrations(0, 3, 20) != task.demonstrations(0, 4, 20)
    shown = demonstrated(task, 2000)
    assert 0.21 < len(shown[CRITERIA]) / 2000 < 0.29
    by_genre = Counter((words[0], said) for words, said in shown[CRITERIA])
    assert len(by_genre) == 8
    for genre in range(4):
        first, second = (by_genre[f"genre{genre}", word] for word in CRITERION_WORDS)
        assert 0.33 < first / (first + second) < 0.67, "no criterion suits a genre better"
    right = slots = 0
    for words, said in shown[JUDGEMENT]:
        right += label_of(task, words) == VERDICTS.index(said) + 1
        slots += said == VERDICTS[0]
    total = len(shown[JUDGEMENT])
    assert 0.66 < right / total < 0.74
    assert 0.46 < slots / total < 0.54
    headers = Counter(" ".join(words[2 : words.index("#0")]) for words, _ in shown[JUDGEMENT])
    assert set(headers) == {"", *CRITERION_WORDS, " ".join(CRITERION_WORDS)}
    assert min(headers.values()) > 0.2 * total


def test_demonstrations_with_a_slot_bias() -> None:
    task = make(demo_slot_bias=0.6, demo_accuracy=1.0, criteria_share=0.0)
    shown = demonstrated(task, 600)
    assert not shown[CRITERIA]
    firsts = sum(said == VERDICTS[0] for _, said in shown[JUDGEMENT]) / 600
    assert 0.74 < firsts < 0.86  # 0.6 and half of the rest
    assert all(
        label_of(task, words) == 2 for words, said in shown[JUDGEMENT] if said == VERDICTS[1]
    )


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"first_better_rate": 1.1}, "data.task.first_better_rate=1.1 must be a probability"),
        ({"demo_accuracy": -1, "num_test": -2}, r"data.task.num_test=-2.*demo_accuracy=-1"),
        ({"demo_slot_bias": 2}, "data.task.demo_slot_bias=2"),
        ({"criteria_share": 2, "max_noise": 7}, r"data.task.max_noise=7.*criteria_share=2"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        MiniWritingPairs(**options)


def test_a_world_of_ties_is_refused() -> None:
    task = make(long_words=1, short_words=1, max_words=1, max_noise=0.0, confusion=0.0)
    with pytest.raises(ValueError, match=r"no pair of unequal texts .* data.task.max_words"):
        task.records("test")


def test_a_hidden_genre_leaves_the_criterion_to_tell() -> None:
    task, blind = MiniWritingPairs(), MiniWritingPairs(show_genre=False)
    for one in (task, blind):
        one.bind(word_tokenizer(one.vocabulary()))
    pair = task.records("test")[0]
    criteria = Criteria("sparkle", ("sparkle",))
    shown, hidden = (one.judgement_prompt(pair, criteria).token_ids for one in (task, blind))
    assert shown[1:] == hidden
    assert blind.criteria_prompt(pair.question) == task.criteria_prompt(pair.question)
