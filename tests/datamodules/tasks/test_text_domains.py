"""Chat prompts and instruction files: rows, prompts, rewards, bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.experience import Completion, FinishReason
from datamodules.tasks.chat_prompts import ChatPrompts, answer_part
from datamodules.tasks.instructions import InstructionFile
from tests.datamodules.tasks.test_preferences import byte_tokenizer, write

WORDS = {"num_words": 3, "relation": "at least"}


def say(task: Any, text: str, reason: FinishReason = FinishReason.STOP) -> Completion:
    ids = (
        *task.tokenizer(text, add_special_tokens=False)["input_ids"],
        task.tokenizer.eos_token_id,
    )
    return Completion(ids, (0.0,) * len(ids), reason)


def instruction_rows() -> list[dict[str, Any]]:
    ids = ["punctuation:no_comma", "length_constraints:number_words"]
    row = {"prompt": "Write.", "instruction_id_list": ids, "kwargs": [{}, WORDS]}
    return [
        {"key": 1, **row},
        {**row, "prompt": "As JSON text.", "kwargs": json.dumps([None, WORDS])},
        {**row, "prompt": "Nulls.", "kwargs": [{"num_words": None}, WORDS | {"letter": None}]},
        {"prompt": "Nothing to check.", "instruction_id_list": [], "kwargs": []},
    ]


def instructions(path: str, **options: Any) -> InstructionFile:
    task = InstructionFile(path=path, **options)
    task.bind(byte_tokenizer())
    return task


def test_instructions_are_scored_by_fraction(tmp_path: Path) -> None:
    task = instructions(write(tmp_path, instruction_rows()), before="Q: ", after="\nA:")
    records = task.records("predict")
    assert [record.text for record in records] == [
        "Write.", "As JSON text.", "Nulls.", "Nothing to check.",
    ]  # fmt: skip
    prompts = [task.prompt(record) for record in records]
    assert task.render(prompts[0].token_ids) == "Q: Write.\nA:"
    assert {prompt.domain for prompt in prompts} == {"if"}
    for prompt in prompts[:3]:
        assert task.verify(prompt, say(task, "a b c")) == {"reward": 1.0, "all_followed": 1.0}
        assert task.verify(prompt, say(task, "a, b c")) == {"reward": 0.5, "all_followed": 0.0}
        thought = say(task, "<think>a, b, c</think>\n<response>x y z</response>")
        assert task.verify(prompt, thought)["reward"] == 1.0
    assert task.verify(prompts[3], say(task, ""))["reward"] == 1.0
    failed = task.verify(prompts[3], say(task, "a", FinishReason.ERROR))
    assert failed == {"reward": 0.0, "all_followed": 0.0}
    odd = Completion((10**6,), (0.0,), FinishReason.STOP)
    assert task.verify(prompts[0], odd)["reward"] == 0.0, "ids that do not decode"


def test_thinking_that_never_ends(tmp_path: Path) -> None:
    path = write(tmp_path, instruction_rows())
    endless = "<think>a b c d"
    for strict, reward in ((False, 1.0), (True, 0.0)):
        task = instructions(path, strict=strict)
        prompt = task.prompt(task.records("predict")[0])
        assert task.verify(prompt, say(task, endless))["reward"] == reward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]},
         r"p\.jsonl:2: field 'instruction_id_list' asks for .*did you mean 'punctuation:no_comma'"),
        ({"kwargs": [{}]}, r":2: field 'kwargs' has 1 entries for 2 ids"),
        ({"kwargs": "[{"}, r":2: field 'kwargs' does not parse as JSON"),
        ({"kwargs": 3}, r":2: field 'kwargs' is a int; a list is needed"),
        ({"kwargs": [{}, 3]}, r":2: field 'instruction_id_list' needs ids as texts"),
        ({"kwargs": [{}, {"num_words": 3}]}, r":2: .*gives .*number_words' no 'relation'"),
        ({"prompt": " "}, r":2: field 'prompt' is empty"),
        ({"instruction_id_list": None}, r":2: field 'instruction_id_list' is missing"),
    ],
)  # fmt: skip
def test_bad_instruction_rows_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = instruction_rows()
    rows[1] = rows[0] | change
    path = write(tmp_path, rows, "p.jsonl")
    with pytest.raises(ValueError, match=message):
        InstructionFile(path=path).records("train")
    skipping = InstructionFile(path=path, on_bad_row="skip", val_fraction=0, test_fraction=0)
    assert len(skipping.records("train")) == 3
    assert skipping.file.counts["main/skipped"] == 1


def chats() -> list[dict[str, Any]]:
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return [{"prompt": "One question."}, {"prompt": messages}]


def test_chat_prompts(tmp_path: Path) -> None:
    task = ChatPrompts(path=write(tmp_path, chats()), max_new_tokens=7)
    task.bind(byte_tokenizer())
    prompts = [task.prompt(record) for record in task.records("predict")]
    assert task.render(prompts[0].token_ids) == "One question."
    assert task.render(prompts[1].token_ids) == "user: Hi.\nassistant: Hello.\nuser: Why?"
    assert [prompt.max_new_tokens for prompt in prompts] == [7, 7]
    turns, written = task.conversation(prompts[1], say(task, "Because."))
    assert turns == (("user", "Hi."), ("assistant", "Hello."), ("user", "Why?"))
    assert written == "Because."
    assert task.verify(prompts[0], say(task, "x")) == {"reward": 0.0}
    assert task.needs_reward_model
    renamed = [{"messages": row["prompt"]} for row in chats()]
    other = ChatPrompts(path=write(tmp_path, renamed, "m.jsonl"))
    assert [r.chat for r in other.records("predict")] == [r.chat for r in task.records("predict")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"role": "user"}], "needs messages"),
        ([{"role": "robot", "content": "x"}], "needs messages"),
        (["x"], "needs messages"),
        ([], "must end with a message of the user"),
        ([{"role": "assistant", "content": "x"}], "must end with a message of the user"),
        ([{"role": "user", "content": " "}], "must end with a message of the user"),
        (3, "is a int; text is needed"),
    ],
)
def test_bad_chats_are_named(tmp_path: Path, value: Any, message: str) -> None:
    path = write(tmp_path, [*chats(), {"prompt": value}])
    with pytest.raises(ValueError, match=rf"jsonl:3: field 'prompt' {message}"):
        ChatPrompts(path=path).records("train")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain ", "plain"),
        ("<think>a</think> b", "b"),
        ("a</think> b", "b"),
        ("<think>a</think><response> b </response> c", "b"),
        ("<think>a</think><response>b", "b"),
        ("<response>b</response>", "b"),
        ("<think>a</think>x</think>y", "y"),
        ("<think>a", "<think>a"),
    ],
)
def test_answer_part(text: str, answer: str) -> None:
    assert answer_part(text) == answer
    assert answer_part(text, strict=True) == ("" if text == "<think>a" else answer)
