"""Public functions: argument checks, choice of the back end, and results of its row quantities.

Dtypes: ``hidden`` and ``weight`` are equal (bfloat16, float16, float32, and float64 in PyTorch) or
autocast is active; results are float32 (float64 for float64), never lower: bfloat16 log-probs
ruin importance ratios. All values are in nats, of the logits divided by ``temperature``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import logits_ops, ops
from .checks import check_inputs, check_logits, check_region, own_limit
from .dispatch import choose_backend, workspace_bytes
from .fields import FIELDS
from .reference import plain_head, plain_logits
from .regions import CEStats, LogprobEntropy, Region, TopK, pack_region
from .vocab_shards import group_name

Backend = Literal["auto", "triton", "torch", "interpret", "reference"]
Side = tuple[Tensor, Tensor]


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    region: Region | None = None,
    side: Side | None = None,
    ignore_index: int = -100,
    vocab_limit: int | None = None,
    with_entropy: bool = True,
    entropy_grad: bool = True,
    workspace_mb: int | None = None,
    backend: Backend = "auto",
    process_group: Any = None,
    vocab_start: int = 0,
) -> LogprobEntropy:
    """Log-prob of each target and entropies under ``softmax((hidden @ weight.T + bias) / t)``.

    No tensor of N x V elements is kept, forward or backward (``backend="reference"`` does).

    Args:
        hidden: ``(..., H)``.
        weight: ``(V, H)``, one row a token.
        targets: ``(...)`` int64 token ids.
        bias: ``(V,)`` or None.
        temperature: Divides the logits before everything else.
        region: ``TopK``, ``TopP`` or None: also the entropy of that trust region.
        side: ``(X2 (..., r), B (V, r))``: adds ``X2 @ B.T`` to the logits (LoRA on the head).
        ignore_index: Target of rows to leave out: zeros, without gradient; they may hold NaN.
        vocab_limit: Columns at and beyond it do not exist (padded vocabularies).
        with_entropy: Whether to return the full entropy.
        entropy_grad: Whether gradients flow through it.
        workspace_mb: Bound (MiB) on logits that exist at once; None takes 64 on a CPU, 512 on
            CUDA, or ``FUSED_WORKSPACE_MB``.
        backend: ``auto``, ``triton`` (CUDA), ``torch`` (any device), ``interpret`` (the Triton
            kernels on a CPU, for tests) or ``reference`` (full logits and autograd).
        process_group: Ranks that share the vocabulary: ``weight``, ``bias`` and ``side[1]`` are
            this rank's rows, hidden states and targets equal on all; the gradient of hidden states
            is summed over the ranks.
        vocab_start: First token of this rank's rows; with ``process_group``.

    Returns:
        Fields shaped like ``targets``.

    Raises:
        TypeError: Different dtypes outside autocast, or a sharded (``DTensor``) weight.
        IndexError: A target is outside the vocabulary (on CUDA only with ``FUSED_CHECK=1``).
        ValueError: Shapes that do not fit, or a region, temperature or limit out of range.
        RuntimeError: ``backend="triton"`` cannot run here; says why.
        NotImplementedError: TopP or ``backend="reference"`` with ``process_group``.

    Example:
        >>> out = linear_logprob_entropy(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([0, 7]))
        >>> bool((out.entropy - torch.tensor(8.0).log()).abs().max() < 1e-6)
        True
    """
    found = _row_quantities(
        *(hidden, weight, targets, bias, side, temperature, ignore_index, vocab_limit, region),
        entropy_grad=with_entropy and entropy_grad,
        workspace_mb=workspace_mb,
        backend=backend,
        process_group=process_group,
        vocab_start=vocab_start,
    )
    return _logprob_entropy(found, targets, region, with_entropy, entropy_grad)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    normalizer: Tensor | float | None = None,
    side: Side | None = None,
    vocab_limit: int | None = None,
    return_stats: bool = False,
    workspace_mb: int | None = None,
    backend: Backend = "auto",
    process_group: Any = None,
    vocab_start: int = 0,
) -> Tensor | tuple[Tensor, CEStats]:
    """Cross-entropy of a linear head without its logits.

    Per token, with ``e`` the smoothing and ``l`` the z-loss:
    ``(1-e)(lse - z_t) + e (lse - mean z) + l lse^2``, times the token's weight.

    Args:
        hidden: ``(..., H)``.
        weight: ``(V, H)``.
        targets: ``(...)`` int64.
        bias: ``(V,)`` or None.
        token_weights: ``(...)`` or None for 1 everywhere; they act before any sum.
        ignore_index: Target of rows to leave out.
        label_smoothing: In [0, 1); spread over the columns below ``vocab_limit``.
        z_loss: Factor of ``lse^2`` (PaLM's form), at least 0.
        temperature: Divides the logits.
        reduction: ``mean`` divides by the sum of the kept rows' weights.
        normalizer: Replaces that denominator (a global token count under accumulation).
        side: As in ``linear_logprob_entropy``.
        vocab_limit: As in ``linear_logprob_entropy``.
        return_stats: Also per-token ``CEStats``, without gradient.
        workspace_mb: As in ``linear_logprob_entropy``.
        backend: As in ``linear_logprob_entropy``.
        process_group: As in ``linear_logprob_entropy``.
        vocab_start: As in ``linear_logprob_entropy``.

    Returns:
        A scalar, or ``(...)`` with ``reduction="none"``; with ``return_stats`` a pair. A mean over
        no rows at all is 0 with zero gradient (PyTorch's own gives NaN).

    Raises:
        ValueError: A value is out of range.
        TypeError: As in ``linear_logprob_entropy``.
        IndexError: As in ``linear_logprob_entropy``.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: give a value in [0, 1)")
    if z_loss < 0.0:
        raise ValueError(f"z_loss={z_loss}: give 0 or more")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: give 'mean', 'sum' or 'none'")
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(
            f"token_weights have the shape {tuple(token_weights.shape)}, the targets "
            f"{tuple(targets.shape)}: give one weight a token"
        )
    found = _row_quantities(
        *(hidden, weight, targets, bias, side, temperature, ignore_index, vocab_limit, None),
        entropy_grad=False,
        with_mean=label_smoothing > 0.0,
        with_argmax=return_stats,
        workspace_mb=workspace_mb,
        backend=backend,
        process_group=process_group,
        vocab_start=vocab_start,
    )
    losses = (label_smoothing - 1.0) * found["logprob"]
    if label_smoothing > 0.0:
        losses = losses - label_smoothing * found["mean_logprob"]
    if z_loss > 0.0:
        losses = losses + z_loss * found["lse"].square()
    kept = (targets != ignore_index).reshape(-1)
    weights = kept.to(losses.dtype)
    if token_weights is not None:
        weights = torch.where(kept, token_weights.reshape(-1).to(losses.dtype), 0.0)
    losses = losses * weights
    if reduction == "none":
        loss = losses.view(targets.shape)
    elif reduction == "sum":
        loss = losses.sum()
    else:
        given: Any = weights.sum() if normalizer is None else normalizer
        total = torch.as_tensor(given, dtype=losses.dtype, device=losses.device)
        loss = losses.sum() / torch.where(total == 0, 1.0, total)
    if not return_stats:
        return loss
    hit = (found["argmax"] == targets.reshape(-1)) & kept
    stats = (-found["logprob"], found["lse"], found["entropy"], hit.to(losses.dtype))
    return loss, CEStats(*(value.detach().view(targets.shape) for value in stats))


def logprob_entropy_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    region: Region | None = None,
    inplace_backward: bool = False,
    ignore_index: int = -100,
    with_entropy: bool = True,
    entropy_grad: bool = True,
) -> LogprobEntropy:
    """The same quantities from logits that exist already.

    Args:
        logits: ``(..., V)``.
        targets: ``(...)`` int64.
        temperature: Divides the logits.
        region: Trust region or None.
        inplace_backward: Let the backward pass overwrite the logits with their gradient: no second
            buffer of their size. Nothing else may read them then, and it runs once.
        ignore_index: Target of rows to leave out.
        with_entropy: Whether to return the full entropy.
        entropy_grad: Whether gradients flow through it.

    Returns:
        Fields shaped like ``targets``.

    Raises:
        TypeError: Unsupported dtypes.
        ValueError: Shapes that do not fit, or a region or temperature out of range.
        IndexError: A target is outside the vocabulary.
    """
    check_logits(logits, targets, temperature)
    check_region(region, logits.shape[-1])
    flat, ids = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    options = (temperature, ignore_index, pack_region(region), with_entropy and entropy_grad)
    if inplace_backward:
        outputs = logits_ops.LogitsHeadInPlace.apply(flat, ids, *options)
    else:
        outputs = logits_ops.logits_head(flat, ids, *options)
    found = dict(zip(FIELDS, outputs, strict=True))
    if region is not None:
        mass = (found["region_log_sum"] - found["log_sum"]).exp()
        found["region_mass"] = torch.where(ids != ignore_index, mass, 0.0)
    return _logprob_entropy(found, targets, region, with_entropy, entropy_grad)


def _row_quantities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side: Side | None,
    temperature: float,
    ignore_index: int,
    vocab_limit: int | None,
    region: Region | None,
    *,
    entropy_grad: bool,
    with_mean: bool = False,
    with_argmax: bool = False,
    workspace_mb: int | None,
    backend: str,
    process_group: Any,
    vocab_start: int,
) -> dict[str, Tensor]:
    """Row quantities ``(N,)`` by name, from whichever back end."""
    hidden, weight, bias, side = check_inputs(
        *(hidden, weight, targets, bias, side, temperature, region, process_group)
    )
    if process_group is None:
        limit = own_limit(vocab_limit, weight.shape[0])
        check_region(region, limit)
    else:
        limit = own_limit(vocab_limit, weight.shape[0], vocab_start)
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    beside = None if side is None else (side[0].reshape(-1, side[0].shape[-1]), side[1])
    chosen = choose_backend(backend, flat, weight)
    if chosen == "reference" and process_group is not None:
        raise NotImplementedError("backend='reference' with process_group: use 'torch' or 'triton'")
    if chosen == "reference":
        return _plain(flat, weight, ids, bias, beside, temperature, ignore_index, limit, region)
    outputs = ops.linear_head(
        *(flat, weight, ids, bias, *(beside or (None, None)), temperature, ignore_index, limit),
        *(pack_region(region), entropy_grad, with_mean, with_argmax),
        *(workspace_bytes(workspace_mb, flat), chosen, group_name(process_group), vocab_start),
    )
    found = dict(zip(FIELDS, outputs, strict=True))
    if region is not None:
        mass = (found["region_log_sum"] - found["log_sum"]).exp()
        found["region_mass"] = torch.where(ids != ignore_index, mass, 0.0)
    return found


def _plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    side: Side | None,
    temperature: float,
    ignore_index: int,
    limit: int,
    region: Region | None,
) -> dict[str, Tensor]:
    """The plain path: logits of the rows that are kept, differentiated by autograd."""
    rows = (targets != ignore_index).nonzero()[:, 0]
    ops.check_targets(targets[rows], limit, weight.shape[0])
    beside = None if side is None else (side[0][rows], side[1])
    logits = plain_logits(hidden[rows], weight, bias, beside, limit)
    values = plain_head(logits, targets[rows], temperature, region)
    return {
        name: value.new_zeros(len(targets)).index_copy(0, rows, value)
        for name, value in values._asdict().items()
        if value is not None
    }


def _logprob_entropy(
    found: dict[str, Tensor],
    targets: Tensor,
    region: Region | None,
    with_entropy: bool,
    entropy_grad: bool,
) -> LogprobEntropy:
    def shaped(name: str) -> Tensor:
        return found[name].view(targets.shape)

    entropy = shaped("entropy") if with_entropy else None
    if entropy is not None and not entropy_grad:
        entropy = entropy.detach()
    return LogprobEntropy(
        logprob=shaped("logprob"),
        entropy=entropy,
        region_entropy=None if region is None else shaped("region_entropy"),
        lse=shaped("lse").detach(),
        region_size=None if region is None else shaped("region_size"),
        region_mass=None if region is None else shaped("region_mass").detach(),
    )


__all__ = [
    "CEStats",
    "LogprobEntropy",
    "TopK",
    "linear_cross_entropy",
    "linear_logprob_entropy",
    "logprob_entropy_from_logits",
]
