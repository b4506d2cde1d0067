"""In which order chunks are encoded, and which of them keep their graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_modules.embedding.base import EmbeddingModule
from tests.lightning_modules.embedding.small_module import encoder, fit, pairs


class Watched(EmbeddingModule):
    """Notes the widths of the chunks that it encodes."""

    def encode(self, chunk: Any) -> Tensor:
        """See ``EmbeddingModule``."""
        self.widths.append(chunk.input_ids.shape[1])
        return super().encode(chunk)


@pytest.mark.parametrize(
    ("options", "is_longest_first", "kept"),
    [({}, True, 1), ({"keep_chunks": 0}, True, 0), ({"cache_budget_mb": 1000.0}, False, 6)],
)
def test_a_budget_takes_short_chunks_and_one_graph_is_free(
    options: dict[str, Any], is_longest_first: bool, kept: int, tmp_path: Path
) -> None:
    folder = encoder(tmp_path)
    module = Watched(backbone=str(folder), chunk_size=3, **options)
    module.widths = []
    seen = fit(module, pairs(folder, micro_batches=1), steps=1)
    chunks = -(-16 // 3)  # 8 queries and 8 passages, which are longer
    first = module.widths[:chunks]
    assert first == sorted(first, reverse=is_longest_first)
    assert first[0] != first[-1]
    assert seen.logged["train/chunks_kept"] == kept
    assert module.widths[chunks:] == (first[kept:] if kept < chunks else [])
