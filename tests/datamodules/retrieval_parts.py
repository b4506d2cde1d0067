"""Passages of a made-up corpus, and an encoder that reads them."""

from __future__ import annotations

from pathlib import Path
from random import Random

from datamodules.passages import Corpus, Passage
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder

WORDS = tuple(f"w{number:02d}" for number in range(60))
SHAPE = TinyEncoderOptions(hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2)


def made_corpus(count: int = 40, seed: int = 0) -> Corpus:
    """Passages of ten words."""
    rng = Random(f"passages/{seed}")
    return Corpus([Passage(f"p{i}", "", " ".join(rng.choices(WORDS, k=10))) for i in range(count)])


def bert(folder: Path, seed: int = 0) -> Path:
    """A random BERT that knows the words."""
    build_tiny_encoder(folder, WORDS, SHAPE, seed)
    return folder
