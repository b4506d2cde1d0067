"""Cost of trust-region entropy in a training step: ``python -m tests.benchmarks.tre_step``.

Forward, backward and AdamW step of GRPO and of the arms of TRE on one batch of 2048 completion
tokens (width 512, vocabulary 32768, two layers), interleaved: one step of each, seven times,
medians, after one of each to warm up. Two kinds of distribution: ``peaked`` has a few plausible
tokens, as a trained model does (logits of a random head scaled up), ``flat`` is a random model's,
the worst case for a nucleus. Nothing is asserted; the goals are 1.1 times GRPO for TRE-K and 1.3
for TRE-P.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from datamodules.experience import Experience
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.policy_rl.grpo import GRPO
from lightning_modules.policy_rl.tre import TRE

WIDTH, VOCABULARY, ROWS, LENGTH, PROMPT = 512, 32768, 16, 128, 16
ARMS: dict[str, dict[str, Any]] = {
    "global_entropy": {"regularizer": "global_entropy"},
    "tre_k": {"regularizer": "tre_k", "top_k": 2},
    "tre_k_mass": {"regularizer": "tre_k", "top_k": 2, "preserve_mass": True},
    "tre_p": {"regularizer": "tre_p"},
    "tre_p_mass": {"regularizer": "tre_p", "preserve_mass": True},
    "forking": {"regularizer": "none", "policy_loss": "forking_tokens"},
}


def batch() -> Experience:
    """Random prompts and completions; advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    width = PROMPT + LENGTH
    return Experience(
        input_ids=torch.randint(3, VOCABULARY, (ROWS, width), generator=generator),
        attention_mask=torch.ones(ROWS, width, dtype=torch.long),
        prompt_lengths=torch.full((ROWS,), PROMPT),
        mask=torch.ones(ROWS, LENGTH, dtype=torch.bool),
        sampler_logprobs=torch.zeros(ROWS, LENGTH),
        advantages=torch.randn(ROWS, 1, generator=generator).expand(ROWS, LENGTH),
        reward=torch.zeros(ROWS),
        groups=torch.arange(ROWS),
        domains=torch.zeros(ROWS, dtype=torch.long),
        domain_names=["x"],
    )


class Arm:
    """A module, its optimizer and the seconds of its steps."""

    def __init__(self, module: GRPO, scale: float) -> None:
        self.module = module
        module.configure_model()
        with torch.no_grad():
            module.policy.base.get_output_embeddings().weight.mul_(scale)
        self.optimizer = torch.optim.AdamW(module.policy.parameters(), lr=0.0, fused=True)
        self.seconds: list[float] = []

    def step(self, experience: Experience) -> None:
        """One timed optimizer step."""
        start = time.perf_counter()
        self.module.training_step(experience, 0).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module._window, self.module._summaries = {}, {}
        self.seconds.append(time.perf_counter() - start)


def measure(kind: str, repeats: int) -> list[dict[str, Any]]:
    """Seconds and ratios of every arm."""
    scale = {"flat": 1.0, "peaked": 12.0}[kind]
    shape = TinyOptions(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_layers=2, num_heads=8, num_kv_heads=8,
        head_dim=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(folder, [f"w{i}" for i in range(VOCABULARY - 3)], shape, seed=0)
        arms = {"grpo": Arm(GRPO(backbone=folder), scale)}
        arms |= {n: Arm(TRE(backbone=folder, critic="none", **o), scale) for n, o in ARMS.items()}
    experience = batch()
    for _ in range(repeats + 1):
        for arm in arms.values():
            arm.step(experience)
    rows = []
    for name, arm in arms.items():
        pairs = zip(arm.seconds[1:], arms["grpo"].seconds[1:], strict=True)
        ratios = [own / plain for own, plain in pairs]
        rows.append(
            {
                "distribution": kind,
                "arm": name,
                "seconds": round(statistics.median(arm.seconds[1:]), 4),
                "ratio": round(statistics.median(ratios), 3),
                "lowest": round(min(ratios), 3),
                "highest": round(max(ratios), 3),
                "repeats": repeats,
                "threads": torch.get_num_threads(),
            }
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    """One line an arm; ``--output`` writes them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for kind in ("peaked", "flat") for row in measure(kind, args.repeats)]
    if args.output:
        with open(args.output, "w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
