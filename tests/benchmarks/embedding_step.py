"""A contrastive step beside sentence-transformers': ``python -m tests.benchmarks.embedding_step``.

MiniLM in float32, 256 pairs of about 12 and 40 words, chunks of 32 items, AdamW, gradients clipped
at 1, dropout as the model has it. Beside ours stands ``CachedMultipleNegativesRankingLoss``. A cycle
is one optimizer step of each arm on the same rows; medians of the cycles, after one to warm up.
Ours are steps of a real Trainer with its hooks and logging, theirs of a bare loop, which favours
them. ``ratio`` leaves tokenization out of both, ``ratio_whole`` has it in both.

- ``equal memory``: ours without kept graphs. With a budget the graphs of some chunks are kept.
- ``spread`` of lengths: 0 makes all queries, and all passages, equally long. Both then pad nothing
  and encode the same tokens; ours may mix queries and passages in a chunk where the cut is uneven.
  With 0.4 (queries of 7 to 17 words, passages of 24 to 56) chunks have padding: theirs are
  consecutive rows of a column and padded to the longest of each mini-batch (6.2 tokenizes a column
  whole and cuts the padding off again), ours are sorted by length over the batch.
- ``gradient_gap``: largest difference of a gradient between the two on the same weights without
  dropout, before clipping, relative to the largest entry of the whole gradient.
- ``peak_mib``: resident memory at the highest point of a step, above what rests between steps
  (weights, gradients, AdamW's state), each arm in a process of its own. Linux only.

Nothing is asserted; the goals are 1.0 at equal memory and 0.8 with a budget.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
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
    sentence_transformer,
    write_csv,
)

SCALE, CLIP, LR, WORDS = 20.0, 1.0, 1e-6, (12, 40)
THEIRS, EQUAL = "theirs", "equal memory"
CAN_RESET = Path("/proc/self/clear_refs")


@dataclass
class Seconds:
    """Of an arm's steps, and of making token ids for each."""

    steps: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    kept: float = 0.0
    chunks: float = 0.0
    peaks: list[float] = field(default_factory=list)


class Theirs:
    """A bare training loop of sentence-transformers.

    Args:
        rows: By uid, the texts.
        chunk: Mini-batch of the cached loss.
    """

    def __init__(self, rows: dict[str, tuple[str, str]], chunk: int) -> None:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )

        self.rows, self.model = rows, sentence_transformer()
        self.loss = CachedMultipleNegativesRankingLoss(
            self.model, scale=SCALE, mini_batch_size=chunk
        )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)

    def features(self, uids: Sequence[str]) -> list[Any]:
        """Token ids, as their collator makes them."""
        return [self.model.preprocess([self.rows[uid][side] for uid in uids]) for side in (0, 1)]

    def step(self, features: list[Any]) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        self.loss(features, labels=torch.zeros(0)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()

    def gradients(self, features: list[Any]) -> dict[str, torch.Tensor]:
        """Without dropout, by the name of the parameter in the Hugging Face model."""
        self.model.eval()
        self.optimizer.zero_grad()
        self.loss(features, labels=torch.zeros(0)).backward()
        self.model.train()
        named = self.model[0].model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}


class TimedSource(PairSource):
    """Times the making of its batches."""

    def batch(self, epoch: int, index: int) -> PairBatch:
        """See ``Source``."""
        start = time.perf_counter()
        made = super().batch(epoch, index)
        self.seconds = time.perf_counter() - start
        return made


class TimedData(PairDataModule):
    """Hands out a timed source."""

    def train_dataloader(self) -> Loader:
        """See ``PairDataModule``."""
        self.source = TimedSource(self)
        return Loader(self.source)


class InTurn(Callback):
    """Gives each step of the Trainer to an arm in turn, and lets theirs follow.

    Args:
        arms: Name -> budget in MiB (None keeps no graph); without ``THEIRS``.
        theirs: None for ours alone.
        is_checked: Spend the first step on comparing gradients.
    """

    def __init__(
        self, arms: dict[str, float | None], theirs: Theirs | None, is_checked: bool
    ) -> None:
        self.arms, self.theirs, self.is_checked = arms, theirs, is_checked
        names = [*arms, *([THEIRS] if theirs else [])]
        self.found = {name: Seconds() for name in names}
        self.gap = float("nan")
        self.began, self.is_first = 0.0, True

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        """Set the arm up and start its clock."""
        self.name = list(self.arms)[index % len(self.arms)]
        module.cache_budget_mb = self.arms[self.name]
        module.policy.train(not (self.is_checked and self.is_first))
        forget_peak()
        self.began = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, module: Any) -> None:
        """Compare with theirs where that is wanted."""
        if not (self.is_checked and self.is_first) or self.theirs is None:
            return
        ours = dict(module.policy.model.named_parameters())
        theirs = self.theirs.gradients(self.theirs.features(self.uids(trainer)))
        assert ours.keys() == theirs.keys()
        largest = max(float(gradient.abs().max()) for gradient in theirs.values())
        gaps = [float((ours[n].grad - g).abs().max()) for n, g in theirs.items()]
        self.gap = max(gaps) / largest

    def uids(self, trainer: Any) -> list[str]:
        """Of the rows of this step."""
        batch: PairBatch = trainer.lightning_module._batches[-1]
        return batch.uids

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: PairBatch, index: int
    ) -> None:
        """Stop the clock; at the end of a cycle it is their turn."""
        own = self.found[self.name]
        own.steps.append(time.perf_counter() - self.began)
        own.peaks.append(peak_mib())
        own.tokens.append(trainer.datamodule.source.seconds)
        own.kept = module.results.get("train/chunks_kept", 0.0)
        own.chunks = own.kept + module.results.get("train/chunks_recomputed", 0.0)
        self.is_first = False
        if self.theirs is not None and self.name == list(self.arms)[-1]:
            self.follow(self.theirs, batch.uids)

    def follow(self, theirs: Theirs, uids: Sequence[str]) -> None:
        """One step of theirs on the same rows."""
        own = self.found[THEIRS]
        forget_peak()
        start = time.perf_counter()
        features = theirs.features(uids)
        middle = time.perf_counter()
        theirs.step(features)
        own.tokens.append(middle - start)
        own.steps.append(time.perf_counter() - middle)
        own.peaks.append(peak_mib())


def forget_peak() -> None:
    """Give memory back and let the highest point start anew."""
    global _resting
    if not CAN_RESET.exists():
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CAN_RESET.write_text("5")
    _resting = _memory("VmRSS")


def peak_mib() -> float:
    """Highest resident memory since ``forget_peak``, above what rested then."""
    return _memory("VmHWM") - _resting if CAN_RESET.exists() else float("nan")


_resting = 0.0


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def measure(
    arms: dict[str, float | None], args: argparse.Namespace, spread: float, *, beside: bool = True
) -> InTurn:
    """Train in turn.

    Args:
        arms: See ``InTurn``.
        args: Of the command line.
        spread: Of lengths.
        beside: Also theirs, with gradients compared.
    """
    seed_everything(0, verbose=False)
    queries, passages = (
        make_texts(args.pairs, words, spread, seed) for seed, words in enumerate(WORDS)
    )
    task = MadePairs(queries, passages)
    rows = {row.uid: (str(row.query), str(row.positive)) for row in task.rows}
    callback = InTurn(arms, Theirs(rows, args.chunk) if beside else None, beside)
    if not arms:
        callback.theirs = Theirs(rows, args.chunk)
        callback.found[THEIRS] = Seconds()
        for _ in range(args.repeats + 1):
            callback.follow(callback.theirs, list(rows))
        return callback
    steps = len(arms) * (args.repeats + 1)
    data = TimedData(
        task=task, encoding=TextEncoding(), schedule=Schedule(epochs=steps), batch_size=args.pairs
    )
    data.bind(AutoTokenizer.from_pretrained(MINILM))
    module = EmbeddingModule(
        backbone=MINILM,
        optimizer={"lr": LR},
        temperature=1 / SCALE,
        chunk_size=args.chunk,
    )
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, gradient_clip_val=CLIP, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return callback


def memory_of(name: str, args: argparse.Namespace, spread: float) -> float:
    """Peak of one arm, in a process of its own; NaN where it cannot be measured."""
    if not CAN_RESET.exists():
        return float("nan")
    own = ["--pairs", args.pairs, "--chunk", args.chunk, "--threads", args.threads]
    words = [sys.executable, "-m", "tests.benchmarks.embedding_step", *map(str, own)]
    done = subprocess.run(
        [*words, "--repeats", "1", "--spread", str(spread), "--peak-of", name],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def summary(
    name: str, found: InTurn, args: argparse.Namespace, spread: float, budget: float | None
) -> dict[str, Any]:
    """One line of the table; the first cycle only warms up."""
    own, other = found.found[name], found.found[THEIRS]
    ratios = [a / b for a, b in zip(own.steps[1:], other.steps[1:], strict=True)]
    whole = [sum(one) for one in zip(own.steps[1:], own.tokens[1:], strict=True)]
    theirs = [sum(one) for one in zip(other.steps[1:], other.tokens[1:], strict=True)]
    return {
        "spread": spread,
        "arm": name,
        "budget_mib": "" if budget is None else int(budget),
        "kept": int(own.kept),
        "chunks": int(own.chunks) or 2 * -(-args.pairs // args.chunk),
        "seconds": round(statistics.median(own.steps[1:]), 3),
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "ratio_whole": round(
            statistics.median(a / b for a, b in zip(whole, theirs, strict=True)), 3
        ),
        "peak_mib": round(memory_of(name, args, spread)) if args.memory else "",
        "gradient_gap": f"{found.gap:.1e}",
        "pairs": args.pairs,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
    }


def arms_of(budgets: Sequence[float]) -> dict[str, float | None]:
    """Ours: without kept graphs, and with each budget."""
    return {EQUAL: None} | {f"budget {budget:g}": float(budget) for budget in budgets}


def main() -> None:
    """One line an arm; ``--output`` writes them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--budgets", type=float, nargs="*", default=[512, 1024, 4096])
    parser.add_argument("--spread", type=float, nargs="+", default=[0.4, 0.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="also peaks, in further processes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    if args.peak_of:
        budget = args.peak_of.removeprefix("budget ")
        arms = {args.peak_of: None if args.peak_of == EQUAL else float(budget)} if (
            args.peak_of != THEIRS
        ) else {}
        found = measure(arms, args, args.spread[0], beside=False)
        print(json.dumps(found.found[args.peak_of].peaks[-1]))
        return
    rows, arms = [], arms_of(args.budgets)
    for spread in args.spread:
        found = measure(arms, args, spread)
        for name in found.found:
            rows.append(summary(name, found, args, spread, arms.get(name)))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write_csv(args.output, rows)


if __name__ == "__main__":
    main()
