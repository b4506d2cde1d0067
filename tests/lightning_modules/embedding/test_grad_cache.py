"""Gradient caching gives the one-batch gradient, dropout and all, whatever part of it is kept."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.embedding.grad_cache import cached_step
from lightning_modules.functional.contrastive import info_nce
from tests.lightning_modules.embedding.small_encoder import (
    ROWS,
    Encoder,
    data,
    gradients,
    loss_of,
    one_batch,
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("keep", [None, 0, 1, 2, 3, 9])
def test_equals_one_batch_with_dropout(keep, dtype, tolerance):
    torch.manual_seed(0)
    encoder, chunks = Encoder(dtype=dtype), data(dtype)
    loss, expected = one_batch(encoder, chunks)
    state = torch.get_rng_state()
    encoder.zero_grad()
    encoder.calls.clear()
    torch.manual_seed(7)
    done = cached_step(encoder, chunks, loss_of, keep=keep)
    for got, wanted in zip(gradients(encoder), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)
    assert done.loss == loss and not done.loss.requires_grad
    assert torch.equal(torch.get_rng_state(), state), "what follows draws other numbers"
    kept = min(keep or 0, 3)
    assert (done.kept, done.recomputed, done.drift) == (kept, 3 - kept, 0)
    assert encoder.calls == [True] * kept + [False] * (3 - kept) + [True] * (3 - kept)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_equals_one_encoding_of_the_joined_batch(keep):
    torch.manual_seed(0)
    encoder, chunks = Encoder(dropout=0.0), data()
    loss_of([encoder(torch.cat(chunks))]).backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    cached_step(encoder, chunks, loss_of, keep=keep)
    torch.testing.assert_close(gradients(encoder), expected, atol=1e-12, rtol=0)


def test_without_replay_the_gradient_would_be_another():
    """The test above could pass with dropout that does nothing; here the masks are other ones."""
    torch.manual_seed(0)
    encoder, chunks = Encoder(), data()
    _, expected = one_batch(encoder, chunks)
    encoder.zero_grad()

    def careless(chunk: Tensor) -> Tensor:
        torch.seed()  # draws from a new state at each call
        return encoder(chunk)

    done = cached_step(careless, chunks, loss_of)
    assert done.drift > 0.01
    gaps = [float((a - b).abs().max()) for a, b in zip(gradients(encoder), expected, strict=True)]
    assert max(gaps) > 1e-3


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_random_numbers_of_the_loss_are_drawn_once(keep):
    """What follows the step does not draw the loss's numbers again."""
    torch.manual_seed(0)
    encoder, chunks, drawn = Encoder(), data(), []

    def loss(vectors: list[Tensor]) -> Tensor:
        drawn.append(torch.rand(2))
        return loss_of(vectors)

    cached_step(encoder, chunks, loss, keep=keep)
    assert not torch.equal(torch.rand(2), drawn[0])


def test_gradients_add_to_those_there():
    encoder, chunks = Encoder(dropout=0.0), data()
    cached_step(encoder, chunks, loss_of)
    once = gradients(encoder)
    cached_step(encoder, chunks, loss_of, keep=2)
    torch.testing.assert_close(gradients(encoder), [2 * x for x in once])


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("defer", [False, True])
def test_what_backward_multiplies_by_is_applied_once(keep, defer):
    torch.manual_seed(0)
    encoder, chunks = Encoder(), data()
    loss, expected = one_batch(encoder, chunks)
    encoder.zero_grad()
    torch.manual_seed(7)

    def scaled(part: Tensor) -> None:
        (part * 1024).backward()

    done = cached_step(encoder, chunks, loss_of, scaled, keep=keep, defer_last=defer)
    assert float(done.loss.detach()) == pytest.approx(float(loss))
    if defer:
        scaled(done.loss)
    wanted = [x * 1024 for x in expected]
    torch.testing.assert_close(gradients(encoder), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_only_the_last_forward_and_backward_stand_outside_no_sync(keep):
    encoder, chunks, seen, inside = Encoder(), data(), [], [False]

    @contextmanager
    def no_sync() -> Any:
        inside[0] = True
        yield
        inside[0] = False

    def encode(chunk: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(("forward", inside[0]))
        return encoder(chunk)

    def backward(part: Tensor) -> None:
        seen.append(("backward", inside[0]))
        part.backward()

    cached_step(encode, chunks, loss_of, backward, keep=keep, no_sync=no_sync)
    assert seen[-2:] == [("forward", False), ("backward", False)]
    assert all(is_inside for _, is_inside in seen[:-2])
    count = sum(name == "backward" for name, _ in seen)
    assert count == (3 - keep) + (0 < keep < 3) + (keep == 3)


def test_a_learnt_temperature_must_be_named():
    encoder, chunks = Encoder(dropout=0.0), data()
    scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def loss(vectors: list[Tensor]) -> Tensor:
        joined = torch.cat(vectors)
        return info_nce(joined[:, 0], joined[:, 1:], temperature=scale).loss_sum

    loss([encoder(chunk) for chunk in chunks]).backward()
    assert scale.grad is not None
    expected, by_scale = gradients(encoder), scale.grad.clone()
    with pytest.raises(ValueError, match="loss_parameters"):
        cached_step(encoder, chunks, loss)
    for keep in (0, 3):
        encoder.zero_grad()
        scale.grad = None
        cached_step(encoder, chunks, loss, keep=keep, loss_parameters=[scale])
        torch.testing.assert_close(scale.grad, by_scale)
        torch.testing.assert_close(gradients(encoder), expected)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_autocast_does_not_lose_the_gradient(keep):
    """Weights cast in pass 1 have no graph; those cached casts must not serve in pass 2."""
    torch.manual_seed(0)
    encoder, chunks = Encoder(dropout=0.0, dtype=torch.float32), data(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of([encoder(chunk) for chunk in chunks]).backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached_step(encoder, chunks, loss_of, keep=keep)
    for got, wanted in zip(gradients(encoder), expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)


def test_chunks_of_queries_and_passages_of_other_shapes():
    torch.manual_seed(0)
    encoder = Encoder()
    chunks = [{"x": torch.randn(n, 6).double(), "is_query": n == 4} for n in (4, 4, 6, 2)]

    def encode(chunk: dict[str, Any]) -> Tensor:
        return encoder(chunk["x"])

    def loss(vectors: list[Tensor]) -> Tensor:
        return info_nce(torch.cat(vectors[:2]), torch.cat(vectors[2:])[:, None]).loss_sum

    torch.manual_seed(7)
    loss([encode(chunk) for chunk in chunks]).backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    torch.manual_seed(7)
    done = cached_step(encode, chunks, loss, keep=1)
    torch.testing.assert_close(gradients(encoder), expected, atol=1e-12, rtol=0)
    assert [len(x) for x in done.embeddings] == [4, 4, 6, 2]
    assert not any(x.requires_grad for x in done.embeddings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1, "cache_budget_mb": 1.0}, "exclude"),
        ({"keep": -1}, "keep=-1"),
        ({"cache_budget_mb": -1.0}, "cache_budget_mb=-1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cached_step(Encoder(), data(), loss_of, **options)


def test_no_chunk_and_no_scalar_are_refused():
    with pytest.raises(ValueError, match="no chunk"):
        cached_step(Encoder(), [], loss_of)
    with pytest.raises(ValueError, match="0-d"):
        cached_step(Encoder(), data(), torch.cat)


# --- inside Lightning -----------------------------------------------------------------------------


class Module(LightningModule):
    """Automatic optimization with the last backward left to Lightning.

    Args:
        cached: Whether to cache.
    """

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.encoder, self.cached = Encoder(), cached

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        chunks = list(batch.split(ROWS))
        if not self.cached:
            return loss_of([self.encoder(chunk) for chunk in chunks])
        parts = self.trainer.accumulate_grad_batches
        if batch_idx % parts == 0:
            self.optimizers().zero_grad()
        return cached_step(
            self.encoder, chunks, loss_of, lambda x: (x / parts).backward(), keep=1,
            defer_last=True,
        ).loss  # fmt: skip

    def optimizer_zero_grad(self, *arguments: Any) -> None:
        if not self.cached:
            super().optimizer_zero_grad(*arguments)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_lightning_accumulates_and_clips_as_without():
    weights = []
    for cached in (False, True):
        torch.manual_seed(0)
        module = Module(cached)
        loader = [torch.cat(data()) + i for i in range(4)]
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.5,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            logger=False,
        )  # fmt: skip
        torch.manual_seed(3)
        trainer.fit(module, train_dataloaders=DataLoader(loader, batch_size=None))
        assert trainer.global_step == 2
        weights.append([x.detach().clone() for x in module.parameters()])
    torch.testing.assert_close(weights[0], weights[1], atol=1e-12, rtol=0)
