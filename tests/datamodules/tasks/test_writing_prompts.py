"""Writing prompts of hidden types: rows, prompts without a hint, plans, prefixes, bad rows."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.experience import Completion, FinishReason, Rollouts
from datamodules.rewards import VerifierReward
from datamodules.tasks.base import Pair
from datamodules.tasks.planning import PlannedTask
from datamodules.tasks.writing_prompts import WritingPrompts, plan_prompt
from run_tools.checks import check_node
from tests.datamodules.tasks.test_preferences import byte_tokenizer, write

PLAN = "<think>eight letters</think>"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def rows() -> list[dict[str, Any]]:
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "A rhyme?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    return [
        {"prompt": "A saga of the sea.", "type": "long", "reference": "Call me."},
        {"prompt": "A wish.", "type": " Short\n", "reference": "Be well."},
        {"prompt": chat, "type": "SHORT", "reference": "Moon, June."},
    ]


def bound(path: str, **options: Any) -> WritingPrompts:
    task = WritingPrompts(path=path, **{"val_fraction": 0, "test_fraction": 0, **options})
    task.bind(byte_tokenizer())
    return task


@pytest.fixture
def task(tmp_path: Path) -> WritingPrompts:
    return bound(write(tmp_path, rows()))


def say(task: WritingPrompts, text: str, reason: FinishReason = FinishReason.STOP) -> Completion:
    ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (*ids, task.tokenizer.eos_token_id)
    return Completion(ids, (0.0,) * len(ids), reason)


# ---- Rows ----------------------------------------------------------------------------------------


def test_rows_have_a_hidden_type(task: WritingPrompts) -> None:
    assert isinstance(task, PlannedTask) and not task.needs_reward_model
    records = task.records("train")
    prompts = [task.prompt(record) for record in records]
    assert [record.kind for record in records] == ["long", "short", "short"]
    assert [task.kind(prompt) for prompt in prompts] == ["long", "short", "short"]
    assert [prompt.domain for prompt in prompts] == ["long", "short", "short"]
    assert len({prompt.uid for prompt in prompts}) == 3
    assert records[2].chat == (("user", "Hi."), ("assistant", "Hello."), ("user", "A rhyme?"))


@pytest.mark.parametrize("column", ["type", "kind", "length", "sort"])
def test_columns_of_the_type(tmp_path: Path, column: str) -> None:
    given = [{"query": f"{i}", column: ("Long", "short")[i % 2]} for i in range(6)]
    columns = {"type": "sort"} if column == "sort" else {}
    task = bound(write(tmp_path, given), columns=columns)
    assert [record.kind for record in task.records("train")] == ["long", "short"] * 3


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    given = [{"prompt": f"Write {i}.", "type": ("long", "short")[i % 2]} for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), path)
    task = bound(str(path), val_fraction=0.2, test_fraction=0.2)
    sizes = [len(task.records(split)) for split in ("train", "val", "test")]
    assert sum(sizes) == 40 and min(sizes) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "medium"}, r":2: field 'type' is 'medium'; use long or short"),
        ({"type": 300}, r":2: field 'type' is a int; text is needed"),
        ({"type": " "}, r":2: field 'type' is empty"),
        ({"type": None}, r":2: field 'type' is missing"),
        ({"prompt": " "}, r":2: field 'prompt' is empty"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, r":2: field 'prompt' needs messages"),
    ],
)
def test_bad_rows_are_named_and_counted(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given = rows()
    given[1] |= change
    path = write(tmp_path, given)
    with pytest.raises(ValueError, match=message):
        WritingPrompts(path=path).records("train")
    skipping = bound(path, on_bad_row="skip")
    assert len(skipping.records("train")) == 2 and skipping.counts["main/skipped"] == 1


def test_bad_types_have_a_count_of_their_own(tmp_path: Path) -> None:
    given = [*rows(), {"prompt": "x", "type": "longish"}, {"prompt": "y", "type": "1"}]
    task = bound(write(tmp_path, given), on_bad_row="skip")
    assert len(task.records("train")) == 3 and task.counts["main/skipped/bad_type"] == 2
    with pytest.warns(UserWarning, match="2 of 5 rows left out"):
        assert len(bound(task.path, max_bad_share=0.5).records("train")) == 3


def test_prediction_needs_no_type(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "Write."}])
    task = bound(path)
    [record] = task.records("predict")
    prompt = task.prompt(record)
    assert (record.kind, prompt.domain) == (None, "writing")
    assert task.verify(prompt, say(task, "x"))["reward"] == 0.0
    with pytest.raises(ValueError, match=r"jsonl:1: the row has no type"):
        task.kind(prompt)
    with pytest.raises(ValueError, match="no column type / kind / length"):
        task.records("train")
    odd = write(tmp_path, [{"prompt": "Write.", "type": "tiny"}], "odd.jsonl")
    with pytest.raises(ValueError, match="'tiny'"):
        bound(odd).records("predict")


# ---- Prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("system_prompt", ["auto", None])
def test_no_type_and_no_reference_reaches_a_policy(
    tmp_path: Path, template: str | None, system_prompt: str | None
) -> None:
    kinds = ("long", "short")
    path, other = (
        write(
            tmp_path,
            [{"uid": i, "prompt": f"Write {i}.", "type": kinds[(i + shift) % 2], "reference": "zz"}
             for i in range(9)],
            f"{shift}.jsonl",
        )
        for shift in (0, 1)
    )  # fmt: skip
    seen = []
    for file in (path, other):
        task = WritingPrompts(
            path=file, system_prompt=system_prompt, val_fraction=0, test_fraction=0
        )
        task.bind(byte_tokenizer(chat_template=template))
        prompts = [task.prompt(record) for record in task.records("train")]
        seen.append([(prompt.uid, prompt.token_ids) for prompt in prompts])
        for prompt in prompts:
            text = task.render(prompt.token_ids).lower()
            assert not any(word in text for word in (*kinds, "zz", "length", "type"))
            assert ("optional" in text) == (system_prompt == "auto")
            assert text.endswith("[assistant]") == (template is not None)
    assert seen[0] == seen[1], "types are exchanged, tokens are not"


def test_the_system_prompt_follows_the_tags(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    task = bound(path, tags=["(plan)", "(end)"])
    text = task.render(task.prompt(task.records("train")[1]).token_ids)
    assert text == f"{plan_prompt(('(plan)', '(end)'))}\n\nA wish." and "(plan) and (end)" in text
    own = bound(path, system_prompt="Be kind.", before="> ", after="\nText:")
    text = own.render(own.prompt(own.records("train")[1]).token_ids)
    assert text == "Be kind.\n\n> A wish.\nText:"


def test_a_template_that_opens_a_plan_is_refused(tmp_path: Path) -> None:
    task = WritingPrompts(path=write(tmp_path, rows()))
    with pytest.raises(ValueError, match="every text begins with a plan"):
        task.bind(byte_tokenizer(chat_template=TEMPLATE + "<think>\n"))
    off = WritingPrompts(path=task.path, chat_template="off")
    off.bind(byte_tokenizer(chat_template=TEMPLATE + "<think>\n"))
    assert off.prompt(off.records("predict")[0]).token_ids


def test_a_tokenizer_that_cannot_write_the_tags_is_refused(tmp_path: Path) -> None:
    from tests.datamodules.tasks.test_preferences import PreTrainedTokenizerFast, Tokenizer, models

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    narrow = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    with pytest.raises(ValueError, match=r"data\.task\.tags=\['<think>', '</think>'\]"):
        WritingPrompts(path=write(tmp_path, rows())).bind(narrow)


# ---- Completions ---------------------------------------------------------------------------------

READ: list[tuple[str, str, str, bool, str | None]] = [
    ("a text", "Two words.", "Two words.", False, None),
    ("a plan", PLAN + "\nText.", "Text.", True, None),
    ("an empty span", "<think>\n\n</think>\n\nText.", "Text.", False, None),
    ("a tiny span", "<think>few</think>Text.", "Text.", False, None),
    ("blanks are no plan", "<think>f" + " " * 30 + "</think>Text.", "Text.", False, None),
    ("only a plan", PLAN, "", True, "empty"),
    ("unclosed", "<think>eight letters", "", False, "unclosed"),
    ("nested", "<think><think>eight letters</think></think>x", "", False, "nested"),
    ("late", "Text. " + PLAN, "", False, "late_span"),
    ("second", PLAN + "a" + PLAN, "", False, "second_span"),
    ("stray", "a</think>b", "", False, "stray_close"),
]


@pytest.mark.parametrize(
    ("name", "text", "content", "plan", "error"), READ, ids=[r[0] for r in READ]
)
def test_plans_are_read(
    task: WritingPrompts, name: str, text: str, content: str, plan: bool, error: str | None
) -> None:
    prompts = [task.prompt(record) for record in task.records("train")]
    done = say(task, text)
    read = task.read_plan(prompts[0], done)
    assert (read.content, read.has_plan, read.error) == (content, plan, error)
    for prompt, kind in zip(prompts, ("long", "short", "short"), strict=True):
        is_right = error is None and plan == (kind == "long")
        parts = task.verify(prompt, done)
        assert parts == {
            "reward": float(is_right),
            "mode": float(is_right),
            "plan": float(plan),
            "valid": float(error is None),
            "content_tokens": float(read.content_tokens),
        }
    turns, written = task.conversation(prompts[1], done)
    assert (turns, written) == ((("user", "A wish."),), content)
    assert len(task.conversation(prompts[2], done)[0]) == 3


def test_content_tokens_count_what_is_not_blank(task: WritingPrompts) -> None:
    prompt = task.prompt(task.records("train")[0])
    assert task.verify(prompt, say(task, PLAN + " ab  c\n"))["content_tokens"] == 3.0
    assert task.verify(prompt, say(task, "ab"))["content_tokens"] == 2.0


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.ERROR])
def test_what_did_not_end_does_not_parse(task: WritingPrompts, reason: FinishReason) -> None:
    prompt = task.prompt(task.records("train")[0])
    parts = task.verify(prompt, say(task, PLAN + "Text.", reason))
    assert (parts["reward"], parts["valid"], parts["mode"], parts["plan"]) == (0.0, 0.0, 0.0, 1.0)
    assert task.conversation(prompt, say(task, "Text.", reason))[1] == ""


def test_fewest_tokens_of_a_plan(task: WritingPrompts) -> None:
    for bound_of, plan in ((3, 1.0), (4, 0.0)):
        other = bound(task.path, min_plan_tokens=bound_of)
        prompt = other.prompt(other.records("train")[0])
        assert other.verify(prompt, say(other, "<think>few</think>x"))["plan"] == plan


@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("(plan)", "(end)")])
def test_prefixes_force_a_mode(task: WritingPrompts, tags: tuple[str, str]) -> None:
    other = bound(task.path, tags=tags)
    prompt = other.prompt(other.records("train")[0])
    assert other.render(other.plan_prefix("plan")) == tags[0]
    rest = say(other, f"eight letters{tags[1]}Text."), say(other, "Text.")
    for mode, done in zip(("plan", "direct"), rest, strict=True):
        ids = (*other.plan_prefix(mode), *done.token_ids)  # type: ignore[arg-type]
        read = other.read_plan(prompt, Completion(ids, (0.0,) * len(ids), FinishReason.STOP))
        assert (read.content, read.has_plan, read.error) == ("Text.", mode == "plan", None)
        assert read.plan_span[0] == 0 and read.plan_span[1] >= len(other.plan_prefix(mode)) - 2  # type: ignore[arg-type]


def test_reading_never_raises(task: WritingPrompts) -> None:
    rng = random.Random(0)
    prompts = [task.prompt(record) for record in task.records("train")]
    soup = ["<think>", "</think>", "x", " ", "\n", "eight letters", "\ud7ff", "\U0001f600", "<eos>"]
    odd = [-1, 10**6, 2**31, 2**63, -(2**70), None, "a", 1.5]
    seen = set()
    for number in range(1500):
        prompt, reason = rng.choice(prompts), rng.choice([FinishReason.STOP] * 5 + [*FinishReason])
        ids: list[Any] = [rng.randrange(259) for _ in range(rng.randrange(40))]
        if number % 3:
            text = "".join(rng.choice(soup) for _ in range(rng.randrange(9)))
            ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
        if number % 7 == 0:
            ids.insert(rng.randrange(len(ids) + 1), rng.choice(odd))
        done = Completion(tuple(ids), (), reason)
        read, parts = task.read_plan(prompt, done), task.verify(prompt, done)
        assert (read.content == "") == (read.error is not None) == (parts["valid"] == 0.0)
        assert parts["reward"] <= min(parts["mode"], parts["valid"])
        assert task.conversation(prompt, done)[1] == read.content
        seen.add(read.error)
    assert {None, "unfinished", "empty", "undecodable", "nested"} <= seen


def test_many_tags_are_read_quickly(task: WritingPrompts) -> None:
    prompt, started = task.prompt(task.records("train")[0]), time.perf_counter()
    for text in ("<think>" * 5000, "</think>" * 5000, PLAN * 2000, "<" * 40000):
        assert task.verify(prompt, say(task, text))["reward"] == 0.0
    assert time.perf_counter() - started < 10.0


def test_the_verifier_is_a_reward(task: WritingPrompts) -> None:
    prompts = [task.prompt(record) for record in task.records("train")[:2]]
    done = [say(task, PLAN + "Text."), say(task, PLAN + "Text.")]
    parts = VerifierReward()(Rollouts.from_groups(prompts, [[one] for one in done]))
    assert parts["reward"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="cannot compare two texts itself"):
        task.compare(Pair("x", "q", ("a", "b")))


# ---- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"min_plan_tokens": 0}, "data.task.min_plan_tokens=0"),
        ({"tags": ["<think>"]}, "data.task.tags=['<think>']"),
        ({"tags": "ab"}, "data.task.tags='ab'"),
        ({"tags": ["a", "a"]}, "data.task.tags=['a', 'a']"),
        ({"tags": ["<a>", "<a>b"]}, "neither of them part of the other"),
        ({"tags": ["<a> ", "b"]}, "data.task.tags="),
        ({"tags": ["", "b"]}, "data.task.tags="),
        ({"on_too_long": "crop"}, "data.task.on_too_long='crop'"),
        ({"columns": {"typ": "x"}}, "data.task.columns.typ: no such role; did you mean 'type'"),
        ({"path": ""}, "data.path is not set"),
    ],
)
def test_bad_option(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError) as error:
        WritingPrompts(**{"path": "a.jsonl", **options})
    assert fragment in str(error.value)


def test_options_are_known_by_name_and_type() -> None:
    node = {"_target_": "datamodules.tasks.writing_prompts.WritingPrompts", "path": "a.jsonl"}
    rest = {
        "tags": ["a", "b"],
        "system_prompt": None,
        "before": "",
        "on_bad_row": "skip",
        "seed": 1,
    }
    assert check_node("data.task", node | rest) == []
    assert "data.task.tags" in "".join(check_node("data.task", node | {"tags": 3}))
    [unknown] = check_node("data.task", node | {"min_plan_token": 3})
    assert "'min_plan_tokens'" in unknown
