"""Several machines: two torchrun agents, or two tasks of a SLURM job, stand for them on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from callbacks.preemption import EXIT_CODE
from tests.runs import (
    REPO,
    SHORT,
    SMALL,
    command,
    end,
    environment,
    free_port,
    last_of,
    read_jsonl,
    start,
    step_of,
    strike,
)

#: One device on each of two machines, as in conf/trainer/slurm.yaml otherwise.
NODES = ["trainer=slurm", "trainer.num_nodes=2", "trainer.devices=1", "trainer.accelerator=cpu"]
BASE = ["model=grpo", "name=m", *SMALL, *SHORT, *NODES, "callbacks.sample_table.keep=all"]
Make = Callable[..., Any]


def check_one_set_of_outputs(folder: Path, said: list[str], starts: int = 1) -> None:
    """One run folder with one of everything, and one table on the terminal."""
    assert [path.name for path in (folder / "m").iterdir()] == ["s0"]
    run = folder / "m" / "s0"
    assert json.loads((run / "metrics.json").read_text())["steps"] == 2
    writers = {path.name.split(".")[-2] for path in run.rglob("events.out.tfevents.*")}
    assert len(writers) == starts, "one process writes events"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt"]
    assert (run / "export" / "model.safetensors").is_file()
    assert {record["step"] for record in read_jsonl(run / "samples.jsonl")} == {1, 2}
    assert sorted(text.count("run folder:") for text in said) == [0, 1]
    assert not list(folder.rglob("*.unfinished")) and not list(folder.rglob("hpc_ckpt*"))


@pytest.mark.slow
def test_two_torchrun_agents(tmp_path: Path) -> None:
    """On an empty cache: one of the machines makes the warm start."""
    cache, port = tmp_path / "cache", free_port()
    script = command(*BASE, output_dir=tmp_path, cache_dir=cache)[1:]
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=nodes",
        "--local-addr=127.0.0.1",
    ]  # fmt: skip
    agents = [
        subprocess.Popen(
            [*agent, *script], cwd=REPO, env=environment(), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in agents]
    finally:
        for process in agents:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in agents] == [0, 0], said
    check_one_set_of_outputs(tmp_path, said)
    made = [path.name for path in cache.iterdir() if path.is_dir()]
    assert len(made) == 1 and "".join(said).count("warm start 200/200") == 1


@pytest.mark.slow
def test_two_tasks_of_a_slurm_job(tmp_path: Path, warm_cache: Path) -> None:
    """Signalled ahead of the limit, put back into the queue, finished."""
    shared = {
        "SLURM_JOB_ID": "4321", "SLURM_JOB_NAME": "litpost", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0",
        "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip

    def srun(*extra: str) -> tuple[list[int | None], list[str]]:
        script = command(*BASE, "resume=auto", *extra, output_dir=tmp_path, cache_dir=warm_cache)
        shared["MASTER_PORT"] = free_port()
        logs = [tmp_path / f"log.{task}" for task in (0, 1)]
        for log in logs:
            log.unlink(missing_ok=True)
        tasks = [start(script, log, SLURM_PROCID=str(task), SLURM_NODEID=str(task), **shared)
                 for task, log in enumerate(logs)]  # fmt: skip
        return [end(task) for task in tasks], [log.read_text() for log in logs]

    statuses, said = srun(*strike("window", number=int(signal.SIGUSR1), rank=1))
    assert statuses == [EXIT_CODE, EXIT_CODE], said
    assert step_of(last_of(tmp_path / "m" / "s0")) == 1
    assert "ended after step 1, saved" in said[0] and "ended after" not in said[1]
    statuses, said = srun()
    assert statuses == [0, 0], said
    check_one_set_of_outputs(tmp_path, said, starts=2)


def test_the_number_of_machines_reaches_the_strategy(make_config: Make) -> None:
    import train

    config = make_config("model=grpo", *NODES, "trainer.num_nodes=3", "trainer.devices=2")
    trainer = train.instantiate(train.trainer_values(train.plain(config.trainer), 1), logger=False)
    assert type(trainer.strategy).__name__ == "FSDP2"
    assert (trainer.strategy.num_nodes, trainer.strategy.num_processes) == (3, 2)


@pytest.mark.parametrize(("status", "is_requeued"), [(75, True), (0, False), (1, False)])
def test_the_sbatch_example(status: int, is_requeued: bool, tmp_path: Path, repo: Path) -> None:
    """It is put back into the queue on 75 and on nothing else, and its keys exist."""
    heard = tmp_path / "heard"
    for name, code in (("srun", status), ("scontrol", 0)):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho {name} "$@" >> {heard}\nexit {code}\n')
        stub.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = repo / "docs" / "cluster" / "litpost.sbatch"
    result = subprocess.run(["bash", script, "model=grpo"], env=environment(**slurm, **path))
    assert result.returncode == status
    lines = heard.read_text().splitlines()
    assert "train.py trainer=slurm trainer.num_nodes=2 trainer.devices=8 run_id=j7" in lines[0]
    assert lines[0].endswith("resume=auto model=grpo")
    assert lines[1:] == (["scontrol requeue 7"] if is_requeued else [])
    text = script.read_text()
    assert "--signal=SIGUSR1@" in text and "--requeue" in text


def test_the_torchrun_example(tmp_path: Path, repo: Path) -> None:
    heard, stub = tmp_path / "heard", tmp_path / "torchrun"
    stub.write_text(f'#!/bin/sh\necho "$@" > {heard}\n')
    stub.chmod(0o755)
    script = str(repo / "docs" / "cluster" / "torchrun.sh")
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER": "a:1", "NNODES": "2"}
    assert subprocess.run([script], env=environment(**given), capture_output=True).returncode != 0
    subprocess.run([script, "seed=1"], env=environment(**given, RUN_ID="big"), check=True)
    said = heard.read_text()
    assert "--nnodes=2 --nproc-per-node=8" in said and "--rdzv-endpoint=a:1" in said
    assert "trainer=slurm trainer.num_nodes=2 trainer.devices=8 run_id=big" in said
    for option in [word.split("=")[0] for word in said.split() if word.startswith("--")]:
        from torch.distributed.run import get_args_parser

        assert option in get_args_parser().format_help(), f"torchrun has no {option}"


def test_claims_go_to_a_slurm_queue(repo: Path) -> None:
    """The documented command composes with the launcher of the extra ``sweep``."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    text = (repo / "docs" / "cluster" / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if "hydra/launcher=submitit_slurm" in line]
    words = [word.strip("'") for word in line.split() if "=" in word]
    overrides = [word for word in words if not word.startswith(("+claim", "seed"))]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(repo / "conf"), version_base="1.3"):
        config = hydra.compose("train", [*overrides, "+claim/reflectrm=rft"],
                               return_hydra_config=True)  # fmt: skip
    assert config.hydra.launcher._target_.endswith("SlurmLauncher")
    assert config.hydra.launcher.max_num_timeout > 0, "a job that ran out of time must go on"
    assert config.resume == "auto"
