"""Share of a step that gradient surgery takes: ``python -m tests.benchmarks.surgery_step``.

Supervised steps of a random Qwen3 (width 512, vocabulary 32768, two layers) on 2048 tokens in three
micro-batches of one domain each. One run: surgery at every second step, so steps with and without
it alternate on the same data. Medians of seven of each, after two to warm up. Nothing is asserted;
the goal is under 10 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from callbacks.gradient_surgery import GradientSurgery
from datamodules.demonstrations import Supervised
from datamodules.loader import Loader, Source
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.sft import SFT

DOMAINS = ("chat", "if", "math")
WIDTH, VOCABULARY, TOKENS, WARM_UP, PROMPT = 512, 32768, 2048, 2, 8


class Tokens(Source):
    """The same random sequences at every step.

    Args:
        length: Of a sequence.
    """

    window = len(DOMAINS)

    def __init__(self, length: int = 128) -> None:
        self.length = length

    def __len__(self) -> int:
        return 1000 * self.window

    def batch(self, epoch: int, index: int) -> Supervised:
        """A third of the step's sequences, of one domain."""
        number = index % self.window
        rows = len(range(number, TOKENS // self.length, self.window))
        generator = torch.Generator().manual_seed(number)
        size = (rows, self.length)
        return Supervised(
            input_ids=torch.randint(3, VOCABULARY, size, generator=generator),
            prompt_lengths=torch.full((rows,), PROMPT),
            mask=torch.ones(rows, self.length - PROMPT, dtype=torch.bool),
            domains=torch.full((rows,), number),
            domain_names=list(DOMAINS),
        )


class StepClock(Callback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.began = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """The first micro-batch starts the clock."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The last one stops it."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append(time.perf_counter() - self.began)


class Shares(Callback):
    """What surgery says that it took."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The newest value of its tag."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.milliseconds.append(pl_module.results.get("surgery/ms", 0.0))


def measure(repeats: int, granularity: Any, accelerator: str) -> None:
    """Train, and print the medians."""
    shape = TinyOptions(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_layers=2, num_heads=8, num_kv_heads=8,
        head_dim=64,
    )  # fmt: skip
    clock, shares = StepClock(), Shares()
    surgery = GradientSurgery(granularity=granularity, every_n_steps=2, image_every_n_steps=0)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(folder, [f"w{i}" for i in range(VOCABULARY - 3)], shape, seed=0)
        module = SFT(backbone=folder, optimizer={"lr": 1e-5})
        trainer = Trainer(
            max_steps=2 * repeats + WARM_UP, max_epochs=-1, accelerator=accelerator, devices=1,
            accumulate_grad_batches=Tokens.window, gradient_clip_val=1.0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, callbacks=[surgery, clock, shares],
        )  # fmt: skip
        trainer.fit(module, train_dataloaders=Loader(Tokens()))
    steps = clock.steps[WARM_UP:]
    cut, plain = steps[0::2], steps[1::2]
    own = statistics.median(shares.milliseconds[WARM_UP:][0::2]) / 1e3
    one, other = statistics.median(cut), statistics.median(plain)
    print(
        f"{granularity}: step with surgery {one:.3f} s, without {other:.3f} s: "
        f"{one / other - 1:+.1%}; its own clock {own:.3f} s, {own / one:.1%} of the step "
        f"({repeats} of each, {torch.get_num_threads()} threads)",
        flush=True,
    )


def main() -> None:
    """One line a granularity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--granularity", nargs="+", default=["tensor", "global"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for granularity in args.granularity:
        measure(args.repeats, granularity, args.accelerator)


if __name__ == "__main__":
    main()
