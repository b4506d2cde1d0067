"""Two gloo processes on the joined batch compute what one process computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.embedding_runs.parts import BOOM, CONTRASTIVE
from tests.runs import (
    assert_same_run,
    assert_same_weights,
    command,
    end,
    last_of,
    read_jsonl,
    start_ranks,
    step_of,
    strike,
    weights,
)

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
#: Ranks draw dropout masks of their own. Clipping makes weights differ where norms do.
SAME = [
    "backbone.tiny.dropout=0.0", "trainer.gradient_clip_val=0.1", "trainer.val_check_interval=1",
    "trainer.accelerator=cpu", "test_base=false",
]  # fmt: skip
SGD = ["optimizer.class_path=torch.optim.SGD", "optimizer.lr=1.0", "optimizer.weight_decay=0.0"]
PLAIN = [*SAME, *SGD]
TWO = {
    "ddp": ["trainer.strategy=ddp", "trainer.devices=2"],
    "fsdp": ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"],
}
CHUNKED = {
    "ddp": ["model.chunk_size=3", "model.cache_budget_mb=0.1"],
    "fsdp": ["model.chunk_size=3", "model.keep_chunks=1"],
}
#: Options of both runs, and those that two processes have besides, by strategy.
CASES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "contrastive": (
        [
            *CONTRASTIVE,
            "data.micro_batches=2",
            "model.symmetric=true",
            "model.matryoshka_dims=[32,8]",
        ],
        {},
    ),
    # the last batch of a data set is filled up with rows that do not count: 4 on one rank, 1 on two
    "contrastive in chunks": (
        [*CONTRASTIVE, "data.task.num_train=21", "data.schedule.drop_last=false"],
        CHUNKED,
    ),
    "boom": ([*BOOM, "optimizer.lr=0.1"], {}),
    "boom with adapters, task vectors": (
        [
            *BOOM,
            "lora=default",
            "lora.r=4",
            "callbacks.model_merging.method=ties",
            "+callbacks.model_merging.options.density=0.5",
        ],
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compose: Make
) -> tuple[str, Path, dict[str, Any]]:
    """A case, the folder of its run in one process, and the metrics."""
    folder = tmp_path_factory.mktemp("alone")
    options = [*CASES[request.param][0], *PLAIN, f"output_dir={folder}", "name=m", "run_id=one"]
    return request.param, folder / "m" / "one", train.run(compose(*options, smoke=False))


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_equal_one(
    strategy: str, alone: tuple[str, Path, dict[str, Any]], tmp_path: Path, warm_cache: Path
) -> None:
    case, one, metrics = alone
    shared, own = CASES[case]
    options = [*shared, *PLAIN, *TWO[strategy], *own.get(strategy, []), "name=m", "run_id=two"]
    arguments = command(*options, output_dir=tmp_path, cache_dir=warm_cache, smoke=False)
    log = tmp_path / "log"
    statuses = [end(process) for process in start_ranks(2, arguments, log)]
    said = "".join(Path(f"{log}.{rank}").read_text() for rank in (0, 1))
    assert statuses == [0, 0], said
    two = tmp_path / "m" / "two"
    assert_same_weights(weights(last_of(one)), weights(last_of(two)), atol=2e-5)
    start = load_file(Path(hyper(one)["backbone"]["path"], "model.safetensors"))
    exports = [load_file(run / "export" / "model.safetensors") for run in (one, two)]
    assert_same_weights(*exports, atol=2e-5)
    moved = max(float((start[name] - value).abs().max()) for name, value in exports[0].items())
    assert moved > 0.01, "the run must have trained"

    found = json.loads((two / "metrics.json").read_text())
    tags = [tag for tag in metrics if tag.startswith(("train/", "val/", "test/", "merge/"))]
    other = ("train/items", "train/chunks_")
    for tag in (tag for tag in tags if not tag.startswith(other)):
        assert found[tag] == pytest.approx(metrics[tag], abs=2e-4), tag
    assert found["train/items"] * 2 == metrics["train/items"]
    assert {"train/loss", "train/accuracy", "val/ndcg_at_10", "test/ndcg_at_10"} <= set(tags)
    if own:
        kept, again = (found[f"train/chunks_{what}"] for what in ("kept", "recomputed"))
        assert kept + again == -(-8 // 3) and 0 < kept < 3
    if case.startswith("boom"):
        bags = [load_file(two / "bags" / f"{n}" / "model.safetensors") for n in range(3)]
        for number, bag in enumerate(bags):
            expected = load_file(one / "bags" / f"{number}" / "model.safetensors")
            assert_same_weights(expected, bag, atol=2e-5)
        assert any(not torch.equal(value, bags[1][name]) for name, value in bags[0].items())
        assert "val/merged/ndcg_at_10" in tags


def hyper(run: Path) -> dict[str, Any]:
    return torch.load(last_of(run), weights_only=True)["hyper_parameters"]


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_go_on_after_a_kill_of_both(
    strategy: str, tmp_path: Path, warm_cache: Path
) -> None:
    every = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.every_seconds=null"]
    options = [*BOOM, *SAME, *every, *TWO[strategy], "name=m"]

    def run(*more: str) -> list[int | None]:
        words = command(*options, *more, output_dir=tmp_path, cache_dir=warm_cache, smoke=False)
        return [end(process) for process in start_ranks(2, words, tmp_path / "log")]

    assert run("run_id=whole") == [0, 0], (tmp_path / "log.0").read_text()
    killed = tmp_path / "m" / "killed"
    for moment, count, at in (("step", 3, 3), ("on_train_end", 0, 11)):
        statuses = run("run_id=killed", "resume=auto", *strike(moment, count, rank=None))
        assert statuses == [-9, -9], (tmp_path / "log.0").read_text()
        assert step_of(last_of(killed)) == at
    assert run("run_id=killed", "resume=auto") == [0, 0], (tmp_path / "log.0").read_text()
    assert_same_run(tmp_path / "m" / "whole", killed, 12)


def test_a_budget_under_sharding_and_uneven_batches_are_refused(
    tmp_path: Path, warm_cache: Path
) -> None:
    for options, message in (
        (CHUNKED["ddp"], "model.cache_budget_mb=0.1: with trainer=fsdp all ranks must keep"),
        (["data.batch_size=9"], "data.batch_size=9 cannot be shared evenly by 2 processes"),
    ):
        words = command(*CONTRASTIVE, *PLAIN, *TWO["fsdp"], *options, output_dir=tmp_path,
                        cache_dir=warm_cache, smoke=False)  # fmt: skip
        assert [end(process) for process in start_ranks(2, words, tmp_path / "log")] == [1, 1]
        said = (tmp_path / "log.0").read_text()
        assert message in said and "Traceback" not in said


def test_predictions_of_two_processes_are_those_of_one(
    make_config: Make, tmp_path: Path, warm_cache: Path
) -> None:
    options = [*CONTRASTIVE, *PLAIN, "mode=predict", "data.task.num_test=7"]
    trained = train.run(make_config(*CONTRASTIVE, *PLAIN, "run_id=trained", smoke=False))
    assert trained["steps"] > 0
    path = f"ckpt_path={last_of(tmp_path / 'contrastive' / 'trained')}"
    train.run(make_config(*options, path, f"predictions={tmp_path / 'one.jsonl'}", smoke=False))
    words = command(*options, path, *TWO["ddp"], f"predictions={tmp_path / 'two.jsonl'}",
                    output_dir=tmp_path, cache_dir=warm_cache, smoke=False)  # fmt: skip
    assert [end(process) for process in start_ranks(2, words, tmp_path / "log")] == [0, 0]
    one, two = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3 * 2 * 7
    for mine, other in zip(one, two, strict=True):
        assert [mine[k] for k in ("set", "part", "place")] == [
            other[k] for k in ("set", "part", "place")
        ]
        assert mine["vector"] == pytest.approx(other["vector"], abs=1e-6)
