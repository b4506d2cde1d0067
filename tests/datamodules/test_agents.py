"""Agents: the task's own, and language models from folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.agents import FolderAgent, ScriptedAgent
from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.tasks.search_world import SearchWorld
from datamodules.tasks.searching import SearchTask
from tests.data_files import write_agent

SMALL = {"num_names": 30, "num_cities": 10, "num_train": 8, "num_val": 2, "num_test": 2}


@pytest.fixture
def world() -> SearchWorld:
    return SearchWorld(**SMALL)


def test_the_scripted_agent_writes_what_the_task_says(world: SearchWorld) -> None:
    engine = ScriptedAgent().open(world)
    prompts = [world.prompt(question) for question in world.records("train")]
    groups = engine.generate(prompts, Sampling())
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        text = world.tokenizer.decode(list(completion.token_ids))
        assert text == world.act(prompt.record, "", 0)
        assert text.startswith("<search>") and text.endswith("</search>")
        assert len(completion.logprobs) == len(completion.token_ids)


def test_the_scripted_agent_goes_on_from_a_transcript(world: SearchWorld) -> None:
    engine = ScriptedAgent().open(world)
    prompt = world.prompt(world.records("train")[0])
    ((first,),) = engine.generate([prompt], Sampling())
    seen = world.tokenizer("<information> nothing </information>", add_special_tokens=False)
    longer = type(prompt)(
        prompt.uid,
        prompt.token_ids + first.token_ids + tuple(seen["input_ids"]),
        world,
        record=prompt.record,
    )
    ((second,),) = engine.generate([longer], Sampling())
    assert second.token_ids != first.token_ids, "it has read what is there"


def test_a_task_without_an_agent_is_refused(world: SearchWorld) -> None:
    class Plain(SearchWorld):
        act = SearchTask.act

    with pytest.raises(ValueError, match="agent=scripted: task 'search_world' has no scripted"):
        ScriptedAgent().open(Plain(**SMALL))


def test_a_folder_opens_into_its_engine(world: SearchWorld, tmp_path: Path) -> None:
    agent = FolderAgent(path=str(write_agent(tmp_path, world.vocabulary())), engine=HFEngine())
    engine = agent.open(world)
    prompt = world.prompt(world.records("train")[0])
    ((completion,),) = engine.generate([prompt], Sampling(temperature=0.0, max_new_tokens=4))
    assert 1 <= len(completion.token_ids) <= 4
    assert agent.fingerprint.startswith("folder/")


def test_a_folder_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"agent=folder needs agent\.path"):
        FolderAgent()


def test_a_folder_that_cannot_write_the_task_is_refused(world: SearchWorld, tmp_path: Path) -> None:
    agent = FolderAgent(path=str(write_agent(tmp_path, ["only", "these"])))
    with pytest.raises(ValueError, match="cannot encode task 'search_world'"):
        agent.open(world)
