"""Clipped losses, KL estimators and aggregation: truth tables, slow loops and autograd."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.functional.policy_losses import (
    MAX_LOG_RATIO,
    aggregate,
    clipped_policy_loss,
    kl_penalty,
)
from lightning_modules.functional.sums import means

torch.set_num_threads(1)

NAN, INF = math.nan, math.inf


def one_token(ratio, advantage, **options):
    """Loss, its derivative by the log-prob, and the metrics of a single token."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, metrics = clipped_policy_loss(
        logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), **options
    )
    loss.sum().backward()
    return loss.item(), logp.grad.item(), means(metrics)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "active", "clipped"),
    [
        (1.0, 2.0, None, -2.0, True, None),
        (1.0, -2.0, None, 2.0, True, None),
        (1.1, 2.0, None, -2.2, True, None),
        (1.5, 2.0, None, -2.6, False, "clip_share_high"),
        (0.5, 2.0, None, -1.0, True, None),  # worse than before: the gradient must pull it back
        (1.5, -2.0, None, 3.0, True, None),
        (0.5, -2.0, None, 1.8, False, "clip_share_low"),
        (0.95, -2.0, None, 1.9, True, None),
        (2.9, -2.0, 3.0, 5.8, True, None),
        (5.0, -2.0, None, 10.0, True, None),
        (5.0, -2.0, 3.0, 6.0, False, "clip_share_dual"),
        (5.0, 2.0, 3.0, -2.6, False, "clip_share_high"),
        (0.5, -2.0, 3.0, 1.8, False, "clip_share_low"),
        (5.0, 0.0, 3.0, 0.0, False, None),
    ],
)
def test_clip_truth_table(ratio, advantage, dual_clip, loss, active, clipped):
    value, gradient, metrics = one_token(
        ratio, advantage, clip_low=0.1, clip_high=0.3, dual_clip=dual_clip
    )
    assert value == pytest.approx(loss)
    assert gradient == pytest.approx(-advantage * ratio if active else 0.0)
    shares = {name: share for name, share in metrics.items() if name.startswith("clip_share")}
    assert shares == {name: float(name == clipped) for name in shares}
    assert ("clip_share_dual" in shares) == (dual_clip is not None)


def slow_loss(logp, old, advantage, low, high, dual):
    ratio = math.exp(logp - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -advantage * dual) if advantage < 0 else loss


@pytest.mark.parametrize("per_token", [True, False])
def test_equals_the_slow_loop(per_token):
    generator = torch.Generator().manual_seed(0)
    shape = (6, 7)
    logp, old = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(shape, generator=generator) < 0.7
    advantages = torch.randn(shape if per_token else 6, generator=generator, dtype=torch.float64)
    loss, metrics = clipped_policy_loss(
        logp, old, advantages, mask, clip_low=0.1, clip_high=0.4, dual_clip=2.0
    )
    kl, count = 0.0, 0
    for n, t in mask.nonzero().tolist():
        gain = (advantages[n, t] if per_token else advantages[n]).item()
        expected = slow_loss(logp[n, t].item(), old[n, t].item(), gain, 0.1, 0.4, 2.0)
        assert loss[n, t].item() == pytest.approx(expected)
        kl += (old[n, t] - logp[n, t]).item()
        count += 1
    assert loss[~mask].tolist() == [0.0] * int((~mask).sum())
    assert metrics["approx_kl_k1"][0].item() == pytest.approx(kl)
    assert {int(n) for _, n in metrics.values()} == {count}
    assert metrics["ratio"][0].item() == pytest.approx((logp - old)[mask].exp().sum().item())


@pytest.mark.parametrize("rubbish", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["logprobs", "old", "advantages"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int64])
def test_masked_positions_have_zero_loss_and_gradient(rubbish, which, mask_dtype):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(mask_dtype)
    tensors = {
        "logprobs": torch.full((2, 3), -0.5),
        "old": torch.full((2, 3), -0.6),
        "advantages": torch.full((2, 3), -1.5),
    }
    tensors[which][mask == 0] = rubbish
    logp = tensors["logprobs"].requires_grad_()
    loss, metrics = clipped_policy_loss(
        logp, tensors["old"], tensors["advantages"], mask, dual_clip=3.0
    )
    penalty = kl_penalty(logp, tensors["old"], mask=mask)
    (aggregate(loss, mask) + aggregate(penalty, mask)).backward()
    assert loss[mask == 0].tolist() == penalty[mask == 0].tolist() == [0.0] * 3
    assert logp.grad[mask == 0].tolist() == [0.0] * 3
    assert bool((logp.grad[mask != 0] != 0).all())
    assert all(math.isfinite(value) for value in means(metrics).values())
    assert {int(count) for _, count in metrics.values()} == {3}


def test_live_nan_is_not_hidden():
    logp = torch.tensor([[NAN, -1.0]])
    loss, _ = clipped_policy_loss(logp, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2))
    assert math.isnan(loss[0, 0].item())


@pytest.mark.parametrize("old", [-INF, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratio_stays_finite(old, advantage):
    logp = torch.zeros(1, 1, requires_grad=True)
    loss, _ = clipped_policy_loss(
        logp, torch.full((1, 1), old), torch.tensor([advantage]), torch.ones(1, 1)
    )
    loss.sum().backward()
    assert math.isfinite(loss.item()) and logp.grad.item() == 0.0
    assert abs(loss.item()) <= math.exp(MAX_LOG_RATIO) * 1.001


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_sum_const"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_one_on_policy_pass_is_reinforce_with_baseline(mode, dual_clip):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 6, (5, 4, 1), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4]).unsqueeze(-1)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    advantages = rewards - rewards.mean()
    options = {"mode": mode, "max_length": 4}

    def logprobs():
        return logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)

    logp = logprobs()
    loss, metrics = clipped_policy_loss(logp, logp.detach(), advantages, mask, dual_clip=dual_clip)
    (clipped,) = torch.autograd.grad(aggregate(loss, mask, **options), logits)
    score = aggregate(-advantages.unsqueeze(-1) * logprobs(), mask, **options)
    (reinforce,) = torch.autograd.grad(score, logits)
    torch.testing.assert_close(clipped, reinforce, rtol=1e-12, atol=1e-14)
    assert clipped.abs().max() > 0
    assert bool((clipped[~mask] == 0).all())
    values = means(metrics)
    assert values.pop("ratio") == 1.0
    assert set(values.values()) == {0.0}


def test_half_precision_is_computed_in_float32():
    logp = torch.full((1, 2), -1.0, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = clipped_policy_loss(logp, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2))
    penalty = kl_penalty(logp, torch.zeros(1, 2, dtype=torch.bfloat16))
    assert loss.dtype == penalty.dtype == torch.float32


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda d: -d),
        ("k2", lambda d: d * d / 2),
        ("k3", lambda d: math.exp(d) - d - 1),
    ],
)
@pytest.mark.parametrize("difference", [-3.0, -0.5, 0.0, 0.5, 3.0])
def test_kl_estimators_by_hand(estimator, formula, difference):
    logp = torch.tensor([[-1.0]], dtype=torch.float64)
    value = kl_penalty(logp, logp + difference, estimator=estimator).item()
    assert value == pytest.approx(formula(difference), abs=1e-12)
    bounded = kl_penalty(logp, logp + difference, estimator=estimator, clamp=1.0).item()
    assert bounded == pytest.approx(formula(max(-1.0, min(1.0, difference))), abs=1e-12)


def test_clamped_kl_cannot_overflow():
    logp = torch.full((1, 1), -500.0, requires_grad=True)
    value = kl_penalty(logp, torch.zeros(1, 1), clamp=10.0)
    value.sum().backward()
    assert value.item() == pytest.approx(math.expm1(10.0) - 10.0) and logp.grad.item() == 0.0


def test_kl_expectations_over_a_whole_vocabulary():
    """Values are KL(p || r) for k1 and k3; gradients are 0, that of KL(p || r), of KL(r || p)."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    reverse = (ref.exp() * (ref - logp)).sum()
    targets = {"k1": torch.zeros_like(exact) * logits.sum(), "k2": exact, "k3": reverse}
    for estimator, target in targets.items():
        per_token = kl_penalty(logp[None], ref[None], estimator=estimator)[0]
        mean = (logp.exp().detach() * per_token).sum()
        if estimator != "k2":
            torch.testing.assert_close(mean, exact)
        (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
        (expected,) = torch.autograd.grad(target, logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_approximate_kl_of_old_and_new_policy():
    """Tokens come from the old policy, so the mean of both estimates is KL(old || new)."""
    old = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    new = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    counts = torch.tensor([7, 2, 1])
    stretched = (x.repeat_interleave(counts)[None] for x in (new, old))
    _, metrics = clipped_policy_loss(*stretched, torch.ones(1), torch.ones(1, 10))
    exact = (old.exp() * (old - new)).sum().item()
    assert means(metrics)["approx_kl_k1"] == pytest.approx(exact)
    assert means(metrics)["approx_kl_k3"] == pytest.approx(exact)


LOSS = torch.tensor([[1.0, 3.0, NAN], [8.0, NAN, NAN], [NAN, NAN, NAN]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "token_mean"}, 4.0),
        ({"mode": "token_mean", "num_tokens": 24}, 0.5),
        ({"mode": "token_mean", "num_tokens": torch.tensor(1.5)}, 8.0),
        ({"mode": "sequence_mean"}, 5.0),
        ({"mode": "sequence_mean", "num_sequences": 4}, 2.5),
        ({"mode": "sequence_sum_const", "max_length": 3}, 2.0),
        ({"mode": "sequence_sum_const", "max_length": 3, "num_sequences": 8}, 0.5),
    ],
)
def test_aggregate_by_hand(options, expected):
    assert aggregate(LOSS, MASK, **options).item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_sum_const"])
def test_eight_micro_batches_equal_one_batch(mode):
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.randint(0, 6, (16, 1), generator=generator)
    inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    totals = {
        "num_tokens": int(mask.sum()),
        "num_sequences": int(mask.any(-1).sum()),
        "max_length": 5,
    }
    losses, gradients = {}, {}
    for pieces in (1, 2, 8, 16):
        parts = zip(inputs.chunk(pieces), mask.chunk(pieces), strict=True)
        losses[pieces] = sum(aggregate(x * weights, m, mode=mode, **totals) for x, m in parts)
        (gradients[pieces],) = torch.autograd.grad(losses[pieces], weights)
        torch.testing.assert_close(losses[pieces], losses[1])
        torch.testing.assert_close(gradients[pieces], gradients[1])
    local = aggregate(inputs * weights, mask, mode=mode, max_length=5)
    torch.testing.assert_close(local, losses[1])


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_sum_const"])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("totals", [None, 0, 5, torch.tensor(0)])
def test_empty_mask_gives_zero_with_zero_gradient(mode, shape, totals):
    values = torch.full(shape, NAN, requires_grad=True)
    loss = aggregate(
        values,
        torch.zeros(shape),
        mode=mode,
        num_tokens=totals,
        num_sequences=totals,
        max_length=4,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(values.grad, torch.zeros(shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: aggregate(x, x, mode="token-mean"), "did you mean 'token_mean'"),
        (lambda x: aggregate(x, x, mode="sequence"), "allowed: 'token_mean', 'sequence_mean', "),
        (lambda x: aggregate(x, x, mode="sequence_sum_const"), "max_length=None"),
        (lambda x: aggregate(x, x, num_tokens=-1), "num_tokens=-1"),
        (lambda x: aggregate(x, x[:1]), "mask has shape"),
        (lambda x: kl_penalty(x, x, estimator="K3"), "did you mean 'k3'"),
        (lambda x: kl_penalty(x, x, clamp=0.0), "clamp=0.0"),
        (lambda x: kl_penalty(x, x, mask=x[:1]), "mask has shape"),
        (lambda x: clipped_policy_loss(x, x, x, x, clip_low=-1), "clip_low=-1"),
        (lambda x: clipped_policy_loss(x, x, x, x, clip_high=NAN), "clip_high=nan"),
        (lambda x: clipped_policy_loss(x, x, x, x, dual_clip=1.0), "dual_clip=1.0"),
        (lambda x: clipped_policy_loss(x, x[:1], x, x), "old_logprobs has shape"),
        (lambda x: clipped_policy_loss(x, x, x[0], x), "advantages has shape"),
        (lambda x: clipped_policy_loss(x[0], x, x, x), r"shape \[N, T\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3))
