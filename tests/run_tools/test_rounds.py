"""Rounds: which runs they are made of, in which folders, and what a round takes from the last."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from run_tools.rounds import last_round
from tests.models import composed

RUN = "/runs/agentic_r/s0"


def config(*overrides: str) -> DictConfig:
    found = composed("model=agentic_r", "run_id=s0", *overrides)
    found.run_dir = RUN
    return found


class Runs:
    """Stands for ``train.run``: keeps what it was asked to do."""

    def __init__(self) -> None:
        self.asked: list[DictConfig] = []

    def __call__(self, one: DictConfig) -> dict[str, Any]:
        self.asked.append(one)
        return {"test/multi/em": 0.25 * len(self.asked), "train/loss": 1.0}


def finish(one: DictConfig, runs: Runs) -> tuple[DictConfig, dict[str, Any]]:
    return last_round(one, runs, lambda words: composed(*words), lambda _: "/start")


def test_one_round_is_the_run_itself() -> None:
    runs = Runs()
    last, rows = finish(config("iterations=1"), runs)
    assert not runs.asked and not rows
    assert last.data.retriever.path is None


def test_a_round_searches_with_the_retriever_of_the_one_before() -> None:
    runs = Runs()
    last, rows = finish(config("iterations=3", "data.input=question_history_query"), runs)
    first, second = runs.asked
    assert [one.run_id for one in runs.asked] == ["1", "2"]
    assert {(one.output_dir, one.name) for one in runs.asked} == {(RUN, "rounds")}
    assert all(one.resume == "auto" and one.rounds.count == 1 for one in runs.asked)
    assert first.data.retriever.path is None and first.data.retriever.input == "query"
    assert second.data.retriever.path == f"{RUN}/rounds/1/export"
    assert last.data.retriever.path == f"{RUN}/rounds/2/export"
    assert last.data.retriever.input == "question_history_query"
    assert last.backbone.path is None, "every round starts from the untrained encoder"
    assert rows == {"test/round_1/multi/em": 0.25, "test/round_2/multi/em": 0.5}


def test_a_round_may_go_on_from_the_retriever_before() -> None:
    last, _ = finish(config("iterations=2", "retriever_init=previous"), Runs())
    assert last.backbone.path == f"{RUN}/rounds/1/export"
    assert last.data.base_input == last.data.input


@pytest.mark.parametrize("start", ["base", "previous"])
def test_an_agent_is_trained_in_every_round(start: str) -> None:
    runs = Runs()
    last, _ = finish(config("iterations=2", "agent=grpo", f"agent_init={start}"), runs)
    agent, round_1, second_agent = runs.asked
    assert (agent.output_dir, agent.name, agent.run_id) == (RUN, "agents", "1")
    assert agent.data.retriever.path == "/start"
    world = OmegaConf.to_container(round_1.data.task.search, resolve=True)
    assert OmegaConf.to_container(agent.data.task, resolve=True) == world
    assert round_1.agent.path == f"{RUN}/agents/1/export"
    assert not round_1.agent_training.overrides, "its agent is trained already"
    assert second_agent.data.retriever.path == f"{RUN}/rounds/1/export"
    expected = f"{RUN}/agents/1/export" if start == "previous" else None
    assert second_agent.backbone.path == expected
    assert last.agent.path == f"{RUN}/agents/2/export"


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rounds\.count=0 must be at least 1"):
        finish(config("iterations=0"), Runs())
