"""Penalties against oracles: closed forms, invariances, directions of their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.compressor.interventions import (
    effective_rank,
    erank_shortfall,
    mean_entropy,
    nuclear_norm,
    reconstruction_loss,
    token_weights,
    whitening,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_of_slots_and_skipped_tokens():
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    slots = torch.tensor([[False, True, False, True], [True, False, False, True]])
    assert token_weights(mask).tolist() == mask.float().tolist()
    found = token_weights(mask, slots, slot_weight=3.0, skip=1)
    assert found.tolist() == [[0, 3, 1, 0], [0, 0, 1, 3]]


def test_loss_is_the_weighted_mean_and_ignores_what_has_no_weight():
    losses = torch.tensor([[1.0, 2.0, math.nan]], requires_grad=True)
    weights = torch.tensor([[1.0, 3.0, 0.0]])
    loss = reconstruction_loss(losses, weights)
    assert loss.item() == pytest.approx(7 / 4)
    assert reconstruction_loss(losses, weights, normalizer=14.0).item() == pytest.approx(0.5)
    loss.backward()
    assert losses.grad.tolist() == [[0.25, 0.75, 0.0]]
    assert reconstruction_loss(losses, torch.zeros(1, 3)).item() == 0.0


def test_mean_entropy_counts_labels_only():
    entropy = torch.tensor([[1.0, 3.0, 9.0]])
    assert mean_entropy(entropy, torch.tensor([[True, True, False]])).item() == 2.0


def test_nuclear_norm_of_known_spectra_and_of_a_doubled_batch():
    assert nuclear_norm(3.0 * torch.eye(4)).item() == pytest.approx(3.0 * 4 / 2)
    vectors = normal(20, 6)
    torch.testing.assert_close(nuclear_norm(vectors), nuclear_norm(vectors.repeat(2, 1)))
    rotation = torch.linalg.qr(normal(6, 6, seed=1)).Q
    torch.testing.assert_close(nuclear_norm(vectors), nuclear_norm(vectors @ rotation))


def test_whitening_is_zero_for_white_vectors_alone():
    white = torch.linalg.qr(normal(30, 6) - normal(30, 6).mean(0)).Q
    assert whitening(5.0 * white + 2.0).item() == pytest.approx(0.0, abs=1e-10)
    one = torch.outer(normal(30), torch.eye(4, dtype=torch.float64)[0])
    assert whitening(one).item() == pytest.approx((3**2 + 3) / 4)  # one share is 4, three are 0


def test_effective_rank_oracles():
    centred = torch.cat([torch.eye(5), -torch.eye(5)])
    assert effective_rank(centred).item() == pytest.approx(5.0, rel=1e-5)
    line = torch.outer(torch.arange(6.0), torch.ones(4))
    assert effective_rank(line).item() == pytest.approx(1.0, rel=1e-3)
    vectors = normal(40, 7)
    torch.testing.assert_close(effective_rank(vectors), effective_rank(9.0 * vectors + 1.0))
    torch.testing.assert_close(effective_rank(vectors), effective_rank(vectors.repeat(3, 1)))
    assert effective_rank(torch.ones(5, 3)).item() == pytest.approx(1.0, abs=1e-3)


def test_shortfall_ends_at_the_floor():
    centred = torch.cat([torch.eye(5), -torch.eye(5)])
    assert erank_shortfall(centred, 4.0).item() == 0.0
    assert erank_shortfall(centred, 10.0).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("penalty,sign", [(nuclear_norm, -1), (whitening, 1)])
def test_penalties_move_the_rank_as_they_say(penalty, sign):
    vectors = (normal(60, 8) * torch.linspace(0.2, 1.5, 8)).requires_grad_()
    before = effective_rank(vectors).item()
    optimizer = torch.optim.SGD([vectors], lr=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        penalty(vectors).backward()
        optimizer.step()
    assert sign * (effective_rank(vectors).item() - before) > 0.05


def test_the_floor_raises_the_rank():
    vectors = (normal(60, 8) * torch.linspace(0.01, 1.5, 8)).requires_grad_()
    before = effective_rank(vectors).item()
    (gradient,) = torch.autograd.grad(erank_shortfall(vectors, 8.0), vectors)
    assert effective_rank(vectors - 5.0 * gradient).item() > before


def test_gradients_agree_with_differences():
    vectors = normal(6, 3).requires_grad_()
    for penalty in (nuclear_norm, whitening, effective_rank):
        assert torch.autograd.gradcheck(penalty, (vectors,))
