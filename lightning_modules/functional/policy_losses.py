"""Clipped policy losses, KL estimators and their aggregation, token by token.

Shape legend: ``N`` sequences, ``T`` padded completion length. Masks are boolean or 0/1; what lies
under a zero is replaced before any arithmetic, because ``0 * inf`` is nan, also in the backward.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.sums import Metrics, masked_sum_count

Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum_const"]

MAX_LOG_RATIO = 20.0
"""Bound of |log ratio| in nats (as in verl): exp stays finite, so 0 * inf never makes a nan."""


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate per token, with separate bounds and an optional dual clip.

    ``loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))``, ``rho = exp(logp - old)``
    (PPO, arXiv 1707.06347, eq. 7; two bounds: DAPO, arXiv 2503.14476); with a dual clip c,
    ``min(loss, -A c)`` where ``A < 0`` (arXiv 1912.09729; verl takes c = 3). Our choice, as in
    verl: ``|log rho|`` is bounded by ``MAX_LOG_RATIO``, beyond which there is no gradient.

    Args:
        logprobs: ``[N, T]`` log-probabilities (nats) of the policy being trained.
        old_logprobs: ``[N, T]`` those of the policy that sampled; detached.
        advantages: ``[N]`` or ``[N, T]``; detached.
        mask: ``[N, T]``, nonzero at completion tokens.
        clip_low: Distance of the lower bound from 1, in [0, 1].
        clip_high: Distance of the upper bound from 1.
        dual_clip: Bound c > 1 on the ratio where the advantage is negative; None for none.

    Returns:
        ``(loss, metrics)``: loss ``[N, T]``, float32 or wider and exactly 0 (value and gradient)
        under a zero of the mask; metrics over tokens as (sum, count): ``ratio``, ``approx_kl_k1``
        and ``approx_kl_k3`` (KL(old || new), nats), and the share of tokens whose gradient a clip
        removes: ``clip_share_low``, ``clip_share_high``, ``clip_share_dual`` (if there is one).

    Raises:
        ValueError: For mismatched shapes or bounds out of range.

    Example:
        >>> logp, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
        >>> clipped_policy_loss(logp, old, torch.ones(1), torch.ones(1, 2))[0]
        tensor([[-1.0000, -1.2000]])
    """
    _check_shapes(logprobs, old_logprobs=old_logprobs, mask=mask)
    _check_bounds(clip_low, clip_high, dual_clip)
    live = mask.to(torch.bool)
    log_ratio = _masked_difference(logprobs, old_logprobs.detach(), live, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    gain = torch.where(live, _per_token(advantages, logprobs).to(ratio.dtype), 0.0)
    loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip_low, 1 + clip_high))
    values = {
        "ratio": ratio,
        "approx_kl_k1": -log_ratio,
        "approx_kl_k3": ratio - 1 - log_ratio,
        "clip_share_low": (gain < 0) & (ratio < 1 - clip_low),
        "clip_share_high": (gain > 0) & (ratio > 1 + clip_high),
    }
    if dual_clip is not None:
        loss = torch.where(gain < 0, torch.minimum(loss, -gain * dual_clip), loss)
        values["clip_share_dual"] = (gain < 0) & (ratio > dual_clip)
    metrics: Metrics = {name: masked_sum_count(value, live) for name, value in values.items()}
    return torch.where(live, loss, 0.0), metrics


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.5,
) -> tuple[Tensor, Metrics]:
    """Squared error of a critic per token; pessimistic where it moved far from its old values.

    ``max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)`` without a half, as in verl
    v0.4 [code]; the idea is that of PPO's policy clip (OpenAI baselines).

    Args:
        values: ``[N, T]`` values of the critic being trained.
        old_values: ``[N, T]`` those at the time of the rollout; detached.
        returns: ``[N, T]`` targets; detached.
        mask: ``[N, T]``, nonzero at completion tokens.
        clip: Largest change that counts, in units of reward; None for none.

    Returns:
        ``(loss, metrics)``: ``[N, T]``, 0 under a zero of the mask; ``value_loss`` and
        ``value_clip_share`` (share of tokens whose gradient the clip removes) as (sum, count).

    Raises:
        ValueError: Mismatched shapes or a clip that is not positive.

    Example:
        >>> one = torch.ones(1, 1)
        >>> clipped_value_loss(2 * one, 0 * one, one * 3, one, clip=0.5)[0]
        tensor([[6.2500]])
    """
    _check_shapes(values, old_values=old_values, returns=returns, mask=mask)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be above 0, or None for no clip")
    live = mask.to(torch.bool)
    target = torch.where(live, returns.detach(), 0.0)
    values = torch.where(live, values.float(), 0.0)
    loss = (values - target).square()
    is_clipped = torch.zeros_like(live)
    if clip is not None:
        old = torch.where(live, old_values.detach(), 0.0)
        near = torch.maximum(torch.minimum(values, old + clip), old - clip)
        bounded = (near - target).square()
        is_clipped = (bounded > loss) & (near != values)
        loss = torch.maximum(loss, bounded)
    metrics: Metrics = {
        "value_loss": masked_sum_count(loss, live),
        "value_clip_share": masked_sum_count(is_clipped, live),
    }
    return torch.where(live, loss, 0.0), metrics


def sampler_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float
) -> tuple[Tensor, Metrics]:
    """Truncated importance weights of tokens that another engine sampled.

    ``w = min(exp(logp - sampler), cap)``, to be multiplied with the policy loss: a sampler with
    other kernels, another precision or older weights draws from a slightly different distribution
    than the trainer differentiates. Truncation bounds the variance for a small bias (truncated
    importance sampling, Ionides 2008; per step in IMPALA, arXiv 1802.01561, eq. 1). Our choice: the
    cap is the user's, 2.0 suggested; |log ratio| is bounded by ``MAX_LOG_RATIO``.

    Args:
        logprobs: ``[N, T]`` log-probabilities (nats) of the trainer's own policy at the time of the
            rollout; detached.
        sampler_logprobs: ``[N, T]`` those that the engine reported.
        mask: ``[N, T]``, nonzero at completion tokens.
        cap: Largest weight, above 0.

    Returns:
        ``(weights, metrics)``: weights ``[N, T]`` without gradient, float32 or wider, 0 under a
        zero of the mask; metrics over tokens as (sum, count): their mean ``sampler_weight`` and the
        share of truncated ones, ``sampler_weight_clipped``.

    Raises:
        ValueError: For mismatched shapes or a cap that is not positive.

    Example:
        >>> mine, theirs = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
        >>> sampler_weights(mine, theirs, torch.ones(1, 2), cap=2.0)[0]
        tensor([[1., 2.]])
    """
    _check_shapes(logprobs, sampler_logprobs=sampler_logprobs, mask=mask)
    if not cap > 0:
        raise ValueError(f"cap={cap} must be above 0")
    live = mask.to(torch.bool)
    ratio = _masked_difference(logprobs.detach(), sampler_logprobs, live, MAX_LOG_RATIO).exp()
    weights = torch.where(live, ratio.clamp(max=cap), 0.0)
    metrics: Metrics = {
        "sampler_weight": masked_sum_count(weights, live),
        "sampler_weight_clipped": masked_sum_count(ratio > cap, live),
    }
    return weights, metrics


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: Estimator = "k3",
    clamp: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Estimate KL(policy || reference) per token from tokens that the policy sampled.

    With ``d = ref - logp`` (Schulman, "Approximating KL divergence", 2020): ``k1 = -d`` (unbiased,
    may be negative), ``k2 = d^2 / 2`` (biased, low variance), ``k3 = exp(d) - d - 1`` (unbiased,
    never negative; GRPO, arXiv 2402.03300, eq. 4). As a *loss* on fresh samples k1 has expected
    gradient zero, k2 that of KL(policy || reference), k3 that of KL(reference || policy).

    Args:
        logprobs: ``[N, T]`` log-probabilities (nats) of the policy.
        ref_logprobs: ``[N, T]`` those of the frozen reference; no gradient flows.
        estimator: ``k1``, ``k2`` or ``k3``.
        clamp: Bound of ``|d|`` in nats before the formula, so that one token cannot overflow
            ``exp``; no gradient beyond it. None for none.
        mask: ``[N, T]``; under a zero the result and its gradient are exactly 0. Needed where
            padding may hold -inf or nan, since masking afterwards comes too late for the gradient.

    Returns:
        ``[N, T]`` nats, float32 or wider.

    Raises:
        ValueError: For mismatched shapes, an unknown estimator or a bound that is not positive.

    Example:
        >>> kl_penalty(torch.tensor([[0.0]]), torch.tensor([[-1.0]]), estimator="k3")
        tensor([[0.3679]])
    """
    check_choice("estimator", estimator, get_args(Estimator))
    _check_shapes(logprobs, ref_logprobs=ref_logprobs)
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp={clamp} must be positive, or None for no bound")
    live = torch.ones_like(logprobs, dtype=torch.bool)
    if mask is not None:
        _check_shapes(logprobs, mask=mask)
        live = mask.to(torch.bool)
    difference = -_masked_difference(logprobs, ref_logprobs.detach(), live, clamp)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    # expm1 keeps the digits that exp(d) - 1 loses where the policies almost agree.
    return torch.expm1(difference) - difference


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    *,
    mode: Aggregation = "token_mean",
    num_tokens: Tensor | float | None = None,
    num_sequences: Tensor | float | None = None,
    max_length: float | None = None,
) -> Tensor:
    """Reduce a per-token loss to a scalar by denominators of the whole accumulation window.

    ``token_mean``: sum / num_tokens (DAPO, verl's default). ``sequence_mean``: sum over sequences
    of their token mean / num_sequences (GRPO, arXiv 2402.03300, eq. 3). ``sequence_sum_const``:
    sum / (num_sequences * max_length) (Dr. GRPO, arXiv 2503.20783). With window totals the losses
    of the micro-batches add up to that of one large batch; local counts give means of means.
    Our choice: a sequence without tokens (padding of a rank) is not counted by default.

    Args:
        per_token: ``[N, T]`` losses.
        mask: ``[N, T]``, nonzero at tokens that count.
        mode: How to reduce.
        num_tokens: Tokens in the window, for ``token_mean``; None counts this mask. May be a
            fraction, such as the total over all ranks divided by their number.
        num_sequences: Sequences in the window, for the other modes; None counts the rows of this
            mask that have a token.
        max_length: Constant length in tokens, for ``sequence_sum_const`` (where it is required).

    Returns:
        A 0-d tensor; 0 with zero gradient if the mask is empty.

    Raises:
        ValueError: For mismatched shapes, an unknown mode, a negative denominator, or
            ``sequence_sum_const`` without ``max_length``.

    Example:
        >>> loss, mask = torch.tensor([[1.0, 3.0], [8.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> aggregate(loss, mask, mode="token_mean"), aggregate(loss, mask, mode="sequence_mean")
        (tensor(4.), tensor(5.))
    """
    check_choice("mode", mode, get_args(Aggregation))
    _check_shapes(per_token, mask=mask)
    live = mask.to(torch.bool)
    values = torch.where(live, per_token, 0.0)
    if mode == "token_mean":
        return _divide(values.sum(), "num_tokens", live.sum() if num_tokens is None else num_tokens)
    if num_sequences is None:
        num_sequences = live.any(dim=-1).sum()
    if mode == "sequence_mean":
        rows = values.sum(dim=-1) / live.sum(dim=-1).clamp(min=1)
        return _divide(rows.sum(), "num_sequences", num_sequences)
    if max_length is None or not max_length > 0:
        raise ValueError(f"max_length={max_length} must be positive for mode='sequence_sum_const'")
    return _divide(values.sum() / max_length, "num_sequences", num_sequences)


def _divide(total: Tensor, name: str, count: Tensor | float) -> Tensor:
    """``total / count``, where a count of 0 (nothing in the window) leaves the zero total."""
    if not isinstance(count, Tensor):
        if not count >= 0:
            raise ValueError(f"{name}={count} must be at least 0")
        return total / (count or 1)
    # No branch on a tensor's value: that would make the device wait in every step.
    count = count.detach().to(device=total.device, dtype=total.dtype)
    return total / torch.where(count == 0, 1.0, count)


def _masked_difference(
    logprobs: Tensor, others: Tensor, live: Tensor, bound: float | None
) -> Tensor:
    """``logprobs - others``, float32 or wider, within the bound; 0 where not live."""
    dtype = torch.promote_types(torch.float32, logprobs.dtype)
    # Both are replaced before subtracting: -inf minus -inf would be nan.
    mine = torch.where(live, logprobs.to(dtype), 0.0)
    difference = mine - torch.where(live, others.to(dtype), 0.0)
    return difference if bound is None else difference.clamp(-bound, bound)


def _per_token(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """Detached advantages as ``[N, T]``."""
    if advantages.dim() == 1 and len(advantages) == len(logprobs):
        return advantages.detach().unsqueeze(-1).expand_as(logprobs)
    _check_shapes(logprobs, advantages=advantages)
    return advantages.detach()


def _check_shapes(expected: Tensor, **tensors: Tensor) -> None:
    """All must be ``[N, T]``: broadcasting here would only hide a mistake."""
    if expected.dim() != 2:
        raise ValueError(f"expected tensors of shape [N, T], got {tuple(expected.shape)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(expected.shape)}"
            raise ValueError(f"{name} has shape {shapes}")


def _check_bounds(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Refuse bounds that would invert or disable the clip."""
    problems = []
    if not 0 <= clip_low <= 1:
        problems.append(f"clip_low={clip_low} must lie in [0, 1]")
    if not clip_high >= 0:
        problems.append(f"clip_high={clip_high} must be at least 0")
    if dual_clip is not None and not dual_clip > 1:
        problems.append(f"dual_clip={dual_clip} must be greater than 1, or None for none")
    if problems:
        raise ValueError("; ".join(problems))
