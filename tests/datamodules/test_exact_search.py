"""Exact search: against float64, ties, blocks, duplicates, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.exact_search import blocks_of, exact_search
from lightning_modules.functional.search import top_k


def vectors_of(count: int, width: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, width, generator=generator)
    return torch.nn.functional.normalize(made, dim=1)


def reference(queries: Tensor, vectors: Tensor, k: int) -> list[list[int]]:
    """Places by float64 scores rounded to float32, the lower place first among equal ones."""
    scores = (queries.double() @ vectors.double().T).float().tolist()
    return [sorted(range(len(row)), key=lambda p: (-row[p], p))[:k] for row in scores]


@pytest.mark.parametrize("k", [1, 5, 50, 300, 999])
@pytest.mark.parametrize("block_bytes", [1, 24 * 4 * 7, 1 << 20])
def test_it_finds_what_a_full_comparison_finds(k: int, block_bytes: int) -> None:
    vectors, queries = vectors_of(300), vectors_of(9, seed=1)
    scores, places = exact_search(queries, vectors.numpy(), k, block_bytes=block_bytes)
    assert places.tolist() == reference(queries, vectors, k)
    assert torch.allclose(scores, (queries @ vectors.T).gather(1, places), atol=1e-6)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


@pytest.mark.parametrize("block_bytes", [24 * 4 * 64, 1 << 20])
def test_equal_vectors_come_in_the_order_of_their_places(block_bytes: int) -> None:
    few, queries = vectors_of(5), vectors_of(40, seed=1)
    order = torch.randint(5, (700,), generator=torch.Generator().manual_seed(2))
    vectors = few[order]  # about 140 of each: a tie is cut at every k, deeper than what is spared
    for k in (1, 3, 100, 400):
        scores, places = exact_search(queries, vectors.numpy(), k, block_bytes=block_bytes)
        assert places.tolist() == reference(queries, vectors, k)
        expected = top_k(queries, vectors, k, normalize=False)
        assert places.tolist() == expected[1].tolist()
        for row, found in zip(scores, places, strict=True):
            for one in range(5):
                assert len(set(row[order[found] == one].tolist())) <= 1, "equal scores"


def test_lengths_that_differ_much_are_no_trouble() -> None:
    scales = 10.0 ** torch.randint(-3, 4, (400, 1), generator=torch.Generator().manual_seed(3))
    vectors, queries = vectors_of(400) * scales, 50 * vectors_of(6, seed=1)
    places = exact_search(queries, vectors.numpy(), 20)[1]
    assert places.tolist() == reference(queries, vectors, 20)


def test_vectors_may_stay_on_the_disk(tmp_path: Path) -> None:
    vectors, queries = vectors_of(100), vectors_of(4, seed=1)
    path = tmp_path / "vectors.npy"
    mapped = np.lib.format.open_memmap(path, "w+", np.dtype("<f4"), (100, 24))
    mapped[:] = vectors.numpy()
    mapped.flush()
    again = np.lib.format.open_memmap(path, mode="r")
    assert torch.equal(exact_search(queries, again, 7)[1], exact_search(queries, mapped, 7)[1])
    assert [start for start, _ in blocks_of(again, 24 * 4 * 40)] == [0, 40, 80]
    assert sum(len(block) for _, block in blocks_of(again, 24 * 4 * 40)) == 100


def test_training_in_half_precision_changes_nothing() -> None:
    vectors, queries = vectors_of(2000), vectors_of(30, seed=1)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, places = exact_search(queries, vectors.numpy(), 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert scores.dtype == torch.float32
    assert places.tolist() == reference(queries, vectors, 20)


def test_no_queries_find_nothing() -> None:
    scores, places = exact_search(torch.zeros(0, 24), vectors_of(5).numpy(), 3)
    assert scores.shape == places.shape == (0, 3)


def test_what_cannot_be_searched_is_refused() -> None:
    vectors = vectors_of(5).numpy()
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        exact_search(torch.zeros(1, 24), vectors, 0)
    with pytest.raises(ValueError, match=r"queries must be \(Q, 24\), got \(1, 23\)"):
        exact_search(torch.zeros(1, 23), vectors, 1)
    odd = torch.zeros(3, 24)
    odd[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"queries\[1\] is not finite"):
        exact_search(odd, vectors, 1)
    with pytest.raises(ValueError, match="too large for float32"):
        exact_search(torch.full((1, 24), 1e30), 1e30 * np.abs(vectors), 1)
