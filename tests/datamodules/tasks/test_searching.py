"""What search tasks share: prompts, the verifier, reading transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from datamodules.engines.search import Trace, Turn
from datamodules.experience import Completion, FinishReason
from datamodules.passages import Corpus, Passage
from datamodules.search_texts import is_closed
from datamodules.tasks.base import Split
from datamodules.tasks.searching import Question, SearchTask, read_transcript, written_pieces
from datamodules.word_tokenizer import byte_tokenizer, word_tokenizer

QUESTION = Question("q", "where is rome", ("Italy", "italia"), ("a", "c"), "single")
BARE = Question("r", "where is rome", ("Italy",))


class Plain(SearchTask):
    """Two questions, texts of any kind."""

    name = "plain"

    def __init__(self) -> None:
        self._corpus = Corpus([Passage(uid, "", f"text {uid}") for uid in "abc"])

    @property
    def corpus(self) -> Corpus:
        return self._corpus

    def records(self, split: Split) -> Sequence[Question]:
        return [QUESTION, BARE]


class Spaced(Plain):
    """The same with a vocabulary."""

    max_prompt_tokens = 32

    def vocabulary(self) -> list[str]:
        tags = "<search> </search> <answer> </answer> <information> </information>"
        return f"{tags} query or text question where is rome italy".split()


@pytest.fixture
def task() -> Plain:
    task = Plain()
    task.bind(byte_tokenizer())
    return task


def written(
    task: Plain, *pieces: tuple[str, bool], trace: Any = None, reason: str = "stop"
) -> Completion:
    """A completion of texts, each written by the agent or observed."""
    ids: list[int] = []
    observed: list[bool] = []
    for text, is_observed in pieces:
        new = task.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += new
        observed += [is_observed] * len(new)
    zeros = (0.0,) * len(ids)
    return Completion(
        tuple(ids), zeros, FinishReason(reason), 0, None, tuple(observed), trace=trace
    )


def traced(answer: str | None, *places: tuple[int, ...], **values: Any) -> Completion:
    turns = tuple(Turn("x", shown, 1) for shown in places)
    trace = Trace(turns, answer, **values)
    return Completion((5,), (0.0,), FinishReason.STOP, trace=trace)


def test_prompts(task: Plain) -> None:
    prompt = task.prompt(QUESTION)
    text = task.render(prompt.token_ids)
    assert text.endswith("Question: where is rome\n") and is_closed(text)
    assert (prompt.uid, prompt.domain, prompt.task) == ("q", "single", task)
    chat = byte_tokenizer()
    chat.chat_template = "[{{ messages[0]['content'] }}]"
    task.bind(chat)
    assert task.render(task.prompt(QUESTION).token_ids) == f"[{text}]"
    long = Question("l", "where is rome " * 300, ("italy",))
    ids = task.prompt(long).token_ids
    assert len(ids) <= task.max_prompt_tokens and " ... " in task.render(ids)


def test_spaced_prompts_are_words() -> None:
    task = Spaced()
    task.bind(word_tokenizer(task.vocabulary()))
    ids = task.prompt(QUESTION).token_ids
    assert task.render(ids) == (
        "<search> query </search> or <answer> text </answer> question where is rome"
    )
    assert task.tokenizer.unk_token_id not in ids


def test_a_tokenizer_that_loses_the_tags_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot write the tags of task 'plain'"):
        Plain().bind(word_tokenizer(["<search>", "a"]))


def test_verify_reads_the_trace(task: Plain) -> None:
    prompt = task.prompt(QUESTION)
    right = traced("The italia.", (1, 0), (0, 1), num_invalid=2)
    assert task.verify(prompt, right) == {
        "reward": 1, "f1": 1, "searches": 2, "invalid": 2, "answered": 1, "support": 0.5,
    }  # fmt: skip
    assert task.verify(prompt, traced("rome", (0, 1, 2)))["support"] == 1
    nothing = task.verify(prompt, traced(None))
    assert not any(nothing.values()) and nothing["support"] == 0
    assert not task.verify(prompt, traced("italy", is_cut=True))["reward"]
    assert "support" not in task.verify(task.prompt(BARE), traced("italy", (0,)))


def test_verify_never_takes_an_answer_from_prompt_or_passages(task: Plain) -> None:
    prompt = task.prompt(QUESTION)
    assert "<answer>" in task.render(prompt.token_ids)
    right, wrong = "<answer> italy </answer>", "<answer> peru </answer>"

    def reward(*pieces: tuple[str, bool], **values: Any) -> float:
        return task.verify(prompt, written(task, *pieces, **values))["reward"]

    assert reward((right, False)) == 1
    assert reward((wrong + right, False)) == 1 and reward((right + wrong, False)) == 0
    assert reward(("hm", False), (right, True)) == 0, "an observation is no answer"
    assert reward(("<answer> italy", False), (" </answer>", True)) == 0
    assert reward(("<answer>", False), ("x", True), ("italy </answer>", False)) == 0
    assert reward((right, False), (wrong, True)) == 1
    assert reward((right, False), reason="length") == 0, "a cut completion has no answer"
    assert reward((wrong, False), trace=Trace(answer="italy")) == 1
    assert reward(("italy", False)) == 0 and reward() == 0


def test_verify_never_raises(task: Plain) -> None:
    prompt = task.prompt(QUESTION)
    for ids in ((), (10**9,), (-1,), tuple(range(200))):
        completion = Completion(ids, (0.0,) * len(ids), FinishReason.STOP)
        assert task.verify(prompt, completion)["reward"] == 0
    empty = task.verify(prompt, traced(""))
    assert empty["answered"] and not empty["reward"]


def test_pieces_between_observations() -> None:
    flags = (True, False, False, True, True, False)
    done = Completion(tuple(range(6)), (0.0,) * 6, FinishReason.STOP, 0, None, flags)
    assert written_pieces(done) == [(1, 2), (5,)]
    assert written_pieces(Completion((1, 2), (0.0, 0.0), FinishReason.STOP)) == [(1, 2)]


@pytest.mark.parametrize(
    ("text", "shown", "queries"),
    [
        ("", "", []),
        ("<search> a\n b </search> x", "", ["a b"]),
        ("<search> a <search> b </search>", "", ["b"]),
        ("<information> <search> a </search> </information>", "<search> a </search>", []),
        ("<information> cut off", "cut off", []),
        ("</information> <information> a </information> <information> b", "a b", []),
    ],
)  # fmt: skip
def test_reading_any_transcript(text: str, shown: str, queries: list[str]) -> None:
    assert read_transcript(text) == (shown, queries)


def test_optional_parts_say_what_to_do() -> None:
    task = Plain()
    with pytest.raises(NotImplementedError, match="agent=folder"):
        task.act(QUESTION, "", 0)
    with pytest.raises(NotImplementedError, match=r"data\.judge"):
        task.relevance("q", list(task.corpus), "")
    assert task.sub_answers(QUESTION, ["x", "y"], True) == ["", ""]
    assert task.gold(QUESTION, "any") == ("a", "c")
