"""Arithmetic: splits, scores, demonstrations that are wrong as often as asked."""

from __future__ import annotations

import random
from typing import Any

import pytest

from datamodules.experience import Completion, FinishReason
from datamodules.tasks.arithmetic import Arithmetic, Sum, spell
from lightning_modules.backbones.tiny import word_tokenizer


def bound(**options: Any) -> Arithmetic:
    task = Arithmetic(**{"num_train": 200, "num_val": 40, "num_test": 60, **options})
    task.bind(word_tokenizer(task.vocabulary()))
    return task


def verify(task: Arithmetic, problem: Sum, text: str, reason: str = "stop") -> dict[str, float]:
    ids = task.tokenizer(text)["input_ids"]
    return task.verify(task.prompt(problem), Completion(tuple(ids), (), FinishReason(reason)))


@pytest.mark.parametrize(
    ("problem", "text", "result"),
    [
        (Sum("a", 12, "+", 7), "1 2 + 7 =", 19),
        (Sum("b", 3, "-", 40), "3 - 4 0 =", -37),
        (Sum("c", 12, "*", 12), "1 2 * 1 2 =", 144),
    ],
)
def test_problems(problem: Sum, text: str, result: int) -> None:
    task = bound()
    assert (problem.text, problem.result) == (text, result)
    assert task.render(task.prompt(problem).token_ids) == text
    assert verify(task, problem, f"#### {spell(result)} <eos>")["reward"] == 1.0


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        ("#### - 3 7 <eos>", {"reward", "valid"}),
        ("#### - 3 7", {"reward", "valid"}),
        ("#### 3 7 <eos>", {"valid", "wrong_value"}),
        ("#### - 0 3 7 <eos>", {"valid", "wrong_value"}),
        ("#### 3 - 7 <eos>", {"format_error"}),
        ("- 3 7 <eos>", {"format_error"}),
        ("#### <eos>", {"format_error"}),
        ("#### - <eos>", {"format_error"}),
        ("#### - 3 7 = <eos>", {"format_error"}),
        ("#### - 3 7 <eos> <eos>", {"format_error"}),
        ("#### - 3 <pad> 7 <eos>", {"format_error"}),
        ("", {"format_error"}),
    ],
)
def test_verify(answer: str, held: set[str]) -> None:
    parts = verify(bound(), Sum("a", 3, "-", 40), answer)
    assert {name for name, value in parts.items() if value} == held
    assert set(parts) == {"reward", "valid", "format_error", "wrong_value"}
    cut = verify(bound(), Sum("a", 3, "-", 40), answer, "length")
    assert {name for name, value in cut.items() if value} == {"format_error"}


def test_verify_survives_anything() -> None:
    task, rng = bound(), random.Random(0)
    prompt = task.prompt(task.records("train")[0])
    for _ in range(2000):
        ids = tuple(rng.choice((*range(18), -1, 99, 2**70)) for _ in range(rng.randrange(8)))
        parts = task.verify(prompt, Completion(ids, (), FinishReason.STOP))
        assert parts["reward"] + parts["format_error"] + parts["wrong_value"] == 1.0


def test_splits_are_disjoint_repeatable_and_seeded() -> None:
    task, texts = bound(operators="+-*", max_number=99), {}
    for split, size in (("train", 200), ("val", 40), ("test", 60)):
        records = task.records(split)  # type: ignore[arg-type]
        texts[split] = {problem.text for problem in records}
        assert len(texts[split]) == len({problem.uid for problem in records}) == size
        assert {problem.sign for problem in records} == set("+-*")
    assert not texts["train"] & (texts["val"] | texts["test"]) and not texts["val"] & texts["test"]
    assert task.records("test") == task.records("predict")
    assert bound(operators="+-*", max_number=99).records("test") == task.records("test")
    assert bound(operators="+-*", max_number=99, seed=1).records("test") != task.records("test")


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
def test_demonstrations(noise: float) -> None:
    task = bound(noise=noise)
    held_out = {task.prompt(p).token_ids for s in ("val", "test") for p in task.records(s)}  # type: ignore[arg-type]
    demonstrations = task.demonstrations(0, 0, 500)
    assert demonstrations == task.demonstrations(0, 0, 500) != task.demonstrations(0, 1, 500)
    right = 0.0
    for one in demonstrations:
        assert one.prompt_ids not in held_out and one.domain == "math"
        left, sign, right_number, _ = _split(task.render(one.prompt_ids))
        prompt = task.prompt(Sum("x", left, sign, right_number))
        parts = task.verify(prompt, Completion(one.completion_ids, (), FinishReason.STOP))
        assert parts["valid"] == 1.0
        assert len(one.completion_ids) <= (prompt.max_new_tokens or 0)
        right += parts["reward"] / 500
    assert right == pytest.approx(1 - noise, abs=0.08)


def _split(text: str) -> tuple[int, str, int, str]:
    words = text.split()
    place = next(i for i, word in enumerate(words) if word in "+-*")
    left, right = "".join(words[:place]), "".join(words[place + 1 : -1])
    return int(left), words[place], int(right), words[-1]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"max_number": 0}, "data.task.max_number=0"),
        ({"operators": "+/"}, r"data.task.operators='\+/'"),
        ({"operators": ""}, "data.task.operators=''"),
        ({"noise": -0.1}, "data.task.noise=-0.1"),
        ({"num_train": 0}, "data.task.num_train=0"),
        ({"num_test": -1}, "data.task.num_test=-1"),
        ({"max_number": 9}, "300 problems are more than half of the 200"),
    ],
)
def test_bad_options(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        bound(**options)
