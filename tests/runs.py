"""Real runs for tests: the command line in a process of its own, and what a run folder holds."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf

import train
from lightning_modules.policy_rl.grpo import GRPO

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
#: A tiny pair that is made in a second, in a world of few nouns.
PAIR = [
    "backbone.tiny.decoder_width=32", "backbone.warm_start.decoder_steps=20",
    "data.task.num_first=4", "data.task.num_second=4", "data.task.num_held_out=3",
]  # fmt: skip
#: Little data and short completions.
SHORT = [
    "data.task.length=2",
    "data.task.num_train=24",
    "data.task.num_val=4",
    "data.task.num_test=4",
    "data.eval_batch_size=4",
]
#: What shrinks any model, where it has the key (see ``small``).
FEW = [
    *SMALL,
    *PAIR,
    *SHORT,
    "data.task.num_keys=1",
    "data.task.num_pretrain=16",
    "data.batch_size=8",
    "data.bridge_batch_size=8",
    "data.task.warm_start_pairs=64",
    "data.task.search.num_names=40",
    "data.task.search.num_cities=12",
    "data.task.search.num_train=16",
    "data.task.search.num_val=6",
    "data.task.search.num_test=6",
    "model.num_votes=2",
    "model.eval_samples=2",
    "data.build_samples=4",
    *(f"data.prompts_per_rollout.{domain}=4" for domain in ("math", "chat", "if")),
    *(
        f"data.task.tasks.{domain}.{split}={count}"
        for domain in ("math", "chat", "if")
        for split, count in (("num_train", 24), ("num_val", 4), ("num_test", 4))
    ),
]
#: One optimizer step a rollout, where a model takes several.
ONE_UPDATE = ["data.passes=1", "data.mini_batches=1"]
#: Keys that say how long a run took, or how much memory, and so differ from run to run.
MEASURED = ("time/", "perf/", "mem/", "surgery/ms")


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


def last_of(folder: Path) -> Path:
    """The newest checkpoint of a run folder."""
    return folder / "checkpoints" / "last.ckpt"


def step_of(checkpoint: Path) -> int:
    """Its optimizer step; -1 where there is none."""
    if not checkpoint.is_file():
        return -1
    return torch.load(checkpoint, weights_only=True, mmap=True)["global_step"]


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


def assert_same_run(one: Path, other: Path, steps: int) -> None:
    """Equal weights, samples, scalars and export, each step once."""
    assert_same_weights(weights(last_of(one)), weights(last_of(other)))
    if (one / "samples.jsonl").exists():
        assert read_jsonl(other / "samples.jsonl") == read_jsonl(one / "samples.jsonl")
    boards = board(one), board(other)
    tags = boards[0].Tags()["scalars"]
    # Their order is that of file names, which end in a counter of the process: 10 before 9.
    assert set(boards[1].Tags()["scalars"]) == set(tags)
    assert "train/loss" in tags and any(tag.startswith("val/") for tag in tags)
    for tag in tags:
        values = scalars(boards[0], tag)
        is_validation = tag.startswith("val/") and not tag.startswith(("val/merged/", "val/area"))
        is_rare = "/ngram_" in tag or tag.endswith("_share")  # a step may have nothing to count
        if tag in ("train/loss", "train/lr") or (is_validation and not is_rare):
            assert [step for step, _ in values] == list(range(1, steps + 1)), tag
        if not tag.startswith(MEASURED):
            assert scalars(boards[1], tag) == values, tag
    export = Path("export", "model.safetensors")
    assert (other / export).read_bytes() == (one / export).read_bytes()


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


class SignalAt(Callback):
    """Sends its own process a signal at a chosen moment: a kill that hits the same spot each time.

    Args:
        moment: ``window`` (after a backward pass, before its optimizer step), ``step`` (after the
            optimizer step, before its checkpoint), ``checkpoint`` (half of its file is written),
            ``rename`` (all of it is, under its temporary name), or the name of any hook.
        count: How often the moment came before.
        number: Of the signal.
        rank: Which process; None for all.
    """

    def __init__(
        self, *, moment: str, count: int = 0, number: int = signal.SIGKILL, rank: int | None = 0
    ) -> None:
        self.moment, self.left, self.number, self.rank = moment, count, number, rank
        if moment.startswith("on_"):
            setattr(self, moment, lambda trainer, *arguments: self._strike(trainer))

    def _strike(self, trainer: Any) -> None:
        if self.rank not in (None, trainer.global_rank):
            return
        self.left -= 1
        if self.left == -1:
            os.kill(os.getpid(), self.number)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Stand between the checkpoint's callback and the disk."""
        if self.moment not in ("checkpoint", "rename"):
            return
        file = trainer.strategy.checkpoint_io
        write = file.save_checkpoint

        def save(checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            write(checkpoint, path)
            if self.left == 0 and self.moment == "checkpoint":
                os.truncate(path, os.path.getsize(path) // 2)
            self._strike(trainer)

        file.save_checkpoint = save

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """The first micro-batch of a window has its gradient."""
        loop = trainer.fit_loop.epoch_loop
        if self.moment == "window" and loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self._strike(trainer)

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """The weights have moved, nothing is saved."""
        loop = trainer.fit_loop.epoch_loop
        if self.moment == "step" and (loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._strike(trainer)


def strike(moment: str, count: int = 0, entry: str = "strike", **more: Any) -> list[str]:
    """Overrides that add ``SignalAt``."""
    values = {"_target_": "tests.runs.SignalAt", "moment": moment, "count": count} | more
    texts = {key: "null" if value is None else str(value) for key, value in values.items()}
    return [f"+callbacks.{entry}.{key}={text}" for key, text in texts.items()]


def start(arguments: Sequence[str], log: Path, limit: int | None = None, **extra: str) -> Any:
    """Start the command line in a process of its own, forked from one that has imported it all.

    Args:
        arguments: Of ``train.py``, as ``command`` gives them.
        log: Takes its output.
        limit: Bytes that a file may grow to: a full disk.
        **extra: Environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    script = [part for part in arguments if part not in (sys.executable, str(REPO / "train.py"))]
    process = context.Process(target=_child, args=(script, str(log), limit, extra))
    process.start()
    return process


def start_ranks(count: int, arguments: Sequence[str], log: Path) -> list[Any]:
    """Start that many ranks as torchrun would; their outputs go to ``<log>.<rank>``."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    return [
        start(arguments, Path(f"{log}.{rank}"), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]


def end(process: Any, timeout: float = 120.0) -> int | None:
    """Exit status of a started process; negative for a signal, None where it hangs (no more)."""
    process.join(timeout)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return status


def _child(script: list[str], log: str, limit: int | None, extra: dict[str, str]) -> None:
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.chdir(REPO)
    os.environ.clear()
    os.environ.update(environment(**extra))
    torch.set_num_threads(1)
    rank_zero_only.rank = _get_rank() or 0  # as when Lightning is imported
    sys.argv = [str(REPO / "train.py"), *script]
    train.main()


def existing(overrides: Sequence[str], config: Any) -> list[str]:
    """Those overrides whose key the config has: a model need not know what shrinks another."""
    nothing = object()
    keys = [(text, text.lstrip("+").split("=")[0]) for text in overrides]
    return [t for t, key in keys if OmegaConf.select(config, key, default=nothing) is not nothing]


def small(model: str, compose: Callable[..., Any], *more: str) -> list[str]:
    """Overrides that choose a model and shrink it; of ``more`` those that it has."""
    own = f"model={model}"
    return [own, *existing([*FEW, *more], compose(own))]


class SaveLoaded(Callback):
    """Saves what was loaded once more, before anything is trained.

    Args:
        path: The file.
    """

    def __init__(self, *, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Every rank takes part."""
        trainer.save_checkpoint(self.path)


class OneBadRank(GRPO):
    """The gradient of rank 1 is not finite at steps 1, 3 and 4."""

    def policy_loss(self, tokens: Any, batch: Any) -> Any:
        """Times NaN where the rank is bad."""
        loss, metrics = super().policy_loss(tokens, batch)
        is_bad = self.trainer.global_rank == 1 and self.trainer.global_step in (1, 3, 4)
        return loss * (float("nan") if is_bad else 1.0), metrics


class SeenPrompts(Callback):
    """Writes which prompts each rank trained on.

    Args:
        folder: Where to; one file a rank.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """Add the prompts of the rollout that is trained on, and those it was drawn from."""
        rollouts = trainer.datamodule.last_rollouts
        drawn = trainer.datamodule.draw(rollouts.index)
        uids = [sorted({prompt.uid for prompt in part}) for part in (rollouts.prompts, drawn)]
        line = json.dumps([rollouts.index, *uids])
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rank{trainer.global_rank}.jsonl", "a") as handle:
            handle.write(line + "\n")
