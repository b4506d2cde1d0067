"""Search episodes: the protocol with an engine that writes given texts, and a real tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.engines.search import EpisodeStart, SearchEngine, Trace, stop_tokens
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.search_texts import INVALID_WORDS, fit_input, information
from datamodules.tasks.searching import Question
from datamodules.word_tokenizer import byte_tokenizer, word_tokenizer
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.options import BackboneOptions
from tests.datamodules.search_parts import (
    CORPUS,
    PLACES,
    SAMPLING,
    Overlap,
    Quiz,
    Writer,
    agent_text,
    play,
)


@pytest.mark.parametrize("spaced", [True, False])
def test_a_search_and_an_answer(spaced: bool) -> None:
    texts = ("<think> who </think> <search> ann born </search>", "<answer> rome </answer>")
    completion, engine, task = play(*texts, spaced=spaced, top_k=2)
    trace = completion.trace
    assert completion.finish_reason is FinishReason.STOP and completion.policy_version == 3
    assert trace.answer == "rome" and not trace.is_cut and trace.num_invalid == 0
    (turn,) = trace.turns
    assert turn.query == "ann born" and turn.places == (0, 2)
    assert task.tokenizer.decode(completion.token_ids[: turn.end]) == texts[0]
    assert (
        agent_text(task, completion).split()
        == " ".join(texts).replace("> <answer", ">  <answer" if spaced else "><answer").split()
    )
    seen = agent_text(task, completion, observed=True).split()
    joined = "".join(seen)
    assert joined.startswith("<information>Doc1(Title:ann)wasborninromeDoc2(Title:bob)")
    assert joined.endswith("</information>")
    for value, mark in zip(completion.logprobs, completion.observed, strict=True):
        assert value == (0.0 if mark else -0.5)
    last = engine.engine.asked[-1][-1]
    before = completion.token_ids[: len(last.token_ids) - len(task.ids("where was a born"))]
    assert last.token_ids == (*task.ids("where was a born"), *before), "nothing is encoded again"


def test_closing_tags_in_several_tokens_are_found() -> None:
    completion, _, _ = play(
        "a > b <search> ann </search>", "x => <answer> a>b </answer>", spaced=False
    )
    assert [turn.query for turn in completion.trace.turns] == ["ann"]
    assert completion.trace.answer == "a>b"


@pytest.mark.parametrize(
    ("text", "is_unclosed", "is_empty"),
    [
        ("<search> ann$", 1, 0),
        ("<search> </search>", 0, 1),
        ("ann was born$", 0, 0),
        ("$", 0, 0),
    ],
)
def test_an_invalid_piece_costs_one_of_the_budget(
    text: str, is_unclosed: int, is_empty: int
) -> None:
    completion, _, task = play(
        text, "<search> ann </search>", "<answer> rome </answer>", max_searches=2
    )
    trace = completion.trace
    assert (trace.num_invalid, trace.num_unclosed, trace.num_empty) == (1, is_unclosed, is_empty)
    assert trace.answer == "rome" and len(trace.turns) == 1
    assert agent_text(task, completion, observed=True).startswith(" ".join(INVALID_WORDS))
    spent, _, _ = play(text, "<search> ann </search>", max_searches=1)
    assert spent.trace.is_cut and spent.trace.turns == () and spent.trace.answer is None


def test_a_search_beyond_the_budget_ends_the_episode() -> None:
    search = "<search> ann </search>"
    completion, engine, _ = play(search, search, search, max_searches=2)
    assert completion.trace.is_cut and completion.trace.answer is None
    assert len(completion.trace.turns) == 2 and len(engine.retriever.calls) == 2
    assert completion.finish_reason is FinishReason.STOP
    answered, _, _ = play(search, search, "<answer> rome </answer>", max_searches=2)
    assert answered.trace.answer == "rome" and not answered.trace.is_cut
    none, _, _ = play(search, max_searches=0)
    assert none.trace.is_cut and none.trace.turns == ()


@pytest.mark.parametrize("bound", range(1, 33))
def test_all_tokens_together_stay_within_the_bound(bound: int) -> None:
    """3 of the search, 23 of two passages, 3 of the answer."""
    texts = ("<search> ann </search>", "<answer> rome </answer>")
    completion, _, task = play(*texts, top_k=2, sampling=Sampling(max_new_tokens=bound))
    assert len(completion.token_ids) == min(bound, 29)
    written = agent_text(task, completion).split()
    assert written == " ".join(texts).split()[: min(bound, 3) + max(min(bound, 29) - 26, 0)]
    is_whole = bound >= 29
    assert completion.trace.is_cut is not is_whole
    wanted = FinishReason.STOP if is_whole else FinishReason.LENGTH
    assert completion.finish_reason is wanted
    assert (completion.trace.answer == "rome") is is_whole
    assert completion.trace.num_invalid == 0, "what was cut off is no mistake of the agent"


def test_a_turn_has_a_bound_of_its_own_over_all_its_pieces() -> None:
    texts = ["<think> so </think>", "that that that that", "<answer> rome </answer>"]
    completion, engine, _ = play(
        "".join(f"{t} " for t in texts[:2]).strip(), texts[2], turn_tokens=5
    )
    assert completion.trace.num_invalid == 1 and completion.trace.answer == "rome"
    assert completion.observed.index(True) == 5
    assert all(prompt.max_new_tokens <= 5 for call in engine.engine.asked for prompt in call)


def test_an_observation_is_cut_behind_its_closing_tag() -> None:
    texts = ("<search> ann </search>", "<answer> rome </answer>")
    completion, _, task = play(*texts, observation_tokens=6)
    seen = agent_text(task, completion, observed=True)
    assert seen == "<information> Doc 1 ( Title </information>"
    _, engine, task = play(*texts, spaced=False)
    for room in (0, 1, 16, 17, 40, 10**6):
        ids = engine.observation([0, 1], room)
        assert len(ids) <= room
        text = task.tokenizer.decode(list(ids))
        assert text.endswith("\n</information>\n") is (room >= 17)
    assert engine.observation([0, 1]) == engine.observation([0, 1], 10**6)


def test_episodes_advance_together_and_each_text_is_searched_once() -> None:
    task = Quiz()
    prompts = [task.prompt(record) for record in task.records("train")]
    search, answer = "<search> {} </search>", "<answer> rome </answer>"
    texts = {
        "q0/0": [search.format("ann"), search.format("rome"), answer],
        "q0/1": [search.format("ann"), answer],
        "q1/0": [search.format("bob"), search.format("rome"), answer],
        "q1/1": [answer],
    }
    inner, retriever = Writer(task, texts), Overlap()
    engine = SearchEngine(inner, task=task, retriever=retriever)
    groups = engine.generate(prompts, replace(SAMPLING, samples=2))
    assert [[len(one.trace.turns) for one in group] for group in groups] == [[2, 1], [2, 0]]
    assert retriever.calls == [["ann", "bob"], ["rome"]]
    assert [[prompt.uid for prompt in call] for call in inner.asked] == [
        ["q0/0#0", "q0/1#0", "q1/0#0", "q1/1#0"],
        ["q0/0#1", "q0/1#1", "q1/0#1"],
        ["q0/0#2", "q1/0#2"],
    ]
    assert engine.generate([], SAMPLING) == []


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("query", ["ann", "rome"]),
        ("question_query", ["where was a born [SEP] ann", "where was a born [SEP] rome"]),
        ("history_query", ["ann", "ann [SEP] rome"]),
    ],
)
def test_what_the_retriever_gets(form: str, wanted: list[str]) -> None:
    texts = ("<search> ann </search>", "<search> rome </search>", "<answer> rome </answer>")
    _, engine, _ = play(*texts, input=form)
    assert [text for call in engine.retriever.calls for text in call] == wanted
    fit = partial(fit_input, count_tokens=lambda text: len(text.split()), max_tokens=4)
    _, engine, _ = play(*texts, input=form, fit=fit)
    cut = [text for call in engine.retriever.calls for text in call]
    assert cut == [text.replace("was a born", "was") for text in wanted]


def test_an_episode_goes_on_from_its_middle() -> None:
    texts = ["<search> ann </search>", "<search> rome </search>", "<answer> italy </answer>"]
    whole, _, task = play(*texts, max_searches=2, input="history_query", top_k=1)
    first = whole.trace.turns[0]
    prompt = task.prompt(task.records("train")[0])
    inner = Writer(task, {"again": texts[1:], "short": [texts[1], texts[1]], "q0/0": texts[1:]})
    retriever = Overlap()
    engine = SearchEngine(
        inner, task=task, retriever=retriever, max_searches=2, input="history_query", top_k=1
    )
    prefix = (*whole.token_ids[: first.end], *engine.observation(first.places))
    start = EpisodeStart(prompt, prefix, ("ann",), "again")
    again, short, unnamed = engine.run(
        [start, replace(start, uid="short"), replace(start, uid="")], SAMPLING
    )
    assert prefix + again.token_ids == whole.token_ids == prefix + unnamed.token_ids
    assert again.trace.turns == whole.trace.turns[1:] and again.trace.answer == "italy"
    assert retriever.calls == [["ann [SEP] rome"]]
    assert short.trace.is_cut and len(short.trace.turns) == 1, "the first search counts"
    full = engine.run([start], Sampling(max_new_tokens=len(prefix)))[0]
    assert full.token_ids == () and full.trace.is_cut
    assert full.finish_reason is FinishReason.LENGTH


def test_errors_and_full_contexts_end_an_episode() -> None:
    class Broken(Writer):
        def generate(self, prompts: Any, sampling: Sampling) -> list[list[Completion]]:
            return [[Completion((5,), (0.0,), self.reason)] for _ in prompts]

    task = Quiz()
    prompt = task.prompt(task.records("train")[0])
    inner: Any = Broken(task, {})
    engine = SearchEngine(inner, task=task, retriever=Overlap())
    for reason in (FinishReason.ERROR, FinishReason.LENGTH):  # less than was asked for
        inner.reason = reason
        ((one,),) = engine.generate([prompt], SAMPLING)
        assert one.finish_reason is reason and one.trace.answer is None
    assert one.trace.is_cut
    bounded: Any = Writer(task, {"q0/0": ["<search> ann </search>", "never"]})
    bounded.bound = len(prompt.token_ids) + 8
    engine = SearchEngine(bounded, task=task, retriever=Overlap())
    ((one,),) = engine.generate([prompt], SAMPLING)
    assert len(one.token_ids) == 8 and one.trace.is_cut


def test_the_inner_engine_is_steered() -> None:
    _, engine, _ = play("<answer> rome </answer>")
    with engine.keyed("other"):
        assert engine.engine.key == "other"
    assert engine.engine.key == engine.key == ""
    model = torch.nn.Linear(1, 1)
    engine.sync(model, 9)
    assert engine.policy_version == engine.engine.policy_version == 9 and engine.is_ready
    rested: list[str] = []
    engine.engine.rest = lambda: rested.append("rest")
    engine.engine.close = lambda: rested.append("close")
    engine.rest()
    engine.close()
    assert rested == ["rest", "close"]


def test_wrong_options_are_named_together() -> None:
    task = Quiz()
    with pytest.raises(ValueError) as caught:
        SearchEngine(
            Writer(task, {}), task=task, retriever=Overlap(), input="both", top_k=0,
            max_searches=-1, turn_tokens=0, observation_tokens=0,
        )  # fmt: skip
    for part in (
        "data.search.top_k=0 must be at least 1",
        "data.search.max_searches=-1 must be at least 0",
        "data.search.turn_tokens=0",
        "data.search.observation_tokens=0",
        "data.retriever.input='both' must be one of query, question_query",
    ):
        assert part in str(caught.value)
    engine = SearchEngine(Writer(task, {}), task=task, retriever=Overlap())
    for sampling in (Sampling(candidates=2), Sampling(stop_ids=(3,))):
        with pytest.raises(ValueError, match="report no candidates"):
            engine.generate([], sampling)


def test_stop_tokens_are_those_that_may_close_a_tag() -> None:
    task = Quiz()
    assert [task.tokenizer.decode([i]) for i in stop_tokens(task.tokenizer, True)] == [
        "</search>",
        "</answer>",
    ]
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode([i]) for i in stop_tokens(tokenizer, False)] == [">"]
    tokenizer.add_tokens(["</search>", "->", "<b"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["</answer>", "<|end|>"]})
    found = {tokenizer.decode([i]) for i in stop_tokens(tokenizer, False)}
    assert found == {">", "</search>", "->", "</answer>"}
    with pytest.raises(ValueError, match="cannot write </search> or </answer>"):
        stop_tokens(word_tokenizer(["</search>"]), True)


# --- a real model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], SearchEngine]:
    """A Qwen3 that has seen a few episodes, so that it searches and answers, and varies."""
    task = Quiz()
    folder: Path = tmp_path_factory.mktemp("chatty")
    shape = TinyOptions(
        hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16
    )
    words = task.vocabulary()
    assert words is not None
    build_tiny(folder, words, shape, seed=0)
    policy = load_causal_lm(BackboneOptions(path=str(folder)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for step in range(60):
        name, found = PLACES[step % 6], information([CORPUS[step % 4], CORPUS[2]], True)
        text = f"where was {name} born{' so' * (step % 6)} <search> {name} born </search> {found} "
        text += "<answer> rome </answer>" if step % 3 else f"<search> {name} </search>"
        ids = torch.tensor([task.ids(text)])
        policy(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def make() -> SearchEngine:
        engine = SearchEngine(
            HFEngine(), task=task, retriever=Overlap(), top_k=2, max_searches=3, turn_tokens=12
        )
        engine.sync(policy, 1)
        engine.key = "a"
        return engine

    return make


def asked(task: Quiz, count: int = 6) -> list[Prompt]:
    texts = [f"where was {PLACES[n]} born" + " so" * n for n in range(count)]
    return [
        Prompt(f"r{n}", task.ids(text), task, record=Question(f"r{n}", text, ("rome",)))
        for n, text in enumerate(texts)
    ]


def test_tokens_depend_on_nothing_but_key_prompt_and_sample(
    chatty: Callable[[], SearchEngine],
) -> None:
    engine = chatty()
    prompts = asked(engine.task)
    sampling = Sampling(samples=3, max_new_tokens=120)
    together = engine.generate(prompts, sampling)
    assert sum(len(one.trace.turns) for group in together for one in group) > 5
    assert any(one.trace.answer is not None for group in together for one in group)
    alone = [chatty().generate([prompt], sampling)[0] for prompt in reversed(prompts)][::-1]
    for mine, theirs in zip(sum(alone, []), sum(together, []), strict=True):
        assert mine.token_ids == theirs.token_ids and mine.observed == theirs.observed
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=2e-5)
    assert [[one.trace for one in group] for group in alone] == [
        [one.trace for one in group] for group in together
    ]
    assert len({one.token_ids for one in together[0]}) > 1, "samples differ"
    with engine.keyed("b"):
        others = engine.generate(prompts, sampling)
    assert [one.token_ids for one in others[0]] != [one.token_ids for one in together[0]]
    start = EpisodeStart(prompts[2], uid="r2/1")
    assert engine.run([start], sampling)[0].token_ids == together[2][1].token_ids


def test_greedy_episodes_are_one_and_their_logprobs_the_models(
    chatty: Callable[[], SearchEngine],
) -> None:
    engine = chatty()
    prompts = asked(engine.task)
    greedy = Sampling(temperature=0.0, max_new_tokens=60)
    first = engine.generate(prompts, greedy)
    with engine.keyed("b"):
        assert engine.generate(prompts, greedy) == first
    sampled = engine.generate(prompts, Sampling(max_new_tokens=120))
    for prompt, (one,) in zip(prompts, sampled, strict=True):
        ids = torch.tensor([prompt.token_ids + one.token_ids])
        with torch.no_grad():
            logits = engine._policy(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1]
        own = logits.float().log_softmax(-1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        marks = torch.tensor(one.observed)
        assert not torch.tensor(one.logprobs)[marks].any()
        torch.testing.assert_close(
            torch.tensor(one.logprobs)[~marks], own[~marks], atol=1e-4, rtol=0
        )
        assert isinstance(one.trace, Trace)
