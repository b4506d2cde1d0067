"""How much a pairwise judge depends on the order of the two responses, and on its confidence."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.functional.sums import Metrics, accumulation_dtype, masked_sum_count


def position_metrics(forward: Tensor, backward: Tensor, labels: Tensor) -> Metrics:
    """Accuracy and position metrics of pairs that were judged in both orders.

    - ``accuracy``: right verdicts over all ``2 P`` judgements; unparsable ones are wrong.
    - ``consistency``: pairs right in *both* orders (ReflectRM, arXiv 2604.07506, "positional
      consistency"); bounded by accuracy, 0.25 for independent guesses.
    - ``flip_rate``: pairs whose two verdicts name different responses, over the pairs parsable in
      both orders (our choice: an unparsable output is a fault of format, and has its own rate).
    - ``first_slot_rate``: verdicts for slot 1 over the parsable verdicts; 0.5 is unbiased.
    - ``invalid_rate``: unparsable verdicts over all ``2 P``.

    A judge that always says 1 has 0.5, 0, 1, 1, 0; a perfect one 1, 1, 0, 0.5, 0.

    Args:
        forward: ``[P]`` verdicts on (response 1, response 2): 0 (unparsable), 1 or 2.
        backward: ``[P]`` verdicts on (response 2, response 1), in the slots of *that* prompt, so
            that the same response is 1 here and 2 there.
        labels: ``[P]`` better response, 1 or 2, in the slots of the forward prompt.

    Returns:
        ``name -> (sum, count)`` of 0-d tensors, without a prefix.

    Raises:
        ValueError: For mismatched shapes or a value out of range (names its index).

    Example:
        >>> ones = torch.ones(2, dtype=torch.long)
        >>> total, count = position_metrics(ones, ones, torch.tensor([1, 2]))["flip_rate"]
        >>> (total / count).item()
        1.0
    """
    _check("forward", forward, labels, (0, 1, 2))
    _check("backward", backward, labels, (0, 1, 2))
    _check("labels", labels, labels, (1, 2))
    # From here on a verdict names a response, not a slot; 0 stays 0.
    swapped = torch.where(backward == 0, 0, 3 - backward)
    right = torch.stack([forward == labels, swapped == labels])
    slots = torch.stack([forward, backward])
    parsable = slots != 0
    return {
        "accuracy": masked_sum_count(right),
        "consistency": masked_sum_count(right.all(dim=0)),
        "flip_rate": masked_sum_count(forward != swapped, parsable.all(dim=0)),
        "first_slot_rate": masked_sum_count(slots == 1, parsable),
        "invalid_rate": masked_sum_count(~parsable),
    }


def confidence_auc(confidence: Tensor, correct: Tensor) -> tuple[float, int]:
    """Probability that a right output is more confident than a wrong one; ties count half.

    The area under the ROC curve (Mann-Whitney U over the number of pairs). As a metric it is
    ``(auc * num_pairs, num_pairs)``, which merges over batches as a mean over pairs.

    Args:
        confidence: ``[N]`` confidences; nan counts as -inf.
        correct: ``[N]`` bool, whether the output is right.

    Returns:
        ``(auc, num_pairs)``; without a pair of a right and a wrong output ``(0.5, 0)``, the value
        of a confidence that knows nothing (our choice).

    Raises:
        ValueError: For mismatched shapes.

    Example:
        >>> confidence_auc(torch.tensor([-0.1, -0.2, -0.2]), torch.tensor([True, True, False]))
        (0.75, 2)
    """
    if confidence.dim() != 1 or confidence.shape != correct.shape:
        shapes = f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
        raise ValueError(f"confidence and correct must be vectors of one length, got {shapes}")
    # The confidences keep their dtype up to here: a wider one never merges or splits ties.
    scores = confidence.detach().to(accumulation_dtype(confidence.device))
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    is_right = correct.to(scores.device, torch.bool)
    right, wrong = scores[is_right], scores[~is_right].sort().values
    num_pairs = len(right) * len(wrong)
    if num_pairs == 0:
        return 0.5, 0
    below = torch.searchsorted(wrong, right).sum()
    not_above = torch.searchsorted(wrong, right, right=True).sum()
    return (below + not_above).item() / (2 * num_pairs), num_pairs


def _check(name: str, values: Tensor, labels: Tensor, allowed: tuple[int, ...]) -> None:
    """Refuse a shape other than that of the labels, and values that are not allowed."""
    if values.dim() != 1 or values.shape != labels.shape:
        shapes = f"{tuple(values.shape)}; labels have {tuple(labels.shape)}"
        raise ValueError(f"{name} must have shape [P], got {shapes}")
    legal = torch.isin(values, torch.tensor(allowed, device=values.device))
    bad = (~legal).nonzero().flatten().tolist()
    if bad:
        value = values[bad[0]].item()
        raise ValueError(f"{name}[{bad[0]}] is {value}; allowed: {', '.join(map(str, allowed))}")
