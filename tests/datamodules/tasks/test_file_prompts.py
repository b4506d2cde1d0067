"""What all file tasks share: options by name and type, long prompts, splits, counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datamodules.row_options import RowOptions
from datamodules.tasks.chat_prompts import ChatPrompts
from datamodules.tasks.countdown import Countdown
from datamodules.tasks.instructions import InstructionFile
from datamodules.tasks.math_problems import MathProblems
from datamodules.tasks.preferences import PreferencePairs
from run_tools.checks import check_node
from tests.datamodules.tasks.test_preferences import byte_tokenizer, write

TASKS = [ChatPrompts, InstructionFile, MathProblems, Countdown, PreferencePairs]


def node(task: type, **values: Any) -> dict[str, Any]:
    return {"_target_": f"{task.__module__}.{task.__name__}", "path": "a.jsonl", **values}


@pytest.mark.parametrize("task", TASKS)
def test_options_of_rows_are_known_by_name_and_type(task: type) -> None:
    rest = {"val_split": "v", "test_split": None, "columns": {}, "max_bad_share": 0.5}
    assert check_node("data.task", node(task, seed=1, on_bad_row="skip", **rest)) == []
    [wrong] = check_node("data.task", node(task, on_bad_row="skp"))
    assert wrong.startswith("data.task.on_bad_row='skp'") and "'skip'" in wrong
    [unknown] = check_node("data.task", node(task, val_fractoin=0.1))
    assert "data.task.val_fractoin" in unknown and "'val_fraction'" in unknown


@pytest.mark.parametrize(
    ("task", "key"),
    [(Countdown, "on_too_long"), (Countdown, "system_prompt"), (MathProblems, "after")],
)
def test_a_task_does_not_take_what_it_cannot_use(task: type, key: str) -> None:
    assert f"data.task.{key}" in "".join(check_node("data.task", node(task, **{key: "cut"})))
    with pytest.raises(TypeError, match=key):
        task(path="a.jsonl", **{key: "cut"})


def test_long_prompts_are_left_out_once_bound(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": text} for text in ("a", "b" * 90, "c" * 80, "d")])
    alone: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0, "max_prompt_tokens": 60}
    task = ChatPrompts(path=path, on_too_long="skip", **alone)
    assert len(task.records("train")) == 4, "without a tokenizer nothing can be measured"
    task.bind(byte_tokenizer())
    assert [record.text for record in task.records("train")] == ["a", "d"]
    assert task.counts["train/too_long"] == 2 and task.counts["main/rows"] == 4
    short = byte_tokenizer()
    short.chat_template = "{{ messages[0]['content'][:50] }}"
    task.bind(short)
    assert len(task.records("train")) == 4, "what another tokenizer measured is forgotten"
    cutting = ChatPrompts(path=path, **alone)
    cutting.bind(byte_tokenizer())
    sizes = [len(cutting.prompt(record).token_ids) for record in cutting.records("train")]
    assert sizes[::3] == [1, 1] and 1 < max(sizes) <= 60


def test_what_stands_around_a_text_counts_as_its_length(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "Why?"}])
    around: dict[str, Any] = {"before": "b" * 30, "after": "a" * 30, "max_prompt_tokens": 50}
    for kind in (ChatPrompts, InstructionFile):
        with pytest.raises(ValueError, match="takes 60 tokens"):
            kind(path=path, **around).bind(byte_tokenizer())


def test_split_is_a_hash_of_seed_and_key() -> None:
    options = RowOptions(path="a.jsonl", val_fraction=0.25, test_fraction=0.25)
    keys = [str(i) for i in range(2000)]
    splits = [options.split_of(key) for key in keys]
    shares = {name: splits.count(name) / 2000 for name in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.5, "val": 0.25, "test": 0.25}, abs=0.04)
    assert splits[::-1] == [options.split_of(key) for key in reversed(keys)]
    other = RowOptions(path="a.jsonl", val_fraction=0.25, test_fraction=0.25, seed=1)
    assert splits != [other.split_of(key) for key in keys]
    apart = RowOptions(path="a.jsonl", val_split="dev", test_path="b.jsonl")
    assert apart.sources == {"val": ("a.jsonl", "dev"), "test": ("b.jsonl", None)}
    assert {apart.split_of(key) for key in keys} == {"train"}
