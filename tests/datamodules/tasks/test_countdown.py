"""Countdown: the scorer table of the card, the generator, both styles, files."""

from __future__ import annotations

import json
import random
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.countdown import Countdown
from datamodules.tasks.countdown_puzzles import (
    DrawnPuzzles,
    PuzzleShape,
    draw_puzzle,
    find_answer,
    score_answer,
)
from datamodules.tasks.expressions import evaluate_expression
from lightning_modules.backbones.tiny import byte_tokenizer, word_tokenizer

SMALL: dict[str, Any] = {"num_operands": [3], "max_number": 9, "min_target": 1, "max_target": 30}
PARTS = {"reward", "valid", "format_error", "wrong_numbers", "bad_expression", "wrong_value"}


def wrap(expression: str) -> str:
    return f"<think>so</think> <answer>{expression}</answer>"


@pytest.mark.parametrize(
    ("text", "numbers", "target", "outcome"),
    [
        (wrap("(1 + 2) * 3"), [3, 1, 2], 9, "reward"),
        (wrap(" 6 / 3 - 1 "), [1, 3, 6], 1, "reward"),
        ("preface <think>\n</think>\n<answer>3-1</answer>", [1, 3], 2, "reward"),
        (wrap("3-1") + "\n", [1, 3], 2, "reward"),
        (wrap("9 + 9") + " no: " + wrap("3 - 1"), [1, 3], 2, "reward"),
        (wrap("8 / 3 * 3"), [3, 3, 8], 8, "reward"),
        (wrap("1 + 2"), [1, 2, 3], 3, "wrong_numbers"),
        (wrap("3 + 3 + 3"), [1, 2, 3], 9, "wrong_numbers"),
        (wrap("1 + 2 + 3 + 3"), [1, 2, 3], 9, "wrong_numbers"),
        (wrap("12 - 3"), [1, 2, 3], 9, "wrong_numbers"),
        (wrap("9"), [1, 2, 3], 9, "wrong_numbers"),
        (wrap("\u0661 + 2"), [1, 2], 3, "wrong_numbers"),
        (wrap("(1 + 2) * 3 = 9"), [1, 2, 3], 9, "wrong_numbers"),
        (wrap("1 + 2") + " done", [1, 2], 3, "format_error"),
        (wrap("1 + 2") + "\n\n", [1, 2], 3, "format_error"),
        ("<answer>1 + 2</answer>", [1, 2], 3, "format_error"),
        ("</think><answer>1 + 2</answer>", [1, 2], 3, "format_error"),
        ("<think></think> so <answer>1 + 2</answer>", [1, 2], 3, "format_error"),
        ("<think><answer>1 + 2</answer></think>", [1, 2], 3, "format_error"),
        ("<think></think><answer>1 + 2", [1, 2], 3, "format_error"),
        ("", [1, 2], 3, "format_error"),
        (wrap("2**3"), [2, 3], 8, "bad_expression"),
        (wrap("7//2"), [2, 7], 3, "bad_expression"),
        (wrap("10**10**10"), [10, 10, 10], 30, "bad_expression"),
        (wrap("1 / (2 - 2)"), [1, 2, 2], 1, "bad_expression"),
        (wrap("03 - 1"), [1, 3], 2, "bad_expression"),
        (wrap("3 x 1"), [1, 3], 3, "bad_expression"),
        (wrap("(" * 1000 + "3-1" + ")" * 1000), [1, 3], 2, "bad_expression"),
        (wrap("1 + 2 - 3"), [1, 2, 3], 9, "wrong_value"),
        (wrap("99 / 98 / 97 / 96 - 0"), [0, 96, 97, 98, 99], 0, "wrong_value"),  # 1.08e-4
        (wrap("1 / 98 / 97 / 96"), [1, 96, 97, 98], 0, "reward"),  # 1.1e-6, within 1e-5
        (wrap("1 / 300 / 300"), [1, 300, 300], 0, "wrong_value"),  # 1.11e-5
        (wrap("1 / 400 / 400"), [1, 400, 400], 0, "reward"),  # 6.25e-6
        (wrap("2.5 * 4"), [2, 4, 5], 10, "reward"),  # the paper's rules let the point through
    ],
)
def test_scorer_table(text: str, numbers: list[int], target: int, outcome: str) -> None:
    assert score_answer(text, numbers, target) == outcome


def test_answer_is_found_in_linear_time() -> None:
    began = time.process_time()
    for text in (
        "<think>" * 50_000,
        "</think><answer>" * 50_000 + "</answer>",
        "<answer>" * 90_000,
    ):
        find_answer(text)
        score_answer(text + "</answer>", [1, 2], 3)
    assert time.process_time() - began < 2


# ---- Drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operands", [(2,), (3, 4), (6,)])
def test_drawn_solutions_are_right(operands: tuple[int, ...]) -> None:
    shape, rng, found = PuzzleShape(num_operands=operands), random.Random(0), 0
    for _ in range(4000):
        puzzle = draw_puzzle(rng, shape)
        if puzzle is None:
            continue
        found += 1
        assert len(puzzle.numbers) in operands and 10 <= puzzle.target <= 100
        assert all(1 <= number <= 99 for number in puzzle.numbers)
        assert evaluate_expression(puzzle.solution) == puzzle.target
        assert score_answer(wrap(puzzle.solution), puzzle.numbers, puzzle.target) == "reward"
        for step in puzzle.steps:
            left, sign, right, equals, value = step.split(" ")
            one, two = Fraction(left), Fraction(right)
            results = {"+": one + two, "-": one - two, "*": one * two, "/": two and one / two}
            assert results[sign] == Fraction(value) and equals == "="
        assert puzzle.steps[-1].endswith(f"= {puzzle.target}")
    assert found > 50


def test_splits_are_disjoint_repeatable_and_seeded() -> None:
    sizes = {"num_train": 300, "num_val": 50, "num_test": 80}
    task = Countdown(**SMALL, **sizes)
    keys = {}
    for split in ("train", "val", "test"):
        records = task.records(split)
        assert len(records) == sizes[f"num_{split}"]
        keys[split] = {puzzle.key for puzzle in records}
        assert len(keys[split]) == len(records) == len({puzzle.uid for puzzle in records})
        assert records == Countdown(**SMALL, **sizes).records(split)
    assert not keys["train"] & keys["val"] and not keys["test"] & (keys["train"] | keys["val"])
    assert task.records("predict") == task.records("test")
    assert Countdown(**SMALL, **sizes, seed=1).records("test") != task.records("test")


def test_too_few_puzzles_is_named() -> None:
    task = Countdown(num_operands=[2], max_number=3, min_target=1, max_target=9, num_train=500)
    with pytest.raises(ValueError, match=r"data.task.num_train.*of 500 for train.*max_number=3"):
        task.records("train")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"style": "word"}, "data.task.style='word'.*'words'"),
        ({"num_operands": []}, "data.task.num_operands"),
        ({"num_operands": [1]}, "data.task.num_operands"),
        ({"max_number": 0}, "data.task.max_number=0"),
        ({"max_target": 1}, "data.task.max_target=1"),
        ({"operators": "+^"}, "data.task.operators"),
        ({"noise": 2.0}, "data.task.noise=2.0"),
        ({"pad_vocabulary": 20}, "data.task.pad_vocabulary=20"),
        ({"num_train": 0}, "data.task.num_train=0"),
        ({"path": ""}, "data.path is not set"),
        ({"chat_template": "on"}, "data.task.chat_template='on'"),
    ],
)
def test_bad_options(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        Countdown(**options)


# ---- The task ------------------------------------------------------------------------------------


@pytest.fixture(params=["words", "text"])
def task(request: pytest.FixtureRequest) -> Countdown:
    made = Countdown(**SMALL, num_train=60, num_val=20, num_test=40, style=request.param)
    words = made.vocabulary()
    made.bind(byte_tokenizer() if words is None else word_tokenizer(words))
    return made


def complete(task: Countdown, text: str, reason: FinishReason = FinishReason.STOP) -> Completion:
    ids = task.writer.completion(text)
    return Completion(ids, tuple(0.0 for _ in ids), reason)


def test_demonstrations_are_right_and_never_of_the_test(task: Countdown) -> None:
    held_out = {task.prompt(p).token_ids for s in ("val", "test") for p in task.records(s)}
    source = task.puzzles
    assert isinstance(source, DrawnPuzzles)
    rng = random.Random(3)
    for _ in range(50):
        assert source.split_of(source.draw_train(rng)) == "train"
    first = task.demonstrations(0, 0, 50)
    assert first == task.demonstrations(0, 0, 50) != task.demonstrations(0, 1, 50)
    assert not {one.prompt_ids for one in first} & held_out
    for one in first:
        text = task.writer.read(one.completion_ids)
        asked = task.render(one.prompt_ids)
        shown = asked if task.style == "words" else asked.split(". ")[0]
        *numbers, target = [int(word.strip(",.")) for word in shown.split() if word[0].isdigit()]
        if task.style == "text":
            target, *numbers = [*numbers, target]
        assert score_answer(text, numbers, target) == "reward", (asked, text)


def test_noise_makes_demonstrations_wrong() -> None:
    task = Countdown(**SMALL, num_train=60, noise=1.0)
    task.bind(word_tokenizer(task.vocabulary() or []))
    right = 0
    for one in task.demonstrations(0, 0, 200):
        *numbers, target = [int(w) for w in task.render(one.prompt_ids).split() if w != "to"]
        outcome = score_answer(task.writer.read(one.completion_ids), numbers, target)
        assert outcome in ("reward", "wrong_value", "bad_expression")
        right += outcome == "reward"
    assert 0 < right < 100


def test_verify_gives_one_outcome(task: Countdown) -> None:
    puzzle = task.records("test")[0]
    prompt = task.prompt(puzzle)
    answer = f"<think> </think> <answer> {puzzle.solution} </answer>"
    right = task.verify(prompt, complete(task, answer))
    assert right == {name: float(name in ("reward", "valid")) for name in PARTS}
    for text, part in (
        ("<think> </think> <answer> 1 </answer>", "wrong_numbers"),
        (answer + " )", "format_error"),
    ):
        parts = task.verify(prompt, complete(task, text))
        assert {name for name, value in parts.items() if value and name != "valid"} == {part}
        assert parts["valid"] == float(part != "format_error")
    unfinished = task.verify(prompt, complete(task, answer, FinishReason.LENGTH))
    assert unfinished["format_error"] == 1.0 and unfinished["reward"] == 0.0
    assert prompt.domain == "countdown" and prompt.uid == puzzle.uid


def test_verify_survives_anything(task: Countdown) -> None:
    """2000 random completions: token ids, half of them inside an answer block; ids out of range."""
    rng, prompt = random.Random(0), task.prompt(task.records("test")[0])
    size, began = len(task.tokenizer), time.process_time()
    head = task.writer.completion("<think> </think> <answer> ")[:-1]
    tail = task.writer.completion(" </answer>")
    for case in range(2000):
        ids = [rng.randrange(size) for _ in range(rng.randrange(120))]
        ids = [*head, *ids, *tail] if case % 2 else ids
        ids = [*ids, rng.choice((-1, size, 10**9, 2**70))] if case % 50 == 0 else ids
        parts = task.verify(prompt, Completion(tuple(ids), (), FinishReason.STOP))
        assert set(parts) == PARTS and set(parts.values()) <= {0.0, 1.0}
        assert sum(value for name, value in parts.items() if name != "valid") == 1.0
    assert time.process_time() - began < 20


def test_vocabulary_is_padded() -> None:
    task = Countdown(**SMALL, num_train=8, pad_vocabulary=2048)
    words = task.vocabulary() or []
    assert len(word_tokenizer(words)) == 2048 == len(set(words)) + 3
    assert words[-1].startswith("<unused_")
    task.bind(word_tokenizer(words))
    plain = Countdown(**SMALL, num_train=8).vocabulary() or []
    assert words[: len(plain)] == plain


def test_tokenizers_that_cannot_write_it_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot encode task 'countdown'"):
        Countdown(**SMALL).bind(word_tokenizer(["1", "2"]))
    with pytest.raises(ValueError, match="cannot write the answers of task 'countdown'"):
        Countdown(**SMALL, style="text").bind(word_tokenizer(["1", "2"]))


# ---- Files ---------------------------------------------------------------------------------------


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_file_of_the_public_shape(tmp_path: Path) -> None:
    rows = [{"target": 10 + i, "nums": [i + 1, 7, 9], "extra": {"a": 1}} for i in range(40)]
    task = Countdown(path=write(tmp_path / "a.jsonl", rows), style="text")
    task.bind(byte_tokenizer())
    found = [puzzle for split in ("train", "val", "test") for puzzle in task.records(split)]
    assert sorted(p.target for p in found) == [10 + i for i in range(40)]
    assert len({puzzle.uid for puzzle in found}) == 40
    assert [p.numbers for p in task.records("predict")] == [(i + 1, 7, 9) for i in range(40)]
    prompt: Prompt = task.prompt(task.records("predict")[0])
    asked = task.render(prompt.token_ids)
    assert "equals 10 with the numbers 1, 7 and 9" in asked
    right = task.verify(prompt, complete(task, wrap("1 * (7 + 9)")))
    assert right["wrong_value"] == 1.0
    demo = task.demonstrations(0, 0, 3)
    assert demo == task.demonstrations(0, 0, 3)
    assert find_answer(task.writer.read(demo[0].completion_ids))


def test_equal_puzzles_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"nums": nums, "target": 20 + i} for i in range(30) for nums in ([1, 2, i], [i, 2, 1])]
    task = Countdown(path=write(tmp_path / "a.jsonl", rows), style="text")
    keys = [{puzzle.key for puzzle in task.records(split)} for split in ("train", "test")]
    assert keys[0] and keys[1] and not keys[0] & keys[1]


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"nums": [1, 2]}, r"a.jsonl:2: field 'target' is missing"),
        ({"nums": [1], "target": 3}, r"a.jsonl:2: field 'nums' holds 1 numbers"),
        ({"nums": [1, 2.5], "target": 3}, r"a.jsonl:2: field 'nums' is .*whole numbers"),
        ({"nums": [1, True], "target": 3}, r"field 'nums'"),
        ({"nums": [1, None], "target": 3}, r"field 'nums'"),
        ({"nums": [1, -2], "target": 3}, r"field 'nums' holds a negative number"),
        ({"nums": "one two", "target": 3}, r"field 'nums'"),
        ({"nums": {"a": 1}, "target": 3}, r"field 'nums'"),
        ({"nums": [1, float("inf")], "target": 3}, r"field 'nums'"),
        ({"nums": [1, 2], "target": "3x"}, r"field 'target'"),
        ({"nums": [1, 2], "target": [3, 4]}, r"field 'target'"),
        ({"nums": [1, 2], "target": float("nan")}, r"field 'target' is missing"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"nums": [3, 4], "target": 7}, row])
    with pytest.raises(ValueError, match=fragment):
        Countdown(path=path, style="text").records("train")
    kept = Countdown(path=path, style="text", on_bad_row="skip")
    assert [puzzle.target for puzzle in kept.records("predict")] == [7]


def test_words_of_a_file_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"nums": [3, 400], "target": 7}])
    with pytest.raises(ValueError, match=r"'nums' is not within 0 to data.task.max_number=99"):
        Countdown(path=path, style="words").records("train")
    assert Countdown(path=path, style="words", max_number=400).records("predict")


def test_numbers_as_text(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('numbers,target\n"[3, 4]",7\n3 5 7,15\n"3,5",8\n')
    records = Countdown(path=str(file), style="text").records("predict")
    assert [(p.numbers, p.target) for p in records] == [((3, 4), 7), ((3, 5, 7), 15), ((3, 5), 8)]
