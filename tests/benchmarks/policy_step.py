"""Seconds of one GRPO step and where they go: ``python -m tests.benchmarks.policy_step``.

A random 4-layer Qwen3 of width 160 (about 1.3M parameters, 98 tokens), 8 prompts x 8 samples of at
most 48 new tokens, no reference model: the work of ``trl_yardstick.py``. With TRL installed (extra
``bench``), or an interpreter that has it (``--trl-python``), both run in turn and the ratio of
medians is printed. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoTokenizer

from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, Prompt
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.base import Split, Task
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.policy_rl.grpo import GRPO

PROMPTS, SAMPLES, NEW_TOKENS, PROMPT_TOKENS, WORDS = 8, 8, 48, 16, 98


class RandomPrompts(Task):
    """Prompts of random words; the reward is the share of even token ids."""

    name = "random"

    def vocabulary(self) -> list[str]:
        """98 tokens with the three special ones."""
        return [f"w{i}" for i in range(WORDS - 3)]

    def records(self, split: Split) -> Sequence[int]:
        """Numbers to seed prompts with."""
        return list(range(256)) if split == "train" else []

    def prompt(self, record: int) -> Prompt:
        """Sixteen random words."""
        ids = random.Random(record).choices(range(3, WORDS), k=PROMPT_TOKENS)
        return Prompt(uid=str(record), token_ids=tuple(ids), task=self)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Share of even ids."""
        ids = completion.token_ids
        return {"reward": sum(i % 2 == 0 for i in ids) / max(1, len(ids))}


class StepClock(Callback):
    """Seconds of each optimizer step, in parts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self.last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step is one batch here."""
        now = time.perf_counter()
        parts = dict(trainer.datamodule.seconds)  # type: ignore[attr-defined]
        total, self.last = now - self.last, now
        row = {"total": total, "rollout": parts["rollout"], "tokens": float(batch.mask.sum())}
        row["score"] = parts["score"] + parts["annotate"] + parts["sync"]
        row["train"] = total - row["rollout"] - row["score"]
        self.steps.append(row)


def measure(steps: int, decoder: str) -> dict[str, Any]:
    """Medians over the steps after two warm-up steps."""
    task = RandomPrompts()
    shape = TinyOptions(
        hidden_size=160,
        intermediate_size=480,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=40,
    )
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(folder, task.vocabulary(), shape, seed=0)
        data = RolloutDataModule(
            task=task,
            engine=HFEngine(decoder=decoder),  # type: ignore[arg-type]
            prompts_per_rollout=PROMPTS,
        )
        data.bind(AutoTokenizer.from_pretrained(folder))
        module = GRPO(
            backbone=folder,
            optimizer={"lr": 1e-4},
            samples_per_prompt=SAMPLES,
            max_new_tokens=NEW_TOKENS,
        )
        clock = StepClock()
        trainer = Trainer(
            max_steps=steps + 2,
            max_epochs=-1,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
            use_distributed_sampler=False,
            gradient_clip_val=1.0,
            inference_mode=False,
        )
        trainer.fit(module, datamodule=data)
    rows = clock.steps[2:]
    result: dict[str, Any] = {
        key: statistics.median(row[key] for row in rows)
        for key in ("total", "rollout", "score", "train", "tokens")
    }
    result["tokens_per_s"] = statistics.median(row["tokens"] / row["total"] for row in rows)
    return result


def yardstick(python: str, steps: int, threads: int) -> dict[str, Any]:
    """TRL's GRPOTrainer on the same work, in a process of its own."""
    script = Path(__file__).with_name("trl_yardstick.py")
    output = subprocess.run(
        [python, str(script), "--steps", str(steps), "--threads", str(threads)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def main() -> None:
    """Print one line for us, one for each turn of the yardstick, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of both, A B A B")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--decoder", default="loop", choices=("loop", "generate"))
    parser.add_argument("--trl-python", default=sys.executable if find_spec("trl") else None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = [], []
    tokens: list[float] = []  # random models end at different places: tokens a step, ours / theirs
    for turn in range(args.turns):
        row = measure(args.steps, args.decoder)
        ours.append(row["total"])
        print(
            f"litpost {turn}: {row['total']:.3f} s a step  rollout {row['rollout']:.3f}  score "
            f"{row['score']:.3f}  train {row['train']:.3f}  {row['tokens_per_s']:.0f} tokens/s  "
            f"({args.threads} threads)",
            flush=True,
        )
        if args.trl_python:
            other = yardstick(args.trl_python, args.steps, args.threads)
            theirs.append(other["seconds_per_step"])
            tokens.append(row["tokens"] / other["tokens_per_step"])
            print(f"trl     {turn}: {json.dumps(other)}", flush=True)
    if theirs:
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(
            f"ratio litpost / trl: median {statistics.median(ratios):.2f} of {len(ratios)} turns "
            f"({min(ratios):.2f} to {max(ratios):.2f}); we write "
            f"{statistics.median(tokens):.2f} of its tokens a step"
        )
    else:
        print("TRL is not installed: pip install -e '.[bench]' for the ratio")


if __name__ == "__main__":
    main()
