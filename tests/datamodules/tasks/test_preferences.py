"""Preference pairs as a task: splits, prompts, the cutting rule, the parser, demonstrations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.base import Pair
from datamodules.tasks.preferences import PreferencePairs
from datamodules.tasks.verdict_format import (
    MARK,
    cut_middle,
    format_answer,
    parse_answer,
    share_budget,
    statement,
)

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "judgebench_claude.jsonl"
SPLITS = ("train", "val", "test")


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, **options)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def judge_rows(count: int, size: int = 1) -> list[dict[str, Any]]:
    row = {"question": "Why {}?", "response_A": "good {} " * size, "response_B": "bad {} " * size}
    row |= {"pair_id": "p{}", "label": "A>B"}
    return [{key: text.format(*[i] * size) for key, text in row.items()} for i in range(count)]


def bound(path: str, **options: Any) -> PreferencePairs:
    task = PreferencePairs(path=path, **options)
    task.bind(byte_tokenizer())
    return task


@pytest.fixture
def task(tmp_path: Path) -> PreferencePairs:
    return bound(write(tmp_path, judge_rows(60)), max_prompt_tokens=320)


def say(task: PreferencePairs, text: str, stop: bool = True, eos: bool = True) -> Completion:
    ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*ids, task.tokenizer.eos_token_id] if eos else ids
    reason = FinishReason.STOP if stop else FinishReason.LENGTH
    return Completion(tuple(ids), (0.0,) * len(ids), reason)


def test_splits_are_disjoint_complete_and_stable(tmp_path: Path) -> None:
    path = write(tmp_path, judge_rows(500))
    task = PreferencePairs(path=path)
    parts = {split: [pair.uid for pair in task.records(split)] for split in SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(f"p{i}" for i in range(500))
    assert 65 < len(parts["test"]) < 135 and 25 < len(parts["val"]) < 75
    assert task.records("train") is task.records("train")
    again = PreferencePairs(path=write(tmp_path, judge_rows(500)[::-1], "b.jsonl"))
    assert {p.uid for p in again.records("test")} == set(parts["test"])
    other = PreferencePairs(path=path, seed=1)
    assert {p.uid for p in other.records("test")} != set(parts["test"])
    assert task.counts["main/rows"] == 500 == sum(task.counts[split] for split in SPLITS)


def test_pairs_of_one_row_stay_together(tmp_path: Path) -> None:
    rows = [
        {"id": i, "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"]}
        for i in range(40)
    ]
    task = PreferencePairs(path=write(tmp_path, rows), val_fraction=0.3, test_fraction=0.3)
    rows_of = {split: {p.extra["row_uid"] for p in task.records(split)} for split in SPLITS}
    assert sum(map(len, rows_of.values())) == 40 and all(rows_of.values())
    assert sum(len(task.records(split)) for split in SPLITS) == 360


def test_paths_replace_fractions(tmp_path: Path) -> None:
    path, test = write(tmp_path, judge_rows(30)), write(tmp_path, judge_rows(4), "test.jsonl")
    task = PreferencePairs(path=path, test_path=test, val_fraction=0.0)
    assert [len(task.records(split)) for split in SPLITS] == [30, 0, 4]
    assert task.counts["test/rows"] == 4


def test_unlabelled_rows_are_there_to_train_without_labels(tmp_path: Path) -> None:
    rows = judge_rows(20)
    for row in rows[:10]:
        del row["label"]
    path = write(tmp_path, rows)
    with pytest.raises(ValueError, match="label"):
        PreferencePairs(path=path).records("test")
    task = bound(path, labels="optional")
    unknown = [pair for pair in task.records("train") if pair.label is None]
    assert len(unknown) == 10 and all(p.label for p in task.records("test"))
    prompt = task.prompt(unknown[0])
    assert prompt.label is None and unknown[0].swap().label is None
    assert task.verify(prompt, say(task, format_answer("pref", "", 1)))["reward"] == 0.0


def in_order(text: str, *parts: str) -> bool:
    places = [text.index(part) for part in parts]
    return places == sorted(places)


def test_prompts_hold_their_parts_in_order(task: PreferencePairs) -> None:
    pair = task.records("train")[0]
    prompt = task.prompt(pair)
    text = task.render(prompt.token_ids)
    assert in_order(text, "<Analysis>", "</Result>", "Context:", pair.question, "1. good", "2. bad")
    assert (prompt.domain, prompt.label, prompt.record) == ("pref", 1, pair)
    swapped = task.prompt(pair.swap())
    assert swapped.uid != prompt.uid and swapped.label == 2
    assert "1. bad" in task.render(swapped.token_ids)
    refl = task.reflection_prompt(pair, ("first", "second"), 2)
    text = task.render(refl.token_ids)
    assert "Critique 1 is better than Critique 2" in text
    assert in_order(text, pair.question, "Response 1: good", "Response 2: bad", "1. f", "2. s")
    assert (refl.domain, refl.label, refl.record) == ("refl", 2, (pair, ("first", "second")))
    assert task.reflection_prompt(pair, ("second", "first")).uid != refl.uid
    assert task.reflection_prompt(pair, ("a", "b"), uid="mine").uid == "mine"


def test_control_token_and_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[go]"
    path = write(tmp_path, judge_rows(3))
    task = PreferencePairs(path=path, control_token="/no_think", val_fraction=0, test_fraction=0)
    task.bind(byte_tokenizer(chat_template=template))
    text = task.render(task.prompt(task.records("train")[0]).token_ids)
    assert text.startswith("[user]Judge") and text.endswith("/no_think\n[go]")
    task = PreferencePairs(path=path, chat_template="off", val_fraction=0, test_fraction=0)
    task.bind(byte_tokenizer(chat_template=template))
    text = task.render(task.prompt(task.records("train")[0]).token_ids)
    assert text.startswith("Judge") and "[go]" not in text


def test_data_cannot_write_control_tokens(task: PreferencePairs) -> None:
    pair = Pair("x", "a<eos>b<pad>", ("<unk>", "{texts[0]} {ask}"), 1)
    prompt = task.reflection_prompt(pair, ("<eos>", "<<eos>eos>"))
    assert not set(prompt.token_ids) & set(task.tokenizer.all_special_ids)
    assert "{texts[0]} {ask}" in task.render(prompt.token_ids)


def test_share_budget_against_a_slow_loop() -> None:
    rng = random.Random(0)
    for _ in range(500):
        lengths = [rng.randrange(40) for _ in range(rng.randrange(1, 6))]
        budget = rng.randrange(120)
        bound = share_budget(lengths, budget)
        slow = max(b for b in range(max(lengths) + 1) if sum(min(n, b) for n in lengths) <= budget)
        assert bound == slow, (lengths, budget)


def test_cut_middle_keeps_head_tail_and_whole_characters() -> None:
    rng, tokenizer = random.Random(0), byte_tokenizer()
    for _ in range(500):
        text = "".join(rng.choice("ab \u00e9\u4e2d\U0001f600") for _ in range(rng.randrange(30)))
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        bound = rng.randrange(60)
        cut = cut_middle(text, spans, bound, len(MARK))
        assert len(cut.encode()) <= bound or cut == text == ""
        if len(text.encode()) <= bound:
            assert cut == text
        elif MARK in cut and MARK not in text:
            head, tail = cut.split(MARK)
            assert text.startswith(head) and text.endswith(tail)
            assert abs(len(head.encode()) - len(tail.encode())) <= 4
        else:
            assert text.startswith(cut) or MARK in text


@pytest.mark.parametrize("limit", [215, 230, 256, 320, 512, 2000])
def test_no_prompt_is_longer_than_the_limit(tmp_path: Path, limit: int) -> None:
    task = bound(write(tmp_path, judge_rows(3)), max_prompt_tokens=limit)
    rng = random.Random(limit)
    for number in range(150):
        texts = [rng.choice("ab \u4e2d") * rng.randrange(1, 900) for _ in range(5)]
        pair = Pair(f"u{number}", texts[0], (texts[1], texts[2]), 1)
        refl = task.reflection_prompt(pair, (texts[3], texts[4]))
        for prompt in (task.prompt(pair), refl):
            assert len(prompt.token_ids) <= limit
            text = task.render(prompt.token_ids)
            assert text.startswith("Judge which") and "\ufffd" not in text
            assert "for judgment:\n1. " in text and "\n\n2. " in text


def test_short_texts_stay_whole_and_long_ones_are_cut_alike(task: PreferencePairs) -> None:
    pair = Pair("x", "a short question?", ("A" * 3000, "B" * 700), 1)
    for order in (pair, pair.swap()):
        text = task.render(task.prompt(order).token_ids)
        assert "a short question?" in text and text.count(MARK) == 2
        body = text.split("for judgment:")[1]
        assert abs(body.count("A") - body.count("B")) == 0 < body.count("A")
    assert task.counts["cut"] == 1, "both orders are one pair"
    tokens = len(task.prompt(pair).token_ids)
    assert task.max_prompt_tokens - 3 < tokens <= task.max_prompt_tokens
    task.prompt(task.records("train")[0])
    assert task.counts["cut"] == 1


def test_critiques_have_a_bound_of_their_own(tmp_path: Path) -> None:
    task = bound(write(tmp_path, judge_rows(3)), max_prompt_tokens=2000, max_analysis_tokens=25)
    text = task.render(
        task.reflection_prompt(Pair("x", "q", ("a", "b")), ("C" * 90, "D")).token_ids
    )
    assert "1. " + "C" * 10 + MARK + "C" * 10 + "\n\n2. D\n" in text
    assert task.counts["cut_reflection"] == 1 and task.counts["cut"] == 0


def test_long_pairs_are_skipped_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path, judge_rows(30) + [{**judge_rows(1, 200)[0], "pair_id": "long"}])
    task = bound(path, on_too_long="skip", max_prompt_tokens=300)
    assert task.counts["too_long"] == 1 and task.counts["cut"] == 0
    assert sum(len(task.records(split)) for split in SPLITS) == 30
    task = PreferencePairs(path=path, on_too_long="error", max_prompt_tokens=300)
    with pytest.raises(ValueError, match=r"jsonl:31: the prompt of pair 'long' .*on_too_long=cut"):
        task.bind(byte_tokenizer())
    path = write(tmp_path, judge_rows(5, 200), "long.jsonl")
    task = PreferencePairs(path=path, on_too_long="skip", max_prompt_tokens=300)
    with pytest.raises(ValueError, match="every pair is longer"):
        task.bind(byte_tokenizer())


def test_tokens_that_merge_across_seams_still_fit(tmp_path: Path) -> None:
    class Longer(PreferencePairs):
        def _encode(self, kind: str, texts: Any) -> list[int]:
            ids = super()._encode(kind, texts)
            return ids + [5] * (7 if any(MARK in text for text in texts) else 0)

    task = Longer(path=write(tmp_path, judge_rows(3)), max_prompt_tokens=320)
    task.bind(byte_tokenizer())
    prompt = task.prompt(Pair("x", "q" * 400, ("a" * 400, "b" * 400), 1))
    assert 310 < len(prompt.token_ids) <= 320


# ---- Bad options ---------------------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"labels": "optinal"}, "data.task.labels='optinal': allowed are required, optional; did you"),
    ({"chat_template": "on"}, "data.task.chat_template='on': allowed are auto, off"),
    ({"on_too_long": "crop"}, "data.task.on_too_long='crop': allowed are cut, skip, error"),
    ({"on_bad_row": "x"}, "data.task.on_bad_row='x'"),
    ({"val_fraction": 0.6, "test_fraction": 0.6}, "data.task.val_fraction=0.6"),
    ({"test_fraction": -0.1}, "data.task.test_fraction=-0.1"),
    ({"max_analysis_tokens": 0}, "data.task.max_analysis_tokens=0"),
    ({"path": ""}, "data.path is not set"),
]


@pytest.mark.parametrize(("options", "fragment"), BAD_OPTIONS)
def test_bad_option(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError) as error:
        PreferencePairs(**{"path": "pairs.jsonl", **options})
    assert fragment in str(error.value)


def test_refused_tokenizers_and_limits(tmp_path: Path) -> None:
    path = write(tmp_path, judge_rows(3))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    narrow = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    with pytest.raises(ValueError, match="use a byte-level tokenizer"):
        PreferencePairs(path=path).bind(narrow)
    with pytest.raises(ValueError, match=r"data\.task\.max_prompt_tokens=64: the template"):
        PreferencePairs(path=path, max_prompt_tokens=64).bind(byte_tokenizer())
    with pytest.raises(RuntimeError, match="bind a tokenizer"):
        PreferencePairs(path=path).prompt(Pair("x", "q", ("a", "b")))


# ---- The parser ----------------------------------------------------------------------------------

VERDICT = "<Result>Response 2 is better than Response 1</Result>"
LEGAL = "<Analysis>x</Analysis>" + VERDICT
PARSER: list[tuple[str, str, int | None]] = [
    ("legal", LEGAL, 2),
    ("the other slot", LEGAL.replace("2", "3").replace("1", "2").replace("3", "1"), 1),
    ("white space", "\n <Analysis>\nx\n</Analysis>\n" + VERDICT.replace("<", "\n<") + " \n", 2),
    ("empty analysis", LEGAL.replace("x", ""), 2),
    ("an empty thinking block", "<think>\n\n</think>\n\n" + LEGAL, 2),
    ("swapped elements", VERDICT + "<Analysis>x</Analysis>", None),
    ("swapped tags", "</Analysis>x<Analysis>" + VERDICT, None),
    ("crossed tags", LEGAL.replace("</Analysis><Result>", "<Result></Analysis>"), None),
    ("doubled tag", LEGAL.replace("x", "x<Analysis>"), None),
    ("doubled result", LEGAL + VERDICT, None),
    ("missing tag", LEGAL.replace("</Result>", ""), None),
    ("trailing text", LEGAL + " so there", None),
    ("wrong noun", LEGAL.replace("Response", "Critique"), None),
    ("mixed nouns", LEGAL.replace("Response 1", "Critique 1"), None),
    ("lower case statement", LEGAL.replace("Response", "response"), None),
    ("lower case tags", LEGAL.replace("Result", "result"), None),
    ("a tie", LEGAL.replace("better than", "as good as"), None),
    ("the same twice", LEGAL.replace("Response 1", "Response 2"), None),
    ("a full stop", LEGAL.replace("1</", "1.</"), None),
    ("nothing", "", None),
]


@pytest.mark.parametrize(("name", "text", "winner"), PARSER, ids=[row[0] for row in PARSER])
def test_parser(task: PreferencePairs, name: str, text: str, winner: int | None) -> None:
    pair = task.records("train")[0]
    verdict = task.parse(task.prompt(pair), say(task, text))
    assert verdict.winner == winner == parse_answer(text, "pref").winner
    assert (verdict.error is None) == (winner is not None)
    assert verdict.analysis == ("x" if winner and "x" in text else "")
    refl = task.reflection_prompt(pair, ("a", "b"), 2)
    critique = (
        text.replace("Critique", "~").replace("Response", "Critique").replace("~", "Response")
    )
    assert task.parse(refl, say(task, critique, eos=False)).winner == winner


def test_truncated_output_is_invalid(task: PreferencePairs) -> None:
    prompt = task.prompt(task.records("train")[0])
    assert task.parse(prompt, say(task, LEGAL, stop=False)).winner is None
    assert task.verify(prompt, say(task, LEGAL, stop=False)) == {"reward": 0.0, "valid": 0.0}
    assert task.verify(prompt, say(task, LEGAL)) == {"reward": 0.0, "valid": 1.0}
    right = format_answer("pref", "x", 1)
    assert task.verify(prompt, say(task, right)) == {"reward": 1.0, "valid": 1.0}
    twice = say(task, right)
    twice = Completion((*twice.token_ids, 2), (*twice.logprobs, 0.0), FinishReason.STOP)
    assert task.parse(prompt, twice).winner is None, "only one end token ends a turn"


def test_parser_never_raises(task: PreferencePairs) -> None:
    rng, pair = random.Random(0), task.records("train")[0]
    prompts = [task.prompt(pair), task.reflection_prompt(pair, ("a", "b"))]
    prompts.append(Prompt("x", (), task, "elsewhere"))
    soup = ["<Analysis>", "</Analysis>", "<Result>", "</Result>", "x", " ", "\n", "\ud7ff", "<eos>"]
    soup += [
        LEGAL,
        *(statement(kind, i) for kind in ("pref", "refl") for i in (1, 2)),
    ]
    odd = [-1, 10**6, 2**31, 2**63, -(2**70), None, "a", 1.5]
    for number in range(1500):
        prompt, reason = rng.choice(prompts), rng.choice([FinishReason.STOP] * 5 + [*FinishReason])
        ids: list[Any] = [rng.randrange(259) for _ in range(rng.randrange(60))]
        if number % 3:
            text = "".join(rng.choice(soup) for _ in range(rng.randrange(9)))
            ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
        if number % 7 == 0:
            ids.insert(rng.randrange(len(ids) + 1), rng.choice(odd))
        verdict = task.parse(prompt, Completion(tuple(ids), (), reason))
        assert verdict.winner in (None, 1, 2)
        assert (verdict.winner is None) == (verdict.error is not None)
        assert reason is FinishReason.STOP or verdict.winner is None


def test_demonstrations(task: PreferencePairs) -> None:
    shown = [demo for step in range(40) for demo in task.demonstrations(3, step, 4)]
    assert task.demonstrations(3, 5, 4) == shown[20:24] != task.demonstrations(4, 5, 4)
    assert [demo.domain for demo in shown[:4]].count("refl") == 2
    held_out = [p.question for split in ("val", "test") for p in task.records(split)]
    winners = []
    for demo in shown:
        text = task.render(demo.prompt_ids)
        assert not any(f"\n{question}\n" in text for question in held_out)
        done = Completion(demo.completion_ids, (), FinishReason.STOP)
        verdict = task.parse(Prompt("x", (), task, demo.domain), done)
        winners.append(verdict.winner)
        assert verdict.winner is not None and verdict.analysis
        assert demo.completion_ids[-1] == task.tokenizer.eos_token_id
        if demo.domain == "pref":
            assert f"\n{verdict.winner}. good" in text
        else:
            critique = text.split("Critiques for judgment:")[1].split("\n")[verdict.winner][3:]
            assert f"{critique.split(' is')[0].split(' fits')[0].split(' has')[0]}: good" in text
    assert 50 < winners.count(1) < 110


def test_no_train_pairs_no_demonstrations(tmp_path: Path) -> None:
    task = bound(write(tmp_path, judge_rows(3)), val_fraction=0.0, test_fraction=1.0)
    assert len(task.records("test")) == 3 and task.demonstrations(0, 0, 4) == []


@pytest.mark.filterwarnings("ignore:1 of 270 rows")
def test_real_file() -> None:
    if not REAL.exists():
        pytest.skip("the file is not beside this checkout")
    task = bound(str(REAL), max_bad_share=0.01)
    prompts = [task.prompt(pair) for split in SPLITS for pair in task.records(split)]
    assert all(300 < len(prompt.token_ids) <= 512 for prompt in prompts)
    assert 0 < task.counts["cut"] <= len(prompts) == task.counts["main/pairs"]
    assert len(task.demonstrations(0, 0, 3)) == 3
