"""The prefix-audit task: truth, labels, lengths and demonstrations."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import pytest

from datamodules.experience import Completion, FinishReason
from datamodules.tasks.base import Pair, Verdict
from datamodules.tasks.prefix_audit import PrefixAudit
from datamodules.tasks.prefix_audit_judges import (
    TICK,
    CaseShape,
    JudgeNoise,
    broad_values,
    draw_case,
    num_wrong,
    right_value,
)
from tests.datamodules.tasks.prefix_audit_helpers import (
    EOS,
    SPECIAL,
    make_task,
    make_tokenizer,
    written,
)


@pytest.fixture(scope="module")
def task() -> PrefixAudit:
    return make_task()


@pytest.fixture(scope="module")
def pairs(task: PrefixAudit) -> list[Pair]:
    return list(task.records("train"))


def judged(task: PrefixAudit, pair: Pair, text: str) -> Verdict:
    return task.parse(task.preference_prompt(pair), written(task, text))


def is_exact(task: PrefixAudit, pair: Pair, analysis: str) -> bool:
    verdict = judged(task, pair, f"{analysis} response1_wins")
    return task.analysis_metrics(pair, verdict).get("exact", 0.0) == 1.0


def errors_of(task: PrefixAudit, pair: Pair) -> list[int]:
    return list(num_wrong(task.case(pair), task.shape.base))


def transform(pair: Pair, digits: list[int], claims: list[list[int]]) -> Pair:
    texts = [" ".join(map(str, row)) for row in (digits, *claims)]
    return replace(pair, question=texts[0], responses=(texts[1], texts[2]))


# Words and lengths.


def test_vocabulary_is_unique_and_of_the_size_of_the_card(task: PrefixAudit) -> None:
    words = task.vocabulary()
    assert len(words) == len(set(words)) == 80
    assert not set(words) & set(SPECIAL)
    assert all(word.isascii() and not any(c.isspace() for c in word) for word in words)
    text = " ".join(words)
    assert task.tokenizer.encode(text) == task.tokenizer.convert_tokens_to_ids(words)


@pytest.mark.parametrize(("base", "length"), [(3, 4), (2, 6), (10, 1), (5, 16)])
def test_lengths(base: int, length: int) -> None:
    task = make_task(base=base, length=length, num_train=20)
    for pair in task.records("train"):
        prompt = task.preference_prompt(pair)
        assert len(prompt.token_ids) == 4 * length + 1
        assert prompt.max_new_tokens == 5 * length + 5
        gold = task.gold_analysis(pair)
        assert len(gold.split()) == 5 * length + 3
        completion = written(task, f"{gold} response{pair.label}_wins")
        assert len(completion.token_ids) == prompt.max_new_tokens
        assert task.verify(prompt, completion) == {"reward": 1.0, "valid": 1.0}
        reflection = task.reflection_prompt(pair, (gold, gold))
        assert len(reflection.token_ids) == 4 * length + 9 * length + 6
        assert reflection.max_new_tokens == 4
    for demonstration in task.demonstrations(0, 0, 20):
        assert 1 not in demonstration.prompt_ids + demonstration.completion_ids  # <unk>


def test_default_lengths_are_those_of_the_card(task: PrefixAudit, pairs: list[Pair]) -> None:
    gold = task.gold_analysis(pairs[0])
    assert len(task.preference_prompt(pairs[0]).token_ids) == 17
    assert len(written(task, f"{gold} response1_wins").token_ids) == 25
    for shown in task.demonstrations(0, 0, 64):
        expected = {"pref": (17, 25), "refl": (58, 4)}[shown.domain]
        assert (len(shown.prompt_ids), len(shown.completion_ids)) == expected
        assert shown.completion_ids[-1] == EOS


def test_a_hand_made_pair(task: PrefixAudit) -> None:
    pair = Pair("hand", "2 0 1 1", ("2 0 0 1", "2 2 1 0"), label=1)
    assert task.gold_analysis(pair) == (
        "#0 a.x2 a.g2 a.m1:ok a.m2:ok #1 a.x0 a.g2 a.m1:no a.m2:ok "
        "#2 a.x1 a.g0 a.m1:ok a.m2:no #3 a.x1 a.g1 a.m1:ok a.m2:no #4 a.n1=1 a.n2=2"
    )
    prompt = task.preference_prompt(pair)
    assert task.render(prompt.token_ids) == (
        "#0 x2 r1=2 r2=2 #1 x0 r1=0 r2=2 #2 x1 r1=0 r2=1 #3 x1 r1=1 r2=0 which_response?"
    )
    gold = task.gold_analysis(pair)
    slipped = gold.replace("a.g0", "a.g1")
    reflection = task.render(task.reflection_prompt(pair, (gold, slipped)).token_ids)
    assert "#2 c1.x1 c2.x1 c1.g0 c2.g1 c1.m1:ok c2.m1:ok" in reflection
    assert reflection.endswith("#4 c1.n1=1 c2.n1=1 c1.n2=2 c2.n2=2 which_critique?")


def test_bind_refuses_a_tokenizer_without_the_words() -> None:
    task = PrefixAudit()
    with pytest.raises(ValueError, match="task 'prefix_audit'.*1 of its words are unknown"):
        task.bind(make_tokenizer(task.vocabulary()[:-1]))
    with pytest.raises(RuntimeError, match="bind"):
        task.preference_prompt(task.records("train")[0])


# Pairs.


def test_labels_and_gaps(task: PrefixAudit) -> None:
    pairs = make_task(num_train=2000).records("train")
    gaps = set()
    for pair in pairs:
        first, second = errors_of(task, pair)
        assert pair.label == (1 if first < second else 2)
        assert min(first, second) <= 3 and max(first, second) <= 4
        gaps.add(abs(first - second))
        assert pair.extra["gap"] == abs(first - second)
    assert gaps == {1, 2}
    slot_1 = sum(pair.label == 1 for pair in pairs)
    assert abs(slot_1 - 1000) < 4 * math.sqrt(2000 / 4)


def test_pairs_are_a_pure_function_of_seed_split_and_index(task: PrefixAudit) -> None:
    again = make_task(num_train=5)
    assert list(task.records("train"))[:5] == list(again.records("train"))
    splits = {split: task.records(split) for split in ("train", "val", "test")}
    assert [len(records) for records in splits.values()] == [320, 50, 200]
    uids = [pair.uid for records in splits.values() for pair in records]
    assert len(set(uids)) == len(uids)

    def contents(some: PrefixAudit, split: str) -> list[tuple[str, tuple[str, str]]]:
        return [(pair.question, pair.responses) for pair in list(some.records(split))[:50]]

    assert contents(task, "train") != contents(task, "test") != contents(task, "val")
    other = make_task(seed=1)
    assert contents(task, "train") != contents(other, "train")
    assert not set(uids) & {pair.uid for pair in other.records("train")}
    assert task.records("predict") == task.records("test")
    with pytest.raises(ValueError, match="split 'dev' is none of train, val, test, predict"):
        task.records("dev")


def test_uids_tell_orders_and_analyses_apart(task: PrefixAudit, pairs: list[Pair]) -> None:
    pair, gold = pairs[0], task.gold_analysis(pairs[0])
    other = gold.replace("a.m1:ok", "a.m1:no") if "a.m1:ok" in gold else gold[:-1] + "0"
    prompts = [task.prompt(pair), task.prompt(pair.swap())]
    prompts += [
        task.reflection_prompt(shown, analyses)
        for shown in (pair, pair.swap())
        for analyses in ((gold, other), (other, gold))
    ]
    assert len({prompt.uid for prompt in prompts}) == 6
    assert prompts[0].uid == pair.uid + "/12" and prompts[1].uid == pair.uid + "/21"
    assert [prompt.domain for prompt in prompts] == ["pref"] * 2 + ["refl"] * 4
    assert prompts[0].record == pair and prompts[2].record == (pair, (gold, other))
    assert task.reflection_prompt(pair, (gold, other), label=2, uid="mine").uid == "mine"
    assert task.reflection_prompt(pair, (gold, other), label=2).label == 2


def test_foreign_pairs_and_analyses_are_refused(task: PrefixAudit, pairs: list[Pair]) -> None:
    for question in ("2 0 1", "a b c d", "2 0 1 3", ""):
        with pytest.raises(ValueError, match="4 digits of 0 to 2"):
            task.preference_prompt(replace(pairs[0], question=question))
    with pytest.raises(ValueError, match="analysis 2 .* does not parse"):
        task.reflection_prompt(pairs[0], (task.gold_analysis(pairs[0]), ""))


# Truth.


@pytest.mark.parametrize("options", [{}, {"base": 2, "length": 6}])
def test_checker_accepts_gold_and_rejects_every_corrupted_word(options: dict[str, int]) -> None:
    task = make_task(num_train=10, **options)
    for pair in task.records("train"):
        gold = task.gold_analysis(pair)
        assert is_exact(task, pair, gold)
        words = gold.split()
        for index, word in enumerate(words):
            for other in [*SPECIAL, *task.vocabulary()]:
                if other != word:
                    corrupted = " ".join([*words[:index], other, *words[index + 1 :]])
                    assert not is_exact(task, pair, corrupted)


def test_swapping_responses_commutes_with_the_verdict(task: PrefixAudit, pairs: list[Pair]) -> None:
    for pair in pairs:
        swapped = pair.swap()
        for shown in (pair, swapped):
            text = f"{task.gold_analysis(shown)} response{shown.label}_wins"
            verdict = judged(task, shown, text)
            assert verdict.winner == shown.label
            assert task.analysis_metrics(shown, verdict)["verdict_follows_analysis"] == 1.0
        assert swapped.label == 3 - pair.label
        first, second = errors_of(task, pair)
        assert errors_of(task, swapped) == [second, first]


@pytest.mark.parametrize("base", [3, 5, 10])
def test_relabelling_digits_keeps_the_label(base: int) -> None:
    task = make_task(base=base, num_train=100)
    units = [unit for unit in range(1, base) if math.gcd(unit, base) == 1]
    for pair in task.records("train"):
        case = task.case(pair)
        for unit in units:  # multiplication by a unit is a symmetry of addition modulo base
            digits = [unit * digit % base for digit in case.query]
            claims = [[unit * claim % base for claim in row] for row in case.claims]
            assert errors_of(task, transform(pair, digits, claims)) == errors_of(task, pair)
        for shift in range(base):  # so is adding to the first digit and to all claims
            digits = [(case.query[0] + shift) % base, *case.query[1:]]
            claims = [[(claim + shift) % base for claim in row] for row in case.claims]
            moved = transform(pair, digits, claims)
            assert errors_of(task, moved) == errors_of(task, pair)
            marks = [word for word in task.gold_analysis(pair).split() if ".m" in word]
            assert marks == [w for w in task.gold_analysis(moved).split() if ".m" in w]


def test_better_analysis_looks_at_the_first_difference(task: PrefixAudit) -> None:
    pair = Pair("hand", "2 0 1 1", ("2 0 0 1", "2 2 1 0"), label=1)
    gold = task.gold_analysis(pair)
    one, two = gold.replace("a.g0", "a.g1"), gold.replace("a.g0", "a.g2")
    assert task.better_analysis(pair, (gold, one)) == 1
    assert task.better_analysis(pair, (one, gold)) == 2
    assert task.better_analysis(pair, (gold, gold)) is None
    assert task.better_analysis(pair, (one, two)) is None  # neither is right
    assert task.better_analysis(pair, (gold, "")) is None
    assert task.better_analysis(pair, (gold + " #0", gold)) is None
    # Right given the agreed prefix: after a slip to 1 the claim 1 of response 2 deserves a tick.
    assert one.count("#2 a.x1 a.g1 a.m1:ok a.m2:no") == 1
    ticked = one.replace("#2 a.x1 a.g1 a.m1:ok a.m2:no", "#2 a.x1 a.g1 a.m1:ok a.m2:ok")
    assert task.better_analysis(pair, (one, ticked)) == 2
    # Counts are right with respect to the marks of the analysis itself.
    assert task.better_analysis(pair, (ticked, ticked.replace("n2=2", "n2=1"))) == 2


def test_analysis_metrics(task: PrefixAudit, pairs: list[Pair]) -> None:
    pair = pairs[0]
    words = task.gold_analysis(pair).split()
    verdict = judged(task, pair, f"{' '.join(words)} response{3 - pair.label}_wins")
    assert task.analysis_metrics(pair, verdict) == {
        "step_acc": 1.0,
        "exact": 1.0,
        "verdict_follows_analysis": 0.0,
        "first_wrong_step": 5.0,
    }
    for index, step in ((2, 0), (8, 1), (22, 4)):
        prefix = words[index].rstrip("0123456789")
        flipped = {"a.m1:ok": "a.m1:no", "a.m1:no": "a.m1:ok"}
        other = flipped.get(words[index]) or next(
            word
            for word in task.vocabulary()
            if word.rstrip("0123456789") == prefix and word != words[index]
        )
        text = " ".join([*words[:index], other, *words[index + 1 :], "response1_wins"])
        measured = task.analysis_metrics(pair, judged(task, pair, text))
        assert measured["first_wrong_step"] == step
        assert measured["step_acc"] == pytest.approx(17 / 18)
        assert measured["exact"] == 0.0
    assert task.analysis_metrics(pair, Verdict(None, error="no")) == {}
    assert task.analysis_metrics(pair, Verdict(1, analysis="#0 a.x0")) == {}


# Demonstrations.


def read_pair(task: PrefixAudit, token_ids: tuple[int, ...]) -> Pair:
    """The pair of a prompt, read back from its words."""
    query = task.render(token_ids).split()[: 4 * task.shape.length]
    digits, first, second = (" ".join(w[-1] for w in query[field::4]) for field in (1, 2, 3))
    return Pair("read", digits, (first, second))


def read_analyses(task: PrefixAudit, token_ids: tuple[int, ...]) -> tuple[str, str]:
    """The analyses of a reflection prompt, read back from its words."""
    words = task.render(token_ids).split()[4 * task.shape.length : -1]
    first, second = (
        " ".join(w.replace(voice, "a.") for w in words if w.startswith(("#", voice)))
        for voice in ("c1.", "c2.")
    )
    return first, second


def test_preference_demonstrations_have_the_rates_of_the_card(task: PrefixAudit) -> None:
    shown = [d for step in range(63) for d in task.demonstrations(0, step, 64)]
    shown = [d for d in shown if d.domain == "pref"]
    assert len(shown) == 63 * 32
    right = exact = first_slot = 0
    for demonstration in shown:
        pair = read_pair(task, demonstration.prompt_ids)
        errors = errors_of(task, pair)
        prompt = task.preference_prompt(pair)
        assert prompt.token_ids == demonstration.prompt_ids
        completion = Completion(demonstration.completion_ids, (), FinishReason.STOP)
        verdict = task.parse(prompt, completion)
        measured = task.analysis_metrics(pair, verdict)
        assert measured["verdict_follows_analysis"] == 1.0
        right += verdict.winner == (1 if errors[0] < errors[1] else 2)
        exact += measured["exact"]
        first_slot += verdict.winner == 1
    assert right / len(shown) == pytest.approx(0.79, abs=0.04)
    assert exact / len(shown) == pytest.approx(0.51, abs=0.04)
    assert first_slot / len(shown) > 0.6  # the injected slot bias


def test_reflection_demonstrations_are_labelled_by_step_truth(task: PrefixAudit) -> None:
    shown = [d for step in range(32) for d in task.demonstrations(1, step, 64)]
    shown = [d for d in shown if d.domain == "refl"]
    winners = []
    for demonstration in shown:
        pair = read_pair(task, demonstration.prompt_ids)
        analyses = read_analyses(task, demonstration.prompt_ids)
        better = task.better_analysis(pair, analyses)
        prompt = task.reflection_prompt(pair, analyses, label=better)
        assert prompt.token_ids == demonstration.prompt_ids
        completion = Completion(demonstration.completion_ids, (), FinishReason.STOP)
        assert better is not None
        assert task.verify(prompt, completion) == {"reward": 1.0, "valid": 1.0}
        step, word = task.parse(prompt, completion).analysis.split()
        first, second = (analysis.split() for analysis in analyses)
        index = next(k for k in range(len(first)) if first[k] != second[k])
        assert step == f"#{index // 5}"
        assert word == (first, second)[better - 1][index]
        winners.append(better)
    assert abs(winners.count(1) - len(winners) / 2) < 4 * math.sqrt(len(winners) / 4)


def test_demonstrations_are_a_pure_function_of_their_arguments(task: PrefixAudit) -> None:
    assert task.demonstrations(3, 7, 64) == make_task().demonstrations(3, 7, 64)
    assert task.demonstrations(3, 7, 64) != task.demonstrations(3, 8, 64)
    assert task.demonstrations(3, 7, 64) != task.demonstrations(4, 7, 64)
    for count, share, expected in ((64, 0.5, 32), (5, 0.5, 2), (0, 0.5, 0), (10, 0.3, 7)):
        shown = make_task(reflection_share=share).demonstrations(0, 0, count)
        assert len(shown) == count
        assert sum(d.domain == "pref" for d in shown) == expected


def test_a_faultless_judge_is_exact_and_has_no_reflections(task: PrefixAudit) -> None:
    quiet = dict.fromkeys(("lenient", "stray", "sum_slip", "broad_share"), 0.0)
    exact = make_task(reflection_share=0.0, **quiet)
    for shown in exact.demonstrations(0, 0, 50):
        pair = read_pair(exact, shown.prompt_ids)
        assert exact.render(shown.completion_ids).startswith(exact.gold_analysis(pair))
    with pytest.raises(ValueError, match="data.task.reflection_share=0"):
        make_task(**quiet).demonstrations(0, 0, 2)


def test_broad_noise_has_its_rates() -> None:
    rng, noise = random.Random("broad"), JudgeNoise(broad_count=0.0)
    wrong = {0: 0, 1: 0, 2: 0, 3: 0}
    num_cases = 3000
    for _ in range(num_cases):
        case, _ = draw_case(rng, CaseShape())
        values = broad_values(rng, case, 3, noise)
        for position in range(16):
            is_wrong = values[position] != right_value(case, values[:position], 3)
            wrong[position % 4] += is_wrong
        marks = [sum(values[4 * t + 2 + slot] != TICK for t in range(4)) for slot in (0, 1)]
        assert list(values[16:]) == marks
    assert wrong[0] == 0
    for field in (1, 2, 3):
        assert wrong[field] / (4 * num_cases) == pytest.approx(0.08, abs=0.012)


def test_demonstrations_are_fast(task: PrefixAudit) -> None:
    best = math.inf
    for step in range(20):
        start = time.perf_counter()
        task.demonstrations(0, step, 64)
        best = min(best, time.perf_counter() - start)
    assert best < 0.02  # about 2 ms on a free core
