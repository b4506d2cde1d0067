"""Search agents trained by policy RL: whole runs on the procedural world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import SMALL, command, main, read_jsonl

WORLD = [
    "data.task.num_names=30",
    "data.task.num_cities=10",
    "data.task.num_train=8",
    "data.task.num_val=2",
    "data.task.num_test=2",
    "data.prompts_per_rollout=2",
    "data.eval_batch_size=2",
    "model.max_new_tokens=60",
    "backbone.warm_start.steps=5",
]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["grpo", "ppo"])
def test_an_agent_trains(model: str, tmp_path: Path, warm_cache: Path) -> None:
    small = [text for text in SMALL if "warm_start" not in text]
    more = ["model.samples_per_prompt=2", "data.passes=1", "data.mini_batches=1"]
    words = command(
        f"model={model}", "data=search_episodes", *small, *WORLD, *more,
        output_dir=tmp_path, cache_dir=warm_cache,
    )[2:]  # fmt: skip
    status, _, errors = main(*words)
    assert status == 0, errors
    folder = tmp_path / model / "s0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"test/reward", "test/searches", "test/invalid", "test/f1"} <= metrics.keys()
    assert read_jsonl(folder / "samples.jsonl")


def test_an_unknown_form_is_refused(tmp_path: Path, warm_cache: Path) -> None:
    words = command(
        "model=grpo", "data=search_episodes", "data.retriever.input=queries",
        output_dir=tmp_path, cache_dir=warm_cache,
    )[2:]  # fmt: skip
    status, _, errors = main(*words)
    assert status == 1
    assert "data.retriever.input='queries' must be one of query" in errors
