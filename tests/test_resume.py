"""A run that was killed and goes on ends exactly like one that was not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests.models import POLICY_MODELS
from tests.runs import (
    FEW,
    REPO,
    SHORT,
    SMALL,
    assert_same_run,
    assert_same_weights,
    board,
    call,
    command,
    end,
    environment,
    existing,
    last_of,
    read_jsonl,
    scalars,
    start,
    step_of,
    strike,
    unmeasured,
    weights,
)

pytestmark = pytest.mark.slow
EVERY_STEP = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.every_seconds=null"]
STEPS = 8
BASE = [
    *SMALL,
    *SHORT,
    *EVERY_STEP,
    f"trainer.max_steps={STEPS}",
    "callbacks.sample_table.keep=all",
]
#: Every method, and one whose rollouts last several steps of several micro-batches.
CASES = {
    **{name: [f"model={name}"] for name in POLICY_MODELS},
    "grpo-pending": ["model=grpo", "data.passes=2", "data.mini_batches=2", "data.micro_batches=2"],
}
#: Moments at which a run is killed, each once, in an order and after a number of steps that a
#: generator chooses for each case; the final test comes last.
MOMENTS = ("window", "step", "checkpoint", "rename", "on_validation_batch_end")
Make = Callable[..., Any]


def kill_when(is_time: Callable[[], bool], arguments: list[str]) -> None:
    """Start a run and send SIGKILL once ``is_time``."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        arguments, cwd=REPO, env=environment(), stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        while process.poll() is None and not is_time():
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


def schedule(case: str) -> list[tuple[str, int]]:
    """Moments and how many steps each run does before it: the whole is over before the last step,
    and the first run leaves a checkpoint."""
    chance = random.Random(case)
    moments = chance.sample(MOMENTS, len(MOMENTS))
    counts = [1 + chance.randint(0, 1), *(chance.randint(0, 1) for _ in moments[1:])]
    return [*zip(moments, counts, strict=True), ("on_test_batch_end", 0)]


def pending_of(checkpoint: Path) -> list[list[Any]]:
    loop = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["state_dict"]
    return loop["combined_loader"][0]["source"]["pending"]


@pytest.mark.parametrize("case", CASES)
def test_run_killed_again_and_again_ends_like_the_unbroken_one(
    case: str, make_config: Make, compose: Make, tmp_path: Path, warm_cache: Path
) -> None:
    own = CASES[case]
    overrides = [*own, *existing([*FEW, *BASE], compose(*own))]
    expected = train.run(make_config(*overrides, "name=m", "run_id=unbroken"))
    assert expected["steps"] == STEPS
    assert expected["train/grad_norm"] > 0, "a run without gradients would prove nothing"

    unbroken, killed = tmp_path / "m" / "unbroken", tmp_path / "m" / "killed"
    started = command(*overrides, "name=m", "run_id=killed", "resume=auto",
                      output_dir=tmp_path, cache_dir=warm_cache)  # fmt: skip
    log = tmp_path / "log"
    at = 0
    for moment, count in schedule(case):
        status = end(start([*started, *strike(moment, count)], log))
        assert status == -signal.SIGKILL, f"{moment} after {at}: {status}\n{log.read_text()}"
        at = STEPS if moment.startswith("on_test") else at + count
        assert step_of(last_of(killed)) == at or at == 0, moment
        if "pending" in case and 0 < at < STEPS:
            (pending,) = pending_of(last_of(killed))
            assert len(pending) == -at % 4 * 2, "mini-batches of the open rollout must be saved"
    metrics = train.run(make_config(*overrides, "name=m", "run_id=killed", "resume=auto"))
    assert_same_run(unbroken, killed, STEPS)
    assert unmeasured(metrics) == unmeasured(expected)
    assert not list(killed.rglob("*.unfinished"))


def test_killed_in_an_arm_does_not_train_the_run_again(
    make_config: Make, compose: Make, tmp_path: Path, warm_cache: Path
) -> None:
    own = ["model=reflectrm"]
    overrides = [*own, *existing([*FEW, *BASE], compose(*own))]
    overrides += ["compare=[rft]", "trainer.max_steps=2"]
    run = tmp_path / "reflectrm" / "s0"
    arm = run / "arms" / "rft"
    started = command(*overrides, output_dir=tmp_path, cache_dir=warm_cache)
    kill_when(lambda: step_of(last_of(arm)) >= 1, started)
    assert not (run / "metrics.json").exists()
    assert step_of(last_of(run)) == 2
    before = {path: path.stat().st_mtime_ns for path in (last_of(run), run / "samples.jsonl")}
    again = call(*started, "resume=auto")
    assert again.returncode == 0, again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}, "trained again"
    metrics = json.loads((run / "metrics.json").read_text())
    own = json.loads((arm / "metrics.json").read_text())
    assert metrics["test/rft/accuracy"] == own["test/accuracy"]
    assert metrics["steps"] == own["steps"] == 2
    assert [step for step, _ in scalars(board(run), "test/accuracy")] == [2]
    assert {"refl", "pref"} == {r["domain"] for r in read_jsonl(run / "samples.jsonl")}
    assert {"pref"} == {r["domain"] for r in read_jsonl(arm / "samples.jsonl")}


def crash(
    make_config: Make, *overrides: str, batch: int, hook: str = "on_train_batch_start"
) -> None:
    """A run that ends when a hook is called once more than ``batch`` times."""
    stop = ["+callbacks.crash._target_=tests.runs.CrashAt", f"+callbacks.crash.batch={batch}",
            f"+callbacks.crash.hook={hook}"]  # fmt: skip
    with pytest.raises(KeyError, match="crashed before"):
        train.run(make_config(*BASE, "model=grpo", *overrides, *stop))


@pytest.mark.parametrize(
    ("hook", "calls", "at"),
    [
        ("on_validation_start", 2, 2),
        ("on_validation_end", STEPS - 1, STEPS - 1),
        ("on_train_end", 0, STEPS - 1),
        ("on_test_start", 0, STEPS),
    ],
)
def test_a_crash_between_steps_loses_nothing(
    hook: str, calls: int, at: int, make_config: Make, tmp_path: Path
) -> None:
    overrides = ["model=grpo", "test_base=false"]
    expected = train.run(make_config(*BASE, *overrides, "run_id=whole"))
    crash(make_config, *overrides, "run_id=crashed", batch=calls, hook=hook)
    whole, crashed = tmp_path / "grpo" / "whole", tmp_path / "grpo" / "crashed"
    assert step_of(last_of(crashed)) == at
    metrics = train.run(make_config(*BASE, *overrides, "run_id=crashed", "resume=auto"))
    assert unmeasured(metrics) == unmeasured(expected)
    assert_same_weights(weights(last_of(whole)), weights(last_of(crashed)))
    one, other = board(whole), board(crashed)
    for tag in ("val/reward", "train/loss", "rollout/reward_mean", "test/reward"):
        assert scalars(other, tag) == scalars(one, tag)
        assert len(scalars(one, tag)) == (1 if tag.startswith("test/") else STEPS)
    assert (crashed / "export" / "model.safetensors").is_file()


def test_resume_with_nothing_there_starts_fresh_and_a_finished_run_is_kept(
    make_config: Make, tmp_path: Path
) -> None:
    overrides = [*BASE, "model=grpo", "trainer.max_steps=1"]
    metrics = train.run(make_config(*overrides, "resume=auto"))
    assert metrics["steps"] == 1
    run = tmp_path / "grpo" / "s0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    with pytest.warns(UserWarning, match="is finished: its metrics are returned"):
        assert train.run(make_config(*overrides, "resume=auto")) == metrics
    with pytest.raises(FileExistsError, match=r"a finished run.*resume=auto.*overwrite=true"):
        train.run(make_config(*overrides))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    again = train.run(make_config(*overrides, "overwrite=true", "trainer.max_steps=2"))
    assert again["steps"] == 2
    assert {record["step"] for record in read_jsonl(run / "samples.jsonl")} == {1, 2}
    assert [step for step, _ in scalars(board(run), "train/loss")] == [1, 2]


def test_changed_keys_are_named_and_unfinished_files_are_ignored(
    make_config: Make, tmp_path: Path
) -> None:
    crash(make_config, batch=2)
    run = tmp_path / "grpo" / "s0"
    assert step_of(last_of(run)) == 2
    (run / "checkpoints" / "last.unfinished").write_bytes(b"cut off in the middle")
    with pytest.raises(FileExistsError, match="an unfinished run"):
        train.run(make_config(*BASE, "model=grpo"))
    with pytest.warns(UserWarning, match=r"changed keys: .*optimizer.weight_decay \(0.0 -> 0.01\)"):
        metrics = train.run(
            make_config(*BASE, "model=grpo", "resume=auto", "optimizer.weight_decay=0.01")
        )
    assert metrics["steps"] == STEPS
    assert [step for step, _ in scalars(board(run), "train/loss")] == list(range(1, STEPS + 1))
    assert not list(run.rglob("*.unfinished"))


def test_a_run_that_left_no_checkpoint_starts_fresh(make_config: Make, tmp_path: Path) -> None:
    crash(make_config, "callbacks.checkpoint.every_n_steps=null", batch=2)
    run = tmp_path / "grpo" / "s0"
    assert not last_of(run).exists()
    assert {record["step"] for record in read_jsonl(run / "samples.jsonl")} == {1, 2}
    metrics = train.run(make_config(*BASE, "model=grpo", "resume=auto"))
    assert metrics["steps"] == STEPS
    steps = [record["step"] for record in read_jsonl(run / "samples.jsonl")]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert steps == sorted(steps)
    assert [step for step, _ in scalars(board(run), "train/loss")] == list(range(1, STEPS + 1))
