"""Mathematics problems from files: shapes, bad rows, prompts within bounds, scores."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from datamodules.experience import Completion, FinishReason
from datamodules.tasks.math_problems import MathProblems, reference_answer
from lightning_modules.backbones.tiny import byte_tokenizer, word_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    rows = [
        {"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(60)
    ]
    return write(tmp_path / "gsm8k.jsonl", rows)


def bound(**options: Any) -> MathProblems:
    task = MathProblems(**{"comparison": "numeric", **options})
    task.bind(byte_tokenizer())
    return task


def verify(task: MathProblems, text: str, reason: str = "stop", index: int = 4) -> dict[str, float]:
    prompt = task.prompt(task.records("predict")[index])
    return task.verify(prompt, Completion(task.writer.completion(text), (), FinishReason(reason)))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 1,200", "1,200"),
        (r"so $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (" 42 ", "42"),
        (r"\frac{3}{4}", r"\frac{3}{4}"),
        ("#### ", None),
        (r"\boxed{1", None),
        ("a long story " * 20, None),
        ("two\nlines", None),
    ],
)
def test_reference_answer(text: str, answer: str | None) -> None:
    assert reference_answer(text) == answer


def test_gsm8k_shape(gsm8k: str) -> None:
    task = bound(path=gsm8k, prompt_style="hashes", max_new_tokens=9)
    splits = [task.records(split) for split in ("train", "val", "test")]
    assert sum(map(len, splits)) == 60 and all(splits)
    assert [p.answer for p in task.records("predict")] == [str(i + 1) for i in range(60)]
    prompt = task.prompt(task.records("predict")[0])
    assert task.render(prompt.token_ids).startswith("0 + 1?") and "####" in task.render(
        prompt.token_ids
    )
    assert (prompt.domain, prompt.max_new_tokens) == ("math", 9)


@pytest.mark.parametrize(
    ("text", "reason", "held"),
    [
        ("4 + 1 = 5\n#### 5", "stop", {"reward", "valid"}),
        ("#### 5.00", "stop", {"reward", "valid"}),
        ("#### 6", "stop", {"valid", "wrong_answer"}),
        ("#### five", "stop", {"valid", "wrong_answer"}),
        ("5", "stop", {"format_error"}),
        ("", "stop", {"format_error"}),
        ("#### 5", "length", {"unfinished"}),
        ("#### 5", "error", {"unfinished"}),
    ],
)
def test_verify(gsm8k: str, text: str, reason: str, held: set[str]) -> None:
    parts = verify(bound(path=gsm8k, prompt_style="hashes"), text, reason)
    assert {name for name, value in parts.items() if value} == held
    assert set(parts) == {"reward", "valid", "format_error", "unfinished", "wrong_answer"}


def test_math_shape_and_comparison(tmp_path: Path) -> None:
    rows = [{"problem": "half?", "solution": r"It is \boxed{\dfrac12}.", "level": "Level 1"}]
    path = write(tmp_path / "math.jsonl", rows)
    task = bound(path=path, val_fraction=0, test_fraction=0)
    assert verify(task, r"\boxed{\frac{1}{2}}", index=0)["reward"] == 1.0
    assert verify(task, r"\boxed{0.5}", index=0)["reward"] == 1.0
    assert verify(task, r"\boxed{0.4}", index=0)["reward"] == 0.0
    exact = bound(path=path, comparison="exact", val_fraction=0, test_fraction=0)
    assert verify(exact, r"\boxed{\frac{1}{2}}", index=0)["reward"] == 1.0
    assert verify(exact, r"\boxed{0.5}", index=0)["reward"] == 0.0


def test_demonstrations_score(gsm8k: str) -> None:
    for style in ("boxed", "hashes"):
        task = bound(path=gsm8k, prompt_style=style)
        train = {task.prompt(p).token_ids: p for p in task.records("train")}
        first = task.demonstrations(0, 0, 8)
        assert first == task.demonstrations(0, 0, 8) != task.demonstrations(0, 1, 8)
        for one in first:
            prompt = task.prompt(train[one.prompt_ids])
            done = Completion(one.completion_ids, (), FinishReason.STOP)
            assert task.verify(prompt, done)["reward"] == 1.0


def test_verify_survives_anything(gsm8k: str) -> None:
    task, rng = bound(path=gsm8k), random.Random(0)
    prompt = task.prompt(task.records("train")[0])
    for case in range(2000):
        ids = [rng.randrange(len(task.tokenizer)) for _ in range(case % 80)]
        ids = [*task.writer.completion("\\boxed{")[:-1], *ids] if case % 2 else ids
        ids = [*ids, rng.choice((-1, 10**9, 2**70))] if case % 50 == 0 else ids
        parts = task.verify(prompt, Completion(tuple(ids), (), FinishReason.STOP))
        assert parts["valid"] + parts["format_error"] == 1.0


def test_system_prompt_and_chat_template(gsm8k: str) -> None:
    tokenizer = byte_tokenizer()
    plain = bound(path=gsm8k, system_prompt="Be brief.")
    text = plain.render(plain.prompt(plain.records("predict")[0]).token_ids)
    assert text.startswith("Be brief.\n\n0 + 1?")
    tokenizer.chat_template = TEMPLATE
    for option, begin, end in (
        ("auto", "<system>Be brief.<user>0 + 1?", "<bot>"),
        ("off", "Be", "\n"),
    ):
        task = MathProblems(path=gsm8k, system_prompt="Be brief.", chat_template=option)  # type: ignore[arg-type]
        task.bind(tokenizer)
        text = task.render(task.prompt(task.records("predict")[0]).token_ids)
        assert text.startswith(begin) and text.endswith(end)


def test_long_prompts_and_control_tokens(tmp_path: Path) -> None:
    long = "What is " + "1 + " * 200 + "1?"
    rows = [{"question": q, "answer": 3} for q in ("1 + <eos> 2?", long, "2 + 1?")]
    path = write(tmp_path / "a.jsonl", rows)
    shares = {"val_fraction": 0, "test_fraction": 0, "max_prompt_tokens": 160}
    cut = bound(path=path, **shares)
    first, second, _ = (cut.prompt(problem) for problem in cut.records("train"))
    assert len(second.token_ids) <= 160
    text = cut.render(second.token_ids)
    assert text.startswith("What is") and " ... " in text and "\\boxed{}" in text
    assert cut.tokenizer.eos_token_id not in first.token_ids
    skip = bound(path=path, on_too_long="skip", **shares)
    assert [problem.question for problem in skip.records("train")] == ["1 + <eos> 2?", "2 + 1?"]
    assert skip.counts["train/too_long"] == 1
    with pytest.raises(ValueError, match=r"a.jsonl:2: .*data.task.max_prompt_tokens=160"):
        bound(path=path, on_too_long="error", **shares).records("train")
    with pytest.raises(ValueError, match="data.task.max_prompt_tokens=20: what stands around"):
        bound(path=path, max_prompt_tokens=20)


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"question": "1?"}, "a.jsonl:2: field 'answer' is missing"),
        ({"question": "", "answer": "1"}, "a.jsonl:2: field 'question' is empty"),
        ({"question": 5, "answer": "1"}, "a.jsonl:2: field 'question' is a int"),
        ({"question": "1?", "answer": "#### "}, "a.jsonl:2: field 'answer' holds neither"),
        ({"question": "1?", "answer": "why " * 60}, "a.jsonl:2: field 'answer' holds neither"),
        ({"question": "1?", "answer": True}, "a.jsonl:2: field 'answer' is a bool"),
        ({"question": "1?", "answer": "\ud800"}, "a.jsonl:2: field 'answer' holds lone surrogates"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "2?", "answer": "#### 2"}, row])
    with pytest.raises(ValueError, match=fragment):
        bound(path=path).records("train")
    task = bound(path=path, on_bad_row="skip")
    assert sum(len(task.records(split)) for split in ("train", "val", "test")) == 1
    assert task.counts["main/skipped"] == 1


def test_prediction_needs_no_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "1 + 1?"}, {"question": "2 + 2?"}])
    task = bound(path=path)
    assert [problem.answer for problem in task.records("predict")] == [None, None]
    assert verify(task, r"\boxed{2}", index=0)["reward"] == 0.0
    with pytest.raises(ValueError, match="data.task.columns.answer=<column>"):
        task.records("train")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"prompt_style": "box"}, "data.task.prompt_style='box'.*'boxed'"),
        ({"comparison": "numerical"}, "data.task.comparison='numerical'.*'numeric'"),
        ({"on_too_long": "drop"}, "data.task.on_too_long='drop'"),
        ({"max_new_tokens": 0}, "data.task.max_new_tokens=0"),
        ({"max_prompt_tokens": 0}, "data.task.max_prompt_tokens=0"),
        ({"val_fraction": 0.9}, "data.task.val_fraction=0.9, data.task.test_fraction=0.2"),
        ({"path": ""}, "data.path is not set"),
        ({"columns": {"questoin": "q"}}, "data.task.columns.questoin.*'question'"),
    ],
)
def test_bad_options(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        MathProblems(**{"path": "a.jsonl", **options})


def test_word_tokenizers_are_refused(gsm8k: str) -> None:
    with pytest.raises(ValueError, match="cannot write the answers of task 'math_problems'"):
        MathProblems(path=gsm8k).bind(word_tokenizer(["So"]))


def test_real_file(shared_data: Path) -> None:
    task = bound(path=str(shared_data / "gsm8k_train_1000.jsonl"), prompt_style="hashes")
    assert task.records("predict")[1].answer == "110"
    assert sum(len(task.records(split)) for split in ("train", "val", "test")) == 1000
    lengths = [len(task.prompt(problem).token_ids) for problem in task.records("test")]
    assert max(lengths) <= 512
