"""How much memory a graph holds, and how many graphs a budget keeps."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.embedding.grad_cache import MIB, GraphMeter, cached_step
from tests.lightning_modules.embedding.small_encoder import (
    GROUP,
    ROWS,
    Encoder,
    data,
    gradients,
    loss_of,
    one_batch,
)


def saved_by_hand(rows: int) -> int:
    """Bytes of one chunk's graph: what goes into each layer, tanh's output and a dropout's mask.

    The mask of the first dropout is not saved, as the chunk needs no gradient.
    """
    return rows * (1 + GROUP) * (6 + 16 + 16 + 16) * 8


def test_measured_memory_is_that_of_the_saved_tensors():
    encoder, chunks = Encoder(), data()
    meter = GraphMeter()
    with meter.watch():
        vectors = encoder(chunks[0])
    size = meter.bytes_of(vectors, chunks[0])
    assert size == saved_by_hand(3), (size, saved_by_hand(3))
    # weights do count if they are frozen, as no leaf of the graph then, unless they are named
    encoder.second.requires_grad_(False)
    for meter, more in ((GraphMeter(), 4 * 16 * 8), (GraphMeter(encoder.parameters()), 0)):
        with meter.watch():
            vectors = encoder(chunks[0])
        # tanh's own output still counts; what went into a frozen layer is not saved
        assert meter.bytes_of(vectors, chunks[0]) == saved_by_hand(3) - 9 * 16 * 8 + more


def test_views_of_one_storage_count_once():
    x = torch.ones(8, requires_grad=True)
    meter = GraphMeter()
    with meter.watch():
        y = x.exp()
        z = (y * y).sum() + (y[:4] * y[4:]).sum()
    assert meter.bytes_of(z) == 32


def test_what_chunks_share_counts_once():
    """A frozen matrix that every chunk's graph holds does not use up the budget again."""
    frozen, scale = torch.randn(4, 4), nn.Parameter(torch.ones(4))
    chunks = [torch.randn(1, 4) for _ in range(3)]
    done = cached_step(
        lambda x: (x * scale) @ frozen, chunks, lambda z: torch.cat(z).sum(), cache_budget_mb=1.0
    )
    assert done.graph_bytes == 64 and done.kept == 3


def test_a_measured_graph_dies_with_its_output():
    """Also where an operation saves its own output: no cycle is left for the collector."""
    meter, x = GraphMeter(), torch.ones(3, requires_grad=True)
    gc.disable()
    try:
        with meter.watch():
            y = x.exp()
        seen = weakref.ref(y)
        del y
        assert seen() is None
    finally:
        gc.enable()


def test_recomputed_activations_are_not_counted():
    layer = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    x = torch.randn(16, 8)
    sizes = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=False)):
        meter = GraphMeter()
        with meter.watch():
            y = run()
        sizes.append(meter.bytes_of(y, x))
    assert sizes[0] == 4 * 16 * 8 * 4 and sizes[1] == 0


@pytest.mark.parametrize(
    ("chunks_worth", "kept"), [(0.0, 0), (0.99, 0), (1.0, 1), (1.99, 1), (2.0, 2), (2.7, 3)]
)
def test_as_many_graphs_as_fit_are_kept(chunks_worth, kept):
    """Chunks of 3, 3 and 2 rows; the third needs two thirds of the first."""
    torch.manual_seed(0)
    encoder, chunks = Encoder(), data()
    _, expected = one_batch(encoder, chunks)
    encoder.zero_grad()
    torch.manual_seed(7)
    budget = chunks_worth * saved_by_hand(3) / MIB
    done = cached_step(encoder, chunks, loss_of, cache_budget_mb=budget)
    assert done.kept == kept and done.recomputed == 3 - kept
    assert done.graph_bytes <= budget * MIB
    assert done.graph_bytes == sum(saved_by_hand(rows) for rows in ROWS[:kept])
    torch.testing.assert_close(gradients(encoder), expected, atol=1e-12, rtol=0)


def test_a_graph_larger_than_foreseen_is_given_up():
    """The second chunk has no more entries than the first, but needs far more memory."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    chunks = [(torch.randn(4, 4).double(), depth) for depth in (1, 50, 1)]

    def encode(chunk: tuple[Tensor, int]) -> Tensor:
        x = chunk[0]
        for _ in range(chunk[1]):
            x = torch.tanh(layer(x))
        return x

    def loss(vectors: list[Tensor]) -> Tensor:
        return torch.cat(vectors).square().sum()

    loss([encode(chunk) for chunk in chunks]).backward()
    expected = gradients(layer)
    layer.zero_grad()
    done = cached_step(encode, chunks, loss, cache_budget_mb=1000 / MIB)
    assert (done.kept, done.recomputed, done.graph_bytes) == (1, 2, 128)
    torch.testing.assert_close(gradients(layer), expected, atol=1e-12, rtol=0)
