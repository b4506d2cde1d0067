"""The prefix-audit task: the parser of its outputs and its options."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.base import Pair, Verdict
from datamodules.tasks.prefix_audit import PrefixAudit
from datamodules.tasks.prefix_audit_judges import running_sums
from tests.datamodules.tasks.prefix_audit_helpers import SPECIAL, make_task, written


@pytest.fixture(scope="module")
def task() -> PrefixAudit:
    return make_task()


@pytest.fixture(scope="module")
def pairs(task: PrefixAudit) -> list[Pair]:
    return list(task.records("train"))


# Parser.


def total(verdict: Verdict) -> bool:
    """Every verdict is either right and without an error or none and with one."""
    if verdict.winner is None:
        return bool(verdict.error) and verdict.analysis == ""
    return verdict.winner in (1, 2) and verdict.error is None and bool(verdict.analysis)


def prompts_and_texts(task: PrefixAudit, pair: Pair) -> list[tuple[Prompt, str]]:
    gold = task.gold_analysis(pair)
    return [
        (task.preference_prompt(pair), f"{gold} response2_wins"),
        (task.reflection_prompt(pair, (gold, gold), label=2), "#1 a.g0 critique2_wins"),
    ]


def test_parser_reads_legal_completions(task: PrefixAudit, pairs: list[Pair]) -> None:
    for prompt, text in prompts_and_texts(task, pairs[0]):
        for eos in (True, False):  # an engine may keep the end token for itself
            verdict = task.parse(prompt, written(task, text, eos=eos))
            assert verdict == Verdict(2, analysis=text.rsplit(" ", 1)[0])
        assert task.parse(prompt, written(task, text + " <eos>")).winner is None
        assert task.parse(prompt, written(task, text + " #0")).winner is None
        assert task.parse(prompt, Completion((), (), FinishReason.STOP)).winner is None


def test_unfinished_and_wrong_nouns_are_invalid(task: PrefixAudit, pairs: list[Pair]) -> None:
    cases = prompts_and_texts(task, pairs[0])
    for (prompt, text), (other, _) in zip(cases, reversed(cases), strict=True):
        for finish in (FinishReason.LENGTH, FinishReason.ERROR):
            completion = written(task, text, finish)
            assert task.parse(prompt, completion).winner is None
            assert task.verify(prompt, completion) == {"reward": 0.0, "valid": 0.0}
        assert task.parse(other, written(task, text)).winner is None
        nouns = ("response", "critique") if "response" in text else ("critique", "response")
        swapped = text.replace(*nouns)
        assert task.parse(prompt, written(task, swapped)).winner is None
        strange = replace(prompt, domain="math")
        assert task.parse(strange, written(task, text)).winner is None


def word_class(task: PrefixAudit, word: str, prompt: Prompt) -> str:
    """Words of one class may replace each other."""
    if word.startswith("#"):
        return "step" if prompt.domain == "refl" else word
    if word.startswith("a.") and prompt.domain == "refl":
        return "analysis"
    if word.startswith("a."):
        return word[:3] if word[2] in "xg" else word[:4]
    return word[:8] if word.endswith("_wins") else f"other {word}"


def test_parser_rejects_every_edit_of_one_word(task: PrefixAudit, pairs: list[Pair]) -> None:
    everything = [*SPECIAL, *task.vocabulary()]
    for prompt, text in prompts_and_texts(task, pairs[1]):
        words = text.split()
        for index, word in enumerate(words):
            shorter = words[:index] + words[index + 1 :]
            assert task.parse(prompt, written(task, " ".join(shorter))).winner is None
            for other in everything:
                changed = " ".join([*words[:index], other, *words[index + 1 :]])
                verdict = task.parse(prompt, written(task, changed))
                same = word_class(task, word, prompt) == word_class(task, other, prompt)
                assert (verdict.winner is not None) == same, (word, other)
                assert total(verdict)
                longer = " ".join([*words[:index], other, *words[index:]])
                assert task.parse(prompt, written(task, longer)).winner is None


def test_parser_never_raises(task: PrefixAudit, pairs: list[Pair]) -> None:
    rng = random.Random("fuzz")
    cases = prompts_and_texts(task, pairs[2])
    for _ in range(1000):
        prompt, text = rng.choice(cases)
        ids = list(written(task, text).token_ids)
        if rng.random() < 0.5:
            ids = [rng.randrange(-5, 120) for _ in range(rng.randrange(40))]
        else:
            ids[rng.randrange(len(ids))] = rng.randrange(-5, 120)
        finish = rng.choice(list(FinishReason))
        completion = Completion(tuple(ids), (0.0,) * len(ids), finish)
        verdict = task.parse(prompt, completion)
        assert total(verdict)
        assert task.verify(prompt, completion)["valid"] == float(verdict.winner is not None)


def test_values_and_words_are_inverse(task: PrefixAudit, pairs: list[Pair]) -> None:
    for pair in pairs[:20]:
        gold = task.gold_analysis(pair)
        values = task.analysis_values(gold)
        assert values is not None and task.analysis_words(values) == gold
        assert values[1:16:4] == running_sums(task.case(pair).query, 3)


# Options.


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"base": 1}, ["data.task.base=1", "from 2 to 10"]),
        ({"base": 11, "length": 17}, ["data.task.base=11", "data.task.length=17", "1 to 16"]),
        ({"length": "4"}, ["data.task.length='4'", "whole number"]),
        ({"num_val": -1}, ["data.task.num_val=-1", "at least 0"]),
        ({"max_gap": 0}, ["data.task.max_gap=0", "at least 1"]),
        ({"max_better_errors": -1}, ["data.task.max_better_errors=-1"]),
        ({"seed": 0.5}, ["data.task.seed=0.5", "whole number"]),
        ({"lenient": 1.5, "stray": -0.1}, ["data.task.lenient=1.5", "data.task.stray=-0.1"]),
        ({"sum_slip": None}, ["data.task.sum_slip=None", "0 to 1"]),
        ({"broad_sum": math.nan}, ["data.task.broad_sum=nan"]),
        ({"reflection_share": 2, "broad_mark": 7}, ["reflection_share=2", "broad_mark=7"]),
        ({"broad_count": True, "broad_share": "x"}, ["broad_count=True", "broad_share='x'"]),
    ],
)
def test_bad_options_are_named_all_at_once(
    options: dict[str, object], fragments: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        PrefixAudit(**options)
    for fragment in fragments:
        assert fragment in str(caught.value)
