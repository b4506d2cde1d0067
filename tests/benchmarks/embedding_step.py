"""A contrastive step beside sentence-transformers': ``python -m tests.benchmarks.embedding_step``.

MiniLM in float32, 256 pairs of about 12 and 40 words, chunks of 32 items, AdamW, gradients clipped
at 1, dropout as the model has it. Beside ours stands ``CachedMultipleNegativesRankingLoss``. A
cycle is one optimizer step of each arm on the same rows; medians of the cycles, after one to warm
up. Ours are steps of a real Trainer with its hooks and metrics, theirs of a bare loop, which
favours them. Token ids are made before the clock of ``ratio`` starts; ``ratio_with_tokens`` has
their making in both.

- ``equal memory``: chunks of as many items as theirs, one graph at a time, as theirs; the first
  chunk is encoded once, the others twice. ``budget N`` keeps graphs in N MiB.
- ``spread``: 0 makes all queries and all passages equally long, so that both encode the same
  tokens and pad nothing. At 0.4 queries have 7 to 17 words and passages 24 to 56. Then theirs
  pads: it tokenizes a column whole, takes rows in their order and cuts a mini-batch to its own
  longest row (as of 6.2). Ours sorts the items of a batch by length.
- ``gradient_gap``: largest difference of a gradient between the two on the same weights without
  dropout, before clipping, as a share of the largest entry of the whole gradient.
- ``peak_mib``: resident memory at the highest point of a step above what rests between steps, each
  arm in a process of its own (``--memory``, Linux only).

``--clock cpu`` with ``--threads 1`` counts processor seconds, which neighbours on the machine
hardly change. Nothing is asserted; the goals are 1.0 at equal memory and 0.8 with a budget.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import AutoTokenizer

from datamodules.loader import Loader
from datamodules.pair_schedule import Schedule
from datamodules.pairs import PairBatch, PairDataModule, PairSource
from datamodules.texts import TextEncoding
from lightning_modules.embedding.base import EmbeddingModule
from tests.benchmarks.embedding_parts import (
    MINILM,
    MadePairs,
    hush,
    make_texts,
    now,
    ratios,
    sentence_transformer,
    show,
    write_csv,
)

SCALE, CLIP, LR, WORDS = 20.0, 1.0, 1e-6, (12, 40)
THEIRS, EQUAL = "theirs", "equal memory"
MIB = 2**10  # in KiB


@dataclass
class Steps:
    """What an arm took: seconds of steps and of making their token ids, and what was kept."""

    steps: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    kept: int = 0
    chunks: int = 0

    def whole(self) -> list[float]:
        """Seconds of both, without the first step."""
        return [sum(one) for one in zip(self.steps[1:], self.tokens[1:], strict=True)]


class Peak:
    """Highest resident memory of a step above what rests between steps, in MiB."""

    def __init__(self, is_on: bool) -> None:
        self.is_on, self.resting = is_on, 0.0

    def start(self) -> None:
        """Give memory back and let the highest point start anew."""
        if self.is_on:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.resting = self._read("VmRSS")

    def stop(self) -> float:
        """What the highest point was since."""
        return self._read("VmHWM") - self.resting if self.is_on else 0.0

    @staticmethod
    def _read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[1]) / MIB


class Theirs:
    """A bare training loop of sentence-transformers.

    Args:
        rows: By uid, query and passage.
        chunk: Mini-batch of the cached loss.
    """

    def __init__(self, rows: dict[str, tuple[str, str]], chunk: int) -> None:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )

        self.rows, self.model, self.found = rows, sentence_transformer().train(), Steps()
        self.found.chunks = 2 * -(-len(rows) // chunk)
        self.loss = CachedMultipleNegativesRankingLoss(
            self.model, scale=SCALE, mini_batch_size=chunk
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)

    def features(self, uids: Sequence[str]) -> list[Any]:
        """Token ids of both columns, as their collator makes them."""
        return [self.model.preprocess([self.rows[uid][side] for uid in uids]) for side in (0, 1)]

    def step(self, uids: Sequence[str], clock: str, peak: Peak) -> None:
        """One optimizer step."""
        peak.start()
        start = now(clock)
        features = self.features(uids)
        middle = now(clock)
        self.optimizer.zero_grad()
        self.loss(features, labels=torch.zeros(0)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.found.steps.append(now(clock) - middle)
        self.found.tokens.append(middle - start)
        self.found.peaks.append(peak.stop())

    def gradients(self, uids: Sequence[str]) -> dict[str, torch.Tensor]:
        """Without dropout, by the name of the parameter in the Hugging Face model."""
        self.model.eval()
        self.optimizer.zero_grad()
        self.loss(self.features(uids), labels=torch.zeros(0)).backward()
        self.model.train()
        named = self.model[0].model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}


class TimedData(PairDataModule):
    """Times the making of its batches."""

    clock = "wall"

    def train_dataloader(self) -> Loader:
        """See ``PairDataModule``."""
        data = self

        class Timed(PairSource):
            def batch(self, epoch: int, index: int) -> PairBatch:
                start = now(data.clock)
                made = super().batch(epoch, index)
                data.seconds = now(data.clock) - start
                return made

        return Loader(Timed(self))


class InTurn(Callback):
    """Gives each step of the Trainer to an arm in turn, and lets theirs follow.

    Args:
        arms: Name -> budget in MiB, or None.
        theirs: None for ours alone; else the first step compares gradients.
        clock: ``cpu`` or ``wall``.
        peak: Measures memory.
    """

    def __init__(
        self, arms: dict[str, float | None], theirs: Theirs | None, clock: str, peak: Peak
    ) -> None:
        self.arms, self.theirs, self.clock, self.peak = arms, theirs, clock, peak
        self.found = {name: Steps() for name in arms}
        self.gap, self.began, self.name = 0.0, 0.0, ""

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        """Set the arm up and start its clock."""
        self.name = list(self.arms)[index % len(self.arms)]
        module.cache_budget_mb = self.arms[self.name]
        module.policy.train(index > 0 or self.theirs is None)
        self.uids = batch.uids
        self.peak.start()
        self.began = now(self.clock)

    def on_after_backward(self, trainer: Trainer, module: Any) -> None:
        """Compare gradients with theirs in the first step, which is not counted."""
        if trainer.global_step or self.theirs is None:
            return
        ours = dict(module.policy.model.named_parameters())
        theirs = self.theirs.gradients(self.uids)
        assert ours.keys() == theirs.keys()
        gaps = [float((ours[n].grad - g).abs().max()) for n, g in theirs.items()]
        self.gap = max(gaps) / max(float(g.abs().max()) for g in theirs.values())

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: PairBatch, index: int
    ) -> None:
        """Stop the clock; at the end of a cycle it is their turn."""
        own = self.found[self.name]
        own.steps.append(now(self.clock) - self.began)
        own.peaks.append(self.peak.stop())
        own.tokens.append(trainer.datamodule.seconds)
        counts = [module._window[f"train/chunks_{kind}"][0] for kind in ("kept", "recomputed")]
        own.kept, own.chunks = int(counts[0]), int(sum(counts))
        if self.theirs is not None and self.name == list(self.arms)[-1]:
            self.theirs.step(self.uids, self.clock, self.peak)


def train_in_turn(
    arms: dict[str, float | None], args: argparse.Namespace, spread: float, peak: Peak
) -> InTurn:
    """Steps of all arms on made texts; of one alone where memory is measured."""
    seed_everything(0, verbose=False)
    task = MadePairs(*(make_texts(args.pairs, n, spread, seed) for seed, n in enumerate(WORDS)))
    rows = {row.uid: (str(row.query), str(row.positive)) for row in task.rows}
    own = {name: budget for name, budget in arms.items() if name != THEIRS}
    theirs = Theirs(rows, args.chunk) if THEIRS in arms else None
    turns = InTurn(own, theirs, args.clock, peak)
    if theirs is not None:
        turns.found[THEIRS] = theirs.found
    if theirs is not None and not own:
        for _ in range(args.repeats + 1):
            theirs.step(list(rows), args.clock, peak)
        return turns
    steps = len(own) * (args.repeats + 1)
    data = TimedData(
        task=task, encoding=TextEncoding(), schedule=Schedule(epochs=steps), batch_size=args.pairs
    )
    data.clock = args.clock
    data.bind(AutoTokenizer.from_pretrained(MINILM))
    module = EmbeddingModule(
        backbone=MINILM, optimizer={"lr": LR}, temperature=1 / SCALE, chunk_size=args.chunk
    )
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, gradient_clip_val=CLIP, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[turns],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return turns


def peak_of(name: str, args: argparse.Namespace, spread: float) -> float:
    """Peak of one arm, in a process of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.embedding_step", "--peak-of", name]
    for key, value in (("pairs", args.pairs), ("chunk", args.chunk), ("threads", args.threads)):
        words += [f"--{key}", str(value)]
    words += ["--repeats", "1", "--spread", str(spread)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def summary(name: str, turns: InTurn, args: argparse.Namespace, spread: float) -> dict[str, Any]:
    """One line of the table; the first cycle only warms up."""
    own, theirs = turns.found[name], turns.found[THEIRS]
    middle, lowest, highest = ratios(own.steps[1:], theirs.steps[1:])
    return {
        "spread": spread,
        "arm": name,
        "kept": own.kept,
        "chunks": own.chunks,
        "seconds": round(statistics.median(own.steps[1:]), 3),
        "ratio": middle,
        "lowest": lowest,
        "highest": highest,
        "ratio_with_tokens": ratios(own.whole(), theirs.whole())[0],
        "peak_mib": round(peak_of(name, args, spread)) if args.memory else "",
        "gradient_gap": f"{turns.gap:.1e}",
        "pairs": args.pairs,
        "chunk": args.chunk,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "clock": args.clock,
    }


def main() -> None:
    """One line an arm; ``--output`` writes them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--budgets", type=float, nargs="*", default=[1024, 4096])
    parser.add_argument("--spread", type=float, nargs="+", default=[0.4, 0.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--memory", action="store_true", help="also peaks, in further processes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    if args.peak_of:
        words = args.peak_of.split()
        arms = {args.peak_of: float(words[1]) if words[0] == "budget" else None}
        turns = train_in_turn(arms, args, args.spread[0], Peak(is_on=True))
        print(json.dumps(turns.found[args.peak_of].peaks[-1]))
        return
    arms = {EQUAL: None, **{f"budget {one:g}": one for one in args.budgets}, THEIRS: None}
    rows = []
    for spread in args.spread:
        turns = train_in_turn(arms, args, spread, Peak(is_on=False))
        for name in arms:
            rows.append(summary(name, turns, args, spread))
            show(rows[-1])
    write_csv(args.output, rows)


if __name__ == "__main__":
    main()
