"""Log-prob and entropy of chosen tokens from hidden states and the head's weight, in PyTorch.

The plain path on any device: logits are made in slices of rows so that a workspace bounds what
lives at once in the forward pass. Rows of an ignored target are skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogprobEntropy(NamedTuple):
    """Per-token results, shaped like the targets, float32 (float64 for float64 input), in nats.

    Args:
        logprob: Log-probability of the target.
        entropy: Shannon entropy of the distribution, or None where it was not asked for.
    """

    logprob: Tensor
    entropy: Tensor | None


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    with_entropy: bool = True,
    entropy_grad: bool = True,
    workspace_mb: int = 256,
) -> LogprobEntropy:
    """Log-prob of each target, and the entropy, under ``softmax((hidden @ weight.T + bias) / t)``.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``, one row a token.
        targets: ``[N]`` token ids; ``ignore_index`` gives zeros without gradient.
        bias: ``[V]`` or None.
        temperature: Divides the logits before everything else.
        ignore_index: Target value of rows to leave out.
        with_entropy: Whether to compute the entropy.
        entropy_grad: Whether gradients flow through the entropy.
        workspace_mb: Bound (MiB) on the logits of one slice.

    Returns:
        Values shaped like ``targets``.

    Raises:
        TypeError: ``hidden`` and ``weight`` have different dtypes outside autocast.
        IndexError: A target is outside the vocabulary.
    """
    vocabulary = weight.shape[0]
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"hidden is {hidden.dtype} but weight is {weight.dtype}: use one dtype")
    kept = targets != ignore_index
    if targets.numel() and bool(((targets < 0) | (targets >= vocabulary))[kept].any()):
        raise IndexError(f"a target is outside the vocabulary of {vocabulary} tokens")
    rows = max(1, workspace_mb * 2**20 // (4 * vocabulary))
    safe = torch.where(kept, targets, 0)
    parts = [
        _slice(
            hidden[i : i + rows],
            weight,
            safe[i : i + rows],
            bias,
            temperature,
            with_entropy,
            entropy_grad,
        )
        for i in range(0, max(1, len(targets)), rows)
    ]
    logprob = torch.cat([part[0] for part in parts])
    entropy = (
        torch.cat([part[1] for part in parts if part[1] is not None]) if with_entropy else None
    )
    return LogprobEntropy(
        torch.where(kept, logprob, 0.0),
        None if entropy is None else torch.where(kept, entropy, 0.0),
    )


def _slice(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    with_entropy: bool,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    entropy = None
    if with_entropy:
        source = logprobs if entropy_grad else logprobs.detach()
        # 0 * -inf of an excluded token is no information, not NaN
        entropy = -(source.exp() * source.clamp(min=torch.finfo(source.dtype).min)).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy
