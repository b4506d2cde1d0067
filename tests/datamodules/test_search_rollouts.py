"""Search agents trained by policy RL: whole runs on the procedural world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.engines.hf import HFEngine
from datamodules.search_rollouts import SearchRolloutDataModule
from datamodules.tasks.search_world import SearchWorld
from datamodules.texts import TextEncoding
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder
from tests.runs import SMALL, command, main, read_jsonl

SIZES = {"num_names": 30, "num_cities": 10, "num_train": 8, "num_val": 2, "num_test": 2}
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


def test_inputs_are_bounded_also_where_the_index_is_there_already(tmp_path: Path) -> None:
    words = SearchWorld(**SIZES).vocabulary()
    shape = TinyEncoderOptions(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2)
    build_tiny_encoder(tmp_path / "encoder", words, shape, seed=0)
    build_tiny(tmp_path / "agent", words, TinyOptions(hidden_size=16, num_layers=1), seed=0)
    for _ in range(2):  # builds the index, then finds it
        data = SearchRolloutDataModule(
            task=SearchWorld(**SIZES),
            engine=HFEngine(),
            retriever={"path": str(tmp_path / "encoder"), "input": "question_query"},
            index={"kind": "flat"},
            search={},
            encoding=TextEncoding(max_query_tokens=8),
        )
        data.prepare(str(tmp_path / "agent"), tmp_path / "cache")
        text = data.engine.fit("question_query", "was " * 20, ["where was born"])
        assert text.endswith("where was born")
        assert len(text.split()) <= 8


def test_an_unknown_form_is_refused(tmp_path: Path, warm_cache: Path) -> None:
    words = command(
        "model=grpo", "data=search_episodes", "data.retriever.input=queries",
        output_dir=tmp_path, cache_dir=warm_cache,
    )[2:]  # fmt: skip
    status, _, errors = main(*words)
    assert status == 1
    assert "data.retriever.input='queries' must be one of query" in errors
