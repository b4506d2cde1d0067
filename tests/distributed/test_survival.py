"""Two gloo processes: a signal to one, one that dies or hangs, and going on with another number."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from callbacks.preemption import EXIT_CODE
from tests.runs import (
    REPO,
    SHORT,
    SMALL,
    assert_same_run,
    assert_same_weights,
    command,
    end,
    environment,
    last_of,
    start,
    start_ranks,
    step_of,
    strike,
)

pytestmark = pytest.mark.slow
STEPS = 4
#: Two micro-batches a step, four steps a rollout.
BASE = [
    "model=grpo", "name=m", *SMALL, *SHORT, f"trainer.max_steps={STEPS}", "trainer.accelerator=cpu",
    "data.passes=2", "data.mini_batches=2", "data.micro_batches=2",
    "callbacks.checkpoint.every_seconds=null", "callbacks.sample_table.keep=all",
]  # fmt: skip
EVERY_STEP = "callbacks.checkpoint.every_n_steps=1"
WAYS = {
    "ddp": ["trainer.strategy=ddp", "trainer.devices=2"],
    "fsdp": ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"],
}
TERM = int(signal.SIGTERM)


class Runs:
    """Starts runs of one or two processes in one folder and waits for them."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache, self.said = folder, cache, ""

    def command(self, *overrides: str) -> list[str]:
        return command(*BASE, *overrides, output_dir=self.folder, cache_dir=self.cache)

    def two(self, *overrides: str, timeout: float = 120.0) -> list[int | None]:
        """Exit statuses of two ranks; ``said`` is what both wrote."""
        log = self.folder / "log"
        for rank in (0, 1):
            Path(f"{log}.{rank}").unlink(missing_ok=True)
        ranks = start_ranks(2, self.command(*overrides), log)
        statuses = [end(process, timeout) for process in ranks]
        self.said = "".join(Path(f"{log}.{rank}").read_text() for rank in (0, 1))
        return statuses

    def one(self, *overrides: str) -> int | None:
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        status = end(start(self.command(*overrides), log))
        self.said = log.read_text()
        return status

    def run(self, name: str) -> Path:
        return self.folder / "m" / name


@pytest.fixture
def runs(tmp_path: Path, warm_cache: Path) -> Runs:
    return Runs(tmp_path, warm_cache)


@pytest.fixture(scope="module", params=WAYS)
def unbroken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, warm_cache: Path
) -> tuple[str, Path]:
    """A strategy, and the folder of a whole run of two processes."""
    runs = Runs(tmp_path_factory.mktemp("unbroken"), warm_cache)
    assert runs.two(*WAYS[request.param], "run_id=whole") == [0, 0], runs.said
    return request.param, runs.run("whole")


def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on(
    unbroken: tuple[str, Path], runs: Runs
) -> None:
    way, whole = unbroken
    run, own = runs.run("s0"), [*WAYS[way], "resume=auto"]
    for rank, moment, at in ((1, "window", 1), (0, "on_validation_batch_end", 2)):
        statuses = runs.two(*own, *strike(moment, number=TERM, rank=rank))
        assert statuses == [EXIT_CODE, EXIT_CODE], runs.said
        lines = [line for line in runs.said.splitlines() if "resume=auto (exit code 75)" in line]
        assert len(lines) == 1, "rank 0 alone says how to go on"
        assert f"ended after step {at}, saved {last_of(run)}" in lines[0]
        assert "Traceback" not in runs.said
        assert step_of(last_of(run)) == at
        loop = torch.load(last_of(run), weights_only=True)["loops"]["fit_loop"]["state_dict"]
        pending = loop["combined_loader"][0]["source"]["pending"]
        assert [len(mine) for mine in pending] == [-at % 4 * 2] * 2
        assert not torch.equal(pending[0][0]["input_ids"], pending[1][0]["input_ids"])
    assert runs.two(*own) == [0, 0], runs.said
    assert_same_run(whole, run, STEPS)


def test_a_rank_that_dies_ends_the_other_and_the_run_goes_on(
    unbroken: tuple[str, Path], runs: Runs
) -> None:
    way, whole = unbroken
    run, own = runs.run("s0"), [*WAYS[way], "resume=auto", EVERY_STEP]
    for dead, moment, count, at in ((1, "window", 1, 1), (0, "step", 1, 2)):
        began = time.monotonic()
        statuses = runs.two(*own, *strike(moment, count, rank=dead))
        assert statuses[dead] == -signal.SIGKILL
        assert statuses[1 - dead] == 1, runs.said
        assert time.monotonic() - began < 60
        assert re.search(rf"error: rank {1 - dead} lost another process of this run", runs.said)
        assert "the last checkpoint is whole, go on with resume=auto" in runs.said
        assert step_of(last_of(run)) == at
    assert runs.two(*own) == [0, 0], runs.said
    assert_same_run(whole, run, STEPS)


def test_a_rank_that_hangs_ends_the_other_in_time(runs: Runs) -> None:
    own = [*WAYS["fsdp"], "trainer.strategy.timeout_minutes=0.1", "run_id=hangs", EVERY_STEP]
    stop = strike("window", 1, number=int(signal.SIGSTOP), rank=1)
    ranks = start_ranks(2, runs.command(*own, *stop), runs.folder / "log")
    assert end(ranks[0], 90) == 1
    assert end(ranks[1], 0.1) is None, "it was stopped, and is killed by the test"
    said = Path(runs.folder / "log.0").read_text()
    assert "error: rank 0 lost another process of this run" in said
    assert step_of(last_of(runs.run("hangs"))) == 1


def test_a_full_disk_ends_both_ranks(runs: Runs) -> None:
    own = [*WAYS["ddp"], "resume=auto", EVERY_STEP]
    assert runs.two(*own, *strike("step", 1, rank=None)) == [-signal.SIGKILL] * 2
    last = last_of(runs.run("s0"))
    last.with_suffix(".unfinished").symlink_to("/dev/full")
    good = last.read_bytes()
    assert runs.two(*own) == [1, 1], runs.said
    assert runs.said.count(f"error: cannot write {last} (No space left on device)") == 2
    assert last.read_bytes() == good


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_with_a_bad_gradient(way: str, runs: Runs) -> None:
    own = [*WAYS[way], "model._target_=tests.runs.OneBadRank", "trainer.max_steps=6", EVERY_STEP]
    assert runs.two(*own, "run_id=skips") == [0, 0], runs.said
    metrics = json.loads((runs.run("skips") / "metrics.json").read_text())
    assert (metrics["bad_steps"], metrics["steps"]) == (3, 6)
    assert all(v.isfinite().all() for v in torch.load(
        last_of(runs.run("skips")), weights_only=True)["state_dict"].values())  # fmt: skip
    statuses = runs.two(*own, "model.max_bad_steps=2", "run_id=stops")
    assert statuses == [1, 1], runs.said
    assert "error: 2 steps had a non-finite gradient (model.max_bad_steps=2)" in runs.said
    ranks = torch.load(runs.run("stops") / "bad_batch.pt", weights_only=True)
    assert [len(window) for window in ranks] == [2, 2]
    assert not torch.equal(ranks[0][0]["input_ids"], ranks[1][0]["input_ids"])
    assert step_of(last_of(runs.run("stops"))) == 3


#: Who wrote the checkpoint and who goes on: processes and strategy.
ONE = ["trainer.devices=1"]
CHANGES = {
    "one to two": (ONE, WAYS["ddp"], []),
    "ddp to fsdp, adapters": (WAYS["ddp"], WAYS["fsdp"], ["lora=default", "lora.r=4"]),
    "fsdp to one, adapters": (WAYS["fsdp"], ONE, ["lora=default", "lora.r=4"]),
    "one to fsdp, with a reference": (ONE, WAYS["fsdp"], ["model.kl_coef=0.01"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_number_of_processes_goes_on(change: str, runs: Runs) -> None:
    before, after, shared = CHANGES[change]
    run = runs.run("s0")
    stopped = runs.two if "trainer.devices=2" in before else runs.one
    stopped(*shared, *before, EVERY_STEP, *strike("step", 1, rank=None))
    assert step_of(last_of(run)) == 1, runs.said
    written = torch.load(last_of(run), weights_only=True)

    again = runs.folder / "again.ckpt"
    saved = ["+callbacks.again._target_=tests.runs.SaveLoaded", f"+callbacks.again.path={again}"]
    going = runs.two if "trainer.devices=2" in after else runs.one
    assert going(*shared, *after, *saved, "resume=auto") in (0, [0, 0]), runs.said
    loaded = torch.load(again, weights_only=True)
    assert_same_weights(written["state_dict"], loaded["state_dict"])
    (one,), (other,) = written["optimizer_states"], loaded["optimizer_states"]
    assert one["state"].keys() == other["state"].keys()
    assert len(one["state"]) > 10 and all("weight" in name for name in one["state"])
    assert sum(moments["exp_avg"].abs().sum() for moments in one["state"].values()) > 0
    for name, moments in one["state"].items():
        assert_same_weights(moments, other["state"][name])
    assert [g["params"] for g in one["param_groups"]] == [
        g["params"] for g in other["param_groups"]
    ]
    assert written["lr_schedulers"] == loaded["lr_schedulers"]

    num_before, num_after = (2 if "trainer.devices=2" in way else 1 for way in (before, after))
    line = f"{num_before} process(es) wrote this checkpoint, {num_after} go on: weights, optimizer"
    assert runs.said.count(line) == (num_before != num_after)
    if num_before != num_after:
        assert f"not restored: {6 * num_before} mini-batches of the open rollout" in runs.said
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == STEPS


def ended(process: subprocess.Popen[str], timeout: float = 120.0) -> tuple[int, str]:
    """Exit status and output of a command; its group is killed where it hangs."""
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_the_launcher_gets_the_signal(launcher: str, runs: Runs) -> None:
    run = runs.run("s0")
    script = runs.command(*WAYS["fsdp"], EVERY_STEP, "trainer.max_steps=100000", "resume=auto")
    if launcher == "torchrun":
        elastic = ["-m", "torch.distributed.run", "--nproc-per-node=2",
                   "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]  # fmt: skip
        script = [sys.executable, *elastic, *script[1:]]
    process = subprocess.Popen(
        script, cwd=REPO, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while step_of(last_of(run)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    if launcher == "lightning":
        assert status == EXIT_CODE, said
    else:
        assert status != 0, "torchrun has codes of its own"
    step = step_of(last_of(run))
    assert f"SIGTERM: ended after step {step}, saved {last_of(run)}" in said
    status = runs.two(*WAYS["fsdp"], "resume=auto", f"trainer.max_steps={step + 2}")
    assert status == [0, 0], runs.said
    assert json.loads((run / "metrics.json").read_text())["steps"] == step + 2
