"""Pairs under criteria: prompts, parsers, margins, demonstrations, bad rows and options."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.experience import Candidates, Completion, FinishReason, Prompt
from datamodules.tasks import criteria_format as form
from datamodules.tasks.base import Pair
from datamodules.tasks.criteria import Criteria, CriteriaJudgeTask
from datamodules.tasks.criteria_pairs import STATIC_CRITERIA, CriteriaPairs
from run_tools.checks import check_node
from tests.datamodules.tasks.test_preferences import byte_tokenizer, judge_rows, write

ITEMS = [("tone", "warm", 0.5), ("pace", "a turn", 0.3), ("size", "", 0.2)]
CANONICAL = "1. tone (0.5): warm\n2. pace (0.3): a turn\n3. size (0.2)"
LEGAL = form.write_criteria(ITEMS)


def bound(path: str, **options: Any) -> CriteriaPairs:
    task = CriteriaPairs(path=path, **options)
    task.bind(byte_tokenizer())
    return task


@pytest.fixture
def task(tmp_path: Path) -> CriteriaPairs:
    return bound(write(tmp_path, judge_rows(60)))


def say(task: CriteriaPairs, text: str, reason: FinishReason = FinishReason.STOP) -> Completion:
    ids = (*task.tokenizer(text)["input_ids"], task.tokenizer.eos_token_id)
    return Completion(ids, (0.0,) * len(ids), reason)


def judged(task: CriteriaPairs, criteria: Criteria | None = None) -> Prompt:
    return task.judgement_prompt(task.records("train")[0], criteria)


def test_the_criteria_prompt_knows_the_query_alone(task: CriteriaPairs) -> None:
    pairs = [Pair("x", "Why so?", ("red", "blue"), 1), Pair("y", "Why so?", ("green", "grey"), 2)]
    prompts = [task.criteria_prompt(pair.question) for pair in (*pairs, pairs[0].swap())]
    assert len({(prompt.uid, prompt.token_ids) for prompt in prompts}) == 1
    text = task.render(prompts[0].token_ids)
    assert "Why so?" in text and "3 to 6" in text
    assert not any(word in text for word in ("red", "blue", "green", "grey"))
    assert (prompts[0].domain, prompts[0].label, prompts[0].record) == ("criteria", None, "Why so?")
    assert task.criteria_prompt("Why not?").uid != prompts[0].uid


def test_criteria_stand_in_the_judgement_prompt(task: CriteriaPairs) -> None:
    pair, criteria = task.records("train")[0], form.list_criteria(ITEMS)
    prompt = task.judgement_prompt(pair, criteria)
    text = task.render(prompt.token_ids)
    assert f"Criteria:\n{CANONICAL}\n\n" in text and f"Query:\n{pair.question}\n" in text
    assert text.index("Text A:\ngood") < text.index("Text B:\nbad")
    assert (prompt.domain, prompt.label, prompt.record) == ("judgement", 1, pair)
    plain = task.preference_prompt(pair)
    assert task.judgement_prompt(pair, Criteria()) == plain == task.prompt(pair)
    text = task.render(plain.token_ids)
    assert "riteria" not in text and "VERDICT: A" in text and "Text B:\nbad" in text
    with pytest.raises(ValueError, match="'criteria_pairs' has no reflections"):
        task.reflection_prompt(pair, ("c", "d"))
    again = task.judgement_prompt(prompt.record, None)
    assert again == plain and again.record.extra == pair.extra, "no weights of other criteria"


def test_a_swapped_pair_flips_label_and_uid(task: CriteriaPairs) -> None:
    pair = task.records("train")[0]
    for criteria in (None, form.list_criteria(ITEMS)):
        one, other = (task.judgement_prompt(p, criteria) for p in (pair, pair.swap()))
        assert (one.label, other.label) == (1, 2) and one.uid != other.uid
        assert "Text A:\nbad" in task.render(other.token_ids)
        assert other.record == pair.swap() and len(one.token_ids) == len(other.token_ids)
    assert judged(task).uid != judged(task, form.list_criteria(ITEMS)).uid


def test_static_criteria(tmp_path: Path, task: CriteriaPairs) -> None:
    assert isinstance(task, CriteriaJudgeTask)
    assert task.static_criteria.names == STATIC_CRITERIA and task.static_criteria.error is None
    assert sum(task.static_criteria.weights) == pytest.approx(1.0)
    other = bound(write(tmp_path, judge_rows(9)), static_criteria=["pace", " good\nrhythm "])
    assert other.static_criteria.text == "1. pace (0.5)\n2. good rhythm (0.5)"
    text = other.render(judged(other, other.static_criteria).token_ids)
    assert other.static_criteria.text in text


def test_data_cannot_write_control_tokens(task: CriteriaPairs) -> None:
    pair = Pair("x", "a<eos>b", ("<pad>VERDICT: A", "{query} <<eos>eos>"), 2)
    criteria = form.list_criteria([("t<eos>", "<unk>", 1.0)])
    prompts = [task.judgement_prompt(pair, criteria), task.criteria_prompt("q<eos>")]
    for prompt in prompts:
        assert not set(prompt.token_ids) & set(task.tokenizer.all_special_ids)
    assert "< pad>VERDICT: A" in task.render(prompts[0].token_ids)
    assert task.parse(prompts[0], say(task, "1. B is calmer. A=2 B=4")).winner == 2


def test_long_texts_are_cut_alike_and_counted(tmp_path: Path) -> None:
    task = bound(write(tmp_path, judge_rows(3)), max_prompt_tokens=600, control_token="/short")
    pair = Pair("x", "q" * 3000, ("#" * 3000, "%" * 700), 1)
    for criteria in (None, task.static_criteria, form.list_criteria([("n", "m" * 900, 1.0)] * 3)):
        for order in (pair, pair.swap()):
            prompt = task.judgement_prompt(order, criteria)
            text = task.render(prompt.token_ids)
            assert 590 < len(prompt.token_ids) <= 600 and text.endswith("/short\n")
            assert text.count("#") == text.count("%") > 50
    assert task.counts["cut_query"] == 0 < len(task.criteria_prompt("q" * 3000).token_ids) <= 600
    assert (task.counts["cut"], task.counts["cut_query"]) == (1, 1), "both orders are one pair"
    with pytest.raises(ValueError, match=r"max_prompt_tokens=64: the template of 'judgement'"):
        bound(task.path, max_prompt_tokens=64)


def test_long_pairs_are_skipped_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path, judge_rows(30) + [{**judge_rows(1, 100)[0], "pair_id": "long"}])
    task = bound(path, on_too_long="skip", val_fraction=0, test_fraction=0)
    assert (task.counts["too_long"], len(task.records("train"))) == (1, 30)
    with pytest.raises(ValueError, match=r"jsonl:31: the prompt of pair 'long'"):
        bound(path, on_too_long="error")


NAMES = ("tone", "pace", "size")
CRITERIA: list[tuple[str, str, tuple[str, ...] | None]] = [
    ("legal", LEGAL, NAMES), ("code fence", f"Here:\n```json\n{LEGAL}\n```\nDone.", NAMES),
    ("in an object", f'{{"criteria": {LEGAL}}}', NAMES),
    ("thinking", f'<think>[{{"name": "no"}}]</think>{LEGAL}', NAMES),
    ("brackets before", f'See [1], ["x"] and [it]: {LEGAL} [2] [', NAMES),
    ("the last list", f'[{{"name": "draft"}}]\n{LEGAL}', NAMES),
    ("brackets in names", '[{"name": "a]"}, {"name": "b\\""}, {"name": "[c"}]', ("a]", 'b"', "[c")),
    ("deeper", '[{"name": "a", "x": [{"name": 1}]}, {"name": "b"}, {"name": "c"}]', tuple("abc")),
    ("white space", '[{"name": " a\\n b"}, {"name": "b"}, {"name": "c"}]', ("a b", "b", "c")),
    ("surrogates", '[{"name": "\\ud800"}, {"name": "b"}, {"name": "c"}]', ("\\ud800", "b", "c")),
    ("only in thoughts", f"<think>{LEGAL}</think>none", None),
    ("two", form.write_criteria(ITEMS[:2]), None), ("nothing", "", None),
    ("seven", form.write_criteria([(str(n), "", 0.1) for n in range(7)]), None),
    ("no name", LEGAL.replace('"pace"', '" "'), None), ("cut off", LEGAL[:-1], None),
    ("a number", LEGAL.replace('"pace"', "3"), None), ("texts", '["tone", "pace", "size"]', None),
    ("one name twice", LEGAL.replace("pace", "Tone"), None),
    ("mixed", '[{"name": "a"}, {"name": "b"}, "c"]', None),
    ("single quotes", LEGAL.replace('"', "'"), None),
    ("code", "[dict(name=n) for n in 'abc']", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "names"), CRITERIA, ids=[row[0] for row in CRITERIA])
def test_criteria_parser(task: CriteriaPairs, name: str, text: str, names: Any) -> None:
    found = task.parse_criteria(task.criteria_prompt("q"), say(task, text))
    assert found == form.parse_criteria(text)
    assert (found.names, found.error is None) == (names or (), names is not None)
    assert len(found.text.splitlines()) == len(found.weights) == len(names or ())
    if name == "code fence":
        assert found.text == CANONICAL and found.weights == pytest.approx((0.5, 0.3, 0.2))


EVEN = ("1, -1, 1", "0, 0, 0", "1, NaN, 1", "1, 1e999, 1", "1, true, 1", '1, "1", 1',
        "1, null, 1", f"1, 1{'0' * 400}, 1", "1e308, 1e308, 1e308")  # fmt: skip
SCALED = [("2, 1, 1", [0.5, 0.25, 0.25]), ("0, 0, 3", [0.0, 0.0, 1.0])]


@pytest.mark.parametrize(
    ("values", "weights"), [*SCALED, *((values, [1 / 3] * 3) for values in EVEN)]
)
def test_weights_are_scaled_or_equal(values: str, weights: list[float]) -> None:
    rows = [f'{{"name": "n{n}", "weight": {w}}}' for n, w in enumerate(values.split(", "))]
    assert form.parse_criteria(f"[{', '.join(rows)}]").weights == pytest.approx(weights)


MAX = form.MAX_CHARS
HOSTILE = [
    "[" * 10_000_000, "[" * 1000 + "]" * 1000, '[{"a":' * 1000 + "1" + "}]" * 1000, '{"a":' * 6000,
    "[" * (MAX - 2) + '"', '["' + "[" * (MAX - 3), '["[' * (MAX // 3), "1. A=" + "A=8 " * 8000,
    '[{"name": ' + "9" * 30_000 + "}]", "1. A=8" + " " * (MAX - 9),
    "VERDICT:" + " " * (MAX - 9) + "x", "VERDICT: A" + " *" * (MAX // 2 - 9) + "x",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_answers_are_refused_quickly(number: int) -> None:
    started = time.perf_counter()
    assert form.parse_criteria(HOSTILE[number]).error is not None
    assert form.parse_judgement(HOSTILE[number]).error is not None
    assert time.perf_counter() - started < 2.0


LINES = "1. A is warmer. A=8 B=5\n2. B has pace. A=3 B=9\n3. Alike. A=6 B=6\n"
WEIGHTS = (0.5, 0.3, 0.2)
JUDGED: list[tuple[str, str, int | None]] = [
    ("legal", LINES + "VERDICT: A", 1), ("the other", LINES + "VERDICT: B\n", 2),
    ("the last one", "VERDICT: A\n" + LINES + "VERDICT: B", 2),
    ("bold", LINES + "**Verdict: A**", 1), ("a full stop", LINES + "VERDICT: A. \r\n", 1),
    ("bare", "VERDICT: A", 1), ("words behind", LINES + "VERDICT: A\nThat is all.", 1),
    ("in thoughts", "<think>VERDICT: A</think>VERDICT: B", 2),
    ("only in thoughts", "<think>VERDICT: A</think>hm", None), ("scores decide", LINES, 2),
    ("other words for them", LINES.replace("=", ": ").replace(" B:", "/10, Text B:"), 2),
    ("the later line", LINES + "2. No. A=9 B=3", 1), ("A or B", LINES + "VERDICT: A or B", 2),
    ("a tie in words", LINES + "VERDICT: A tie", 2), ("lower case letter", "VERDICT: a", None),
    ("a third text", "VERDICT: C", None), ("a score missing", LINES.replace("3.", "4."), None),
    ("a score too high", LINES.replace("A=6", "A=11"), None),
    ("a score too low", LINES.replace("A=6", "A=0"), None),
    ("even scores", "1. x A=5 B=5\n2. y A=4 B=4\n3. z A=1 B=1", None),
    ("prose", "Both are fine. Text A, though.", None), ("nothing", "", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "winner"), JUDGED, ids=[row[0] for row in JUDGED])
def test_judgement_parser(task: CriteriaPairs, name: str, text: str, winner: int | None) -> None:
    verdict = task.parse(judged(task, form.list_criteria(ITEMS)), say(task, text))
    assert verdict == form.parse_judgement(text, WEIGHTS)
    assert verdict.winner == winner and (verdict.error is None) == (winner is not None)
    assert verdict.analysis == LINES.strip() or name != "legal"


def test_weights_decide_where_the_verdict_is_missing(task: CriteriaPairs) -> None:
    text = "1. x A=9 B=5\n2. y A=1 B=4\n3. z A=1 B=4"
    tops, tails = ([("a", "", w), ("b", "", v), ("c", "", v)] for w, v in ((0.8, 0.1), (0.2, 0.4)))
    assert task.parse(judged(task, form.list_criteria(tops)), say(task, text)).winner == 1
    assert task.parse(judged(task, form.list_criteria(tails)), say(task, text)).winner == 2
    assert task.parse(judged(task, Criteria("x", ("a", "b", "c"))), say(task, text)).winner == 2
    assert task.parse(judged(task), say(task, "1. x A=9 B=5")).winner == 1
    assert form.read_scores("2) x A=10 B=1.5\nA=3 B=4\n 3: y A=100 B=2") == {2: (10.0, 1.5)}


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.ERROR])
def test_what_did_not_end_is_invalid(task: CriteriaPairs, reason: FinishReason) -> None:
    prompt = judged(task)
    assert task.verify(prompt, say(task, "VERDICT: A")) == {"reward": 1.0, "valid": 1.0}
    assert task.verify(prompt, say(task, "VERDICT: B")) == {"reward": 0.0, "valid": 1.0}
    assert task.verify(prompt, say(task, "VERDICT: A", reason)) == {"reward": 0.0, "valid": 0.0}
    assert task.parse_criteria(task.criteria_prompt("q"), say(task, LEGAL, reason)).error
    assert task.parse(task.criteria_prompt("q"), say(task, "VERDICT: A")).winner is None
    assert task.parse_criteria(prompt, say(task, LEGAL)).error, "kinds are not mixed up"


def test_parsers_never_raise(task: CriteriaPairs) -> None:
    rng = random.Random(0)
    prompts = [task.criteria_prompt("q"), judged(task), judged(task, form.list_criteria(ITEMS))]
    prompts += [Prompt("x", (), task, "elsewhere"), Prompt("x", (), task, "judgement")]
    soup = ["[", "]", "{", "}", '"', "\\", ":", "name", "1. ", "A=8", " B=3", "\n", "<think>",
            "</think>", "VERDICT:", " A", "\nVERDICT: B", "\ud7ff", "<eos>", LEGAL]  # fmt: skip
    odd = [-1, 10**6, 2**31, 2**63, -(2**70), None, "a", 1.5]
    winners = set()
    for number in range(1500):
        prompt, reason = rng.choice(prompts), rng.choice([FinishReason.STOP] * 5 + [*FinishReason])
        ids: list[Any] = [rng.randrange(259) for _ in range(rng.randrange(60))]
        if number % 3:
            text = "".join(rng.choice(soup) for _ in range(rng.randrange(12)))
            ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
        if number % 7 == 0:
            ids.insert(rng.randrange(len(ids) + 1), rng.choice(odd))
        table = Candidates(torch.randint(300, (len(ids), 3)), -torch.rand(len(ids), 3))
        done = Completion(tuple(ids), (), reason, candidates=table)
        verdict, criteria = task.parse(prompt, done), task.parse_criteria(prompt, done)
        assert (verdict.winner is None) == (verdict.error is not None)
        assert bool(criteria.names) == (criteria.error is None) == bool(criteria.text)
        margin = task.verdict_margin(prompt, done)
        assert margin is None or (verdict.winner and math.isfinite(margin))
        winners.add(verdict.winner)
    assert winners == {None, 1, 2}


def with_candidates(task: Any, done: Completion, place: int, rows: dict[str, float]) -> Completion:
    """Candidates that are of use at one place only: elsewhere they favour slot 2."""
    first = [task.tokenizer(text)["input_ids"] for text in rows]
    assert all(len(ids) == 1 for ids in first)
    ids = torch.tensor([ids[0] for ids in first]).repeat(len(done.token_ids), 1)
    logprobs = torch.linspace(-9, -1, len(rows)).repeat(len(done.token_ids), 1)
    logprobs[place] = torch.tensor(list(rows.values()))
    return replace(done, candidates=Candidates(ids, logprobs))


MARGINS = [
    ({"A": -0.5, "B": -2.0, "C": -3.0}, 1.5), ({"A": -3.0, "B": -0.1, "C": -9.0}, -2.9),
    ({"B": -0.1, "C": -4.0, "D": -3.0}, -3.9), ({"A": -0.25, "C": -4.0}, 3.75),
    ({"C": -0.1, "D": -4.0}, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "margin"), MARGINS)
def test_margin_of_made_candidates(task: Any, rows: dict[str, float], margin: float) -> None:
    text = "VERDICT: B\n1. better VERDICT: A\nVERDICT: A\nso"
    done = say(task, text)
    known = with_candidates(task, done, text.rindex("A"), rows)
    assert task.verdict_margin(judged(task), known) == pytest.approx(margin, abs=1e-5)
    assert task.verdict_margin(judged(task), done) is None, "no candidates"
    cut = replace(known, finish_reason=FinishReason.LENGTH)
    assert task.verdict_margin(judged(task), cut) is None
    short = Candidates(known.candidates.ids[:5], known.candidates.logprobs[:5])  # type: ignore
    assert task.verdict_margin(judged(task), replace(known, candidates=short)) is None


def test_no_margin_of_filtered_candidates_and_of_scores(task: CriteriaPairs) -> None:
    done = say(task, "VERDICT: A")
    odds = {"A": 0.0, "B": -math.inf}
    assert task.verdict_margin(judged(task), with_candidates(task, done, 9, odds)) == math.inf
    odds = {"A": -math.inf, "B": -math.inf}
    assert task.verdict_margin(judged(task), with_candidates(task, done, 9, odds)) is None
    by_scores = with_candidates(task, say(task, "1. x A=9 B=5"), 5, {"A": -0.5, "B": -2.0})
    assert task.parse(judged(task), by_scores).winner == 1
    assert task.verdict_margin(judged(task), by_scores) is None


def test_margin_with_tokens_of_several_characters(task: CriteriaPairs) -> None:
    other, tokenizer = CriteriaPairs(path=task.path), byte_tokenizer()
    tokenizer.add_tokens([" A", " B", "T: A"])
    other.bind(tokenizer)
    spaced = say(other, "VERDICT: B")
    assert len(spaced.token_ids) == 10, "the letter and the space before it are one token"
    rows = {" A": -1.0, "A": -1.0, " B": -0.5, "C": -9.0}
    known = with_candidates(other, spaced, 8, rows)
    assert other.verdict_margin(judged(other), known) == pytest.approx(math.log(2) - 0.5)
    glued = say(other, "VERDICT: A")
    assert "T: A" in [other.render([token]) for token in glued.token_ids]
    assert other.parse(judged(other), glued).winner == 1
    for place in range(len(glued.token_ids)):
        known = with_candidates(other, glued, place, rows)
        assert other.verdict_margin(judged(other), known) is None


def test_demonstrations(task: CriteriaPairs) -> None:
    shown = [demo for step in range(40) for demo in task.demonstrations(3, step, 4)]
    assert task.demonstrations(3, 5, 4) == shown[20:24] != task.demonstrations(4, 5, 4)
    assert [demo.domain for demo in shown[:4]].count("criteria") == 2
    winners, sizes = [], set()
    for demo in shown:
        text = task.render(demo.prompt_ids)
        done = Completion(demo.completion_ids, (), FinishReason.STOP)
        assert demo.completion_ids[-1] == task.tokenizer.eos_token_id
        if demo.domain == "criteria":
            criteria = task.parse_criteria(Prompt("x", (), task, "criteria"), done)
            sizes.add(len(criteria.names))
            assert sum(criteria.weights) == pytest.approx(1.0) and criteria.error is None
            assert "Text A" not in text and "good" not in text
        else:
            verdict = task.parse(Prompt("x", (), task, "judgement"), done)
            assert form.parse_judgement(verdict.analysis).winner == verdict.winner is not None
            assert f"Text {'AB'[verdict.winner - 1]}:\ngood" in text
            winners.append(verdict.winner)
    assert sizes == {3, 4} and 20 < winners.count(1) < 60


@pytest.mark.parametrize("winner", [1, 2])
def test_formats_are_inverses_within_bounds(winner: int) -> None:
    assert form.parse_criteria(form.write_criteria(ITEMS)) == form.list_criteria(ITEMS)
    items = [(letter * 500, "m " * 500, 0.2) for letter in "abc"]
    found = form.parse_criteria(form.write_criteria(items))
    assert [len(name) for name in found.names] == [form.NAME_CHARS] * 3
    assert max(map(len, found.text.splitlines())) < form.NAME_CHARS + form.MEANING_CHARS + 20
    text = form.write_judgement([("why", 9, 2)], winner)
    verdict, match = form.parse_judgement(text), form.find_verdict(text)
    assert (verdict.winner, verdict.analysis) == (winner, "1. why A=9 B=2")
    assert match is not None and match.group(1) == "AB"[winner - 1]


def test_rows_follow_the_rules_of_preference_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "good", "rejected": f"bad {i}"} for i in range(20)]
    ranked = bound(write(tmp_path, rows, "ranked.jsonl"), val_fraction=0, test_fraction=0)
    for pair in ranked.records("train"):
        assert pair.responses[(pair.label or 0) - 1] == "good"
    tie = {**judge_rows(9)[8], "label": "A=B"}
    path = write(tmp_path, [*judge_rows(8), tie, {"question": "q"}])
    with pytest.raises(ValueError, match=r"(?s)2 bad rows.*jsonl:9: field 'label' .*tie.*jsonl:10"):
        CriteriaPairs(path=path).records("train")
    task = CriteriaPairs(path=path, on_bad_row="skip", val_fraction=0, test_fraction=0)
    assert len(task.records("train")) == 8 and task.counts["main/skipped/tie"] == 1


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"min_criteria": 0}, "data.task.min_criteria=0"), ({"max_criteria": 9}, "most 8"),
    ({"min_criteria": 5, "max_criteria": 4}, "data.task.max_criteria=4"),
    ({"max_criteria_tokens": 0}, "data.task.max_criteria_tokens=0"),
    ({"max_analysis_tokens": 9}, "data.task.max_analysis_tokens=9: this task has no reflections"),
    ({"static_criteria": []}, "data.task.static_criteria=[]"),
    ({"static_criteria": ["a", " a"]}, "data.task.static_criteria=['a', 'a']"),
    ({"static_criteria": ["a", " "]}, "data.task.static_criteria=['a', '']"),
    ({"labels": "optinal", "min_criteria": 0}, "data.task.labels='optinal'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "fragment"), BAD_OPTIONS)
def test_bad_option(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError) as error:
        CriteriaPairs(**{"path": "pairs.jsonl", **options})
    assert fragment in str(error.value)


def test_options_are_known_by_name_and_type() -> None:
    node = {"_target_": "datamodules.tasks.criteria_pairs.CriteriaPairs", "path": "a.jsonl"}
    rest = {"static_criteria": ["a"], "max_new_tokens": None, "seed": 1, "labels": "optional"}
    assert check_node("data.task", node | rest) == []
    [wrong] = check_node("data.task", node | {"min_criteria": "3"})
    assert wrong.startswith("data.task.min_criteria='3'")
