"""Encoding beside sentence-transformers': ``python -m tests.benchmarks.encode_speed``.

10,000 made texts of 4 to 16 words through MiniLM in float32, from texts to vectors on the CPU:
``module.embed`` and ``SentenceTransformer.encode`` in turn, batches of equal size, medians after a
short pass of each to warm up. Both sort by length. ``gap`` is the largest difference of an entry
between the two. ``--clock cpu`` with ``--threads 1`` counts processor seconds, which neighbours on
the machine hardly change. Nothing is asserted; the goal is a ratio of 1.0 or less.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from datamodules.texts import TextEncoding
from lightning_modules.embedding.base import EmbeddingModule
from tests.benchmarks.embedding_parts import (
    MINILM,
    hush,
    make_texts,
    now,
    ratios,
    sentence_transformer,
    show,
    write_csv,
)

WORDS, SPREAD = 10, 0.6


def ours() -> EmbeddingModule:
    """MiniLM as ``train.load`` would give it."""
    module = EmbeddingModule(backbone=MINILM)
    module.configure_model()
    module.encoding = TextEncoding()
    module.encoding.bind(AutoTokenizer.from_pretrained(MINILM))
    return module


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and ratios of both."""
    texts = make_texts(args.count, WORDS, SPREAD, seed=0)
    module, model, size = ours(), sentence_transformer(), args.batch_size
    arms: dict[str, Callable[[list[str]], Tensor]] = {
        "embed": lambda given: module.embed(given, batch_size=size),
        "theirs": lambda given: model.encode(given, batch_size=size, convert_to_tensor=True),
    }
    few = texts[: 4 * size]
    gap = float((arms["embed"](few) - arms["theirs"](few)).abs().max())
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.repeats):
        for name, encode in arms.items():
            start = now(args.clock)
            encode(texts)
            seconds[name].append(now(args.clock) - start)
    rows = []
    for name, own in seconds.items():
        middle, lowest, highest = ratios(own, seconds["theirs"])
        rows.append(
            {
                "arm": name,
                "seconds": round(statistics.median(own), 3),
                "ratio": middle,
                "lowest": lowest,
                "highest": highest,
                "gap": f"{gap:.1e}",
                "texts": args.count,
                "batch_size": size,
                "repeats": args.repeats,
                "threads": torch.get_num_threads(),
                "clock": args.clock,
            }
        )
        show(rows[-1])
    return rows


def main() -> None:
    """One line each; ``--output`` writes them as CSV, ``--count 1000`` is for busy machines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    write_csv(args.output, measure(args))


if __name__ == "__main__":
    main()
