"""Real runs for tests: the command line in a process of its own, and what a run folder holds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

import train

REPO = Path(__file__).resolve().parents[1]
#: A backbone that is made in a second: small and hardly warmed up.
SMALL = [
    "backbone.tiny.hidden_size=32",
    "backbone.tiny.intermediate_size=64",
    "backbone.tiny.num_layers=2",
    "backbone.tiny.num_heads=2",
    "backbone.tiny.num_kv_heads=2",
    "backbone.warm_start.steps=200",
    "backbone.warm_start.batch_size=16",
]
#: Little data and short completions.
SHORT = [
    "data.task.length=2",
    "data.task.num_train=24",
    "data.task.num_val=4",
    "data.task.num_test=4",
    "data.eval_batch_size=4",
]
#: Keys that say how long a run took, or how much memory, and so differ from run to run.
MEASURED = ("time/", "perf/", "mem/")


def environment(**extra: str) -> dict[str, str]:
    """Of a process with one torch thread and no network."""
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")}
    drop = ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in drop} | one | extra


def command(*overrides: str, output_dir: Path, cache_dir: Path, smoke: bool = True) -> list[str]:
    """The command line of a small run."""
    shrink = ["experiment=smoke"] if smoke else []
    return [
        sys.executable,
        str(REPO / "train.py"),
        *shrink,
        f"output_dir={output_dir}",
        f"cache_dir={cache_dir}",
        "trainer.num_threads=1",
        *overrides,
    ]


def call(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the process group dies with a time-out."""
    options = {"env": environment(), "cwd": REPO, "timeout": 300} | options
    return subprocess.run(list(arguments), capture_output=True, text=True, **options)


def main(*arguments: str) -> tuple[int, str, str]:
    """The command line in this process: exit status, standard output and error."""
    output, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["train.py", *arguments]
    status = 0
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            train.main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    return status, output.getvalue(), errors.getvalue()


def free_port() -> str:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], atol: float = 0.0
) -> None:
    """Equal names, and values equal bit for bit or within ``atol``."""
    assert one.keys() == other.keys()
    assert one
    for name in one:
        if atol:
            gap = float((one[name] - other[name]).abs().max())
            assert gap <= atol, f"{name} differs by {gap}"
        else:
            assert torch.equal(one[name], other[name]), f"{name} differs"


def unmeasured(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without times and memory."""
    return {k: v for k, v in metrics.items() if not k.startswith(MEASURED)}


def board(folder: Path) -> Any:
    """TensorBoard's own reader of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(
        str(folder / "tensorboard"),
        size_guidance={"scalars": 0, "tensors": 0, "histograms": 0},
    )
    reader.Reload()
    return reader


def scalars(reader: Any, tag: str) -> list[tuple[int, float]]:
    """Steps and values of a tag."""
    return [(event.step, event.value) for event in reader.Scalars(tag)]


class CrashAt(Callback):
    """Raises inside a hook: a run that ends in the middle, without a kill.

    Args:
        batch: How often the hook was called before.
        hook: Name of the hook.
    """

    def __init__(self, *, batch: int, hook: str = "on_train_batch_start") -> None:
        self.batch, self.seen = batch, 0
        setattr(self, hook, self._count)

    def _count(self, *arguments: Any) -> None:
        if self.seen == self.batch:
            raise KeyError(f"crashed before batch {self.batch}")
        self.seen += 1


class SeenPrompts(Callback):
    """Writes which prompts each rank trained on.

    Args:
        folder: Where to; one file a rank.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """Add the prompts of the rollout that is trained on."""
        rollouts = trainer.datamodule.last_rollouts
        line = json.dumps([rollouts.index, sorted({prompt.uid for prompt in rollouts.prompts})])
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rank{trainer.global_rank}.jsonl", "a") as handle:
            handle.write(line + "\n")
