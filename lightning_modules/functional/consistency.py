"""Pseudo-labels that agree with earlier ones, critiques that agree with each other.

Paper: "ConsistRM", arXiv 2604.07484; code: yuliangCarmelo/ConsistRM. Votes and labels are signs: -1
names slot 1, +1 slot 2, 0 neither [code]. A group of votes is a tally ``(sum, count)``, so that a
tie of two integer tallies is found exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.sums import Metrics, masked_sum_count

LabelRule = Literal["sum_sign", "agree_only"]
Eviction = Literal["farthest", "fifo"]
Tally = tuple[float, float]
#: Similarities that differ by less are ties: equal texts must fare alike, whatever the rounding.
TIE = 1e-5


def sign_of(slot: int | None) -> int:
    """The sign of a verdict: -1 for slot 1, +1 for slot 2, 0 for None or 0.

    Example:
        >>> sign_of(1), sign_of(2), sign_of(None)
        (-1, 1, 0)
    """
    return {1: -1, 2: 1}.get(slot or 0, 0)


def slot_of(sign: int) -> int | None:
    """The inverse of ``sign_of``; None for 0.

    Example:
        >>> slot_of(-1), slot_of(1), slot_of(0)
        (1, 2, None)
    """
    return {-1: 1, 1: 2}.get(sign)


def tally(votes: Sequence[int], decay: float = 1.0, *, count_zeros: bool = False) -> Tally:
    """Sum and count of votes, the last one with weight 1.

    Args:
        votes: Signs, oldest first.
        decay: Factor a vote of age, in (0, 1]; 1 counts all alike [paper].
        count_zeros: Whether a 0 counts: a remembered label of 0 does, a vote that did not parse
            does not [code].

    Example:
        >>> tally([1, 0, -1, 1]), tally([1, 0, -1, 1], count_zeros=True)
        ((1, 3), (1, 4))
    """
    cast = [vote for vote in votes if vote or count_zeros]
    if decay == 1.0:
        return sum(cast), len(cast)
    weights = [decay**age for age in reversed(range(len(cast)))]
    return sum(w * vote for w, vote in zip(weights, cast, strict=True)), sum(weights)


def pseudo_label(
    online: Tally,
    memory: Tally = (0, 0),
    *,
    rule: LabelRule = "sum_sign",
    threshold: float = 0.0,
) -> int:
    """``sgn(mean of the online votes + mean of the memory)``; a tally without votes counts 0.

    Args:
        online: Of this visit's votes.
        memory: Of earlier pseudo-labels; (0, 0) makes the plain majority.
        rule: ``sum_sign`` [formula, code]: the stronger mean wins; ``agree_only`` [text of the
            paper's summary]: no label where both point in different ways.
        threshold: No label where the sum of means is not beyond it, in [0, 2) [our choice: 0].

    Returns:
        -1, 0 or 1.

    Raises:
        ValueError: An unknown rule, or a threshold out of range.

    Example:
        >>> pseudo_label((5, 8)), pseudo_label((2, 8), (-1, 4)), pseudo_label((2, 8), (-1, 1))
        (1, 0, -1)
    """
    check_choice("rule", rule, get_args(LabelRule))
    if not 0 <= threshold < 2:
        raise ValueError(f"threshold={threshold} must be in [0, 2)")
    (now, num_now), (then, num_then) = online, memory
    if rule == "agree_only" and now * then < 0:
        return 0
    # the sum of both means, times both counts: an integer where the tallies are
    score = now * (num_then or 1) + then * (num_now or 1)
    bound = threshold * (num_now or 1) * (num_then or 1)
    return 0 if abs(score) <= bound else 1 if score > 0 else -1


def remember(
    entries: Sequence[int],
    label: int,
    *,
    size: int = 20,
    evict: Eviction = "farthest",
    uniform: float = 0.0,
) -> list[int]:
    """The memory of one pair with a further label; one entry goes where ``size`` is reached.

    Args:
        entries: Signs, oldest first.
        label: -1, 0 or 1; 0 is kept, too [code].
        size: Of the memory [code: 20].
        evict: ``farthest``: the entry farthest from the sign of the memory's sum, so that those
            who disagree are forgotten first [code]; ``fifo``: the oldest.
        uniform: Draw in [0, 1) that decides among equally far entries.

    Raises:
        ValueError: An unknown rule, or a size below 1.

    Example:
        >>> remember([1, 1, -1], 1, size=3), remember([1, 1, -1], 1, size=3, evict="fifo")
        ([1, 1, 1], [1, -1, 1])
    """
    check_choice("evict", evict, get_args(Eviction))
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    kept = list(entries)
    if len(kept) >= size:
        place = 0
        if evict == "farthest":
            total = sum(kept)
            middle = (total > 0) - (total < 0)
            distance = [abs(entry - middle) for entry in kept]
            worst = [i for i, value in enumerate(distance) if value == max(distance)]
            place = worst[min(int(uniform * len(worst)), len(worst) - 1)]
        del kept[place]
    return [*kept, label]


def mean_similarity(embeddings: Tensor, subgroups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of each text with the others of its subgroup.

    Args:
        embeddings: ``(N, D)``; rows need not be normalised.
        subgroups: ``(N,)`` integers, -1 for rows of none.

    Returns:
        Similarities ``(N,)`` float32, 0 for rows that stand alone, and ``(N,)`` the size of each
        row's subgroup, 0 for rows of none.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> mean_similarity(rows, torch.tensor([0, 0, 0]))
        (tensor([0.5000, 0.5000, 0.0000]), tensor([3, 3, 3]))
    """
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    same = (subgroups[:, None] == subgroups[None, :]) & (subgroups >= 0)[:, None]
    size = same.sum(1)
    others = same & ~torch.eye(len(subgroups), dtype=torch.bool, device=same.device)
    total = (unit @ unit.T).where(others, torch.zeros(())).sum(1)
    return total / (size - 1).clamp(min=1), size


def top_share_bonus(
    scores: Tensor, subgroups: Tensor, *, share: float = 0.5, bonus: float = 0.1
) -> Tensor:
    """``bonus`` for the best ``ceil(share * n)`` rows of each subgroup of n > 1 rows [code].

    All rows that tie with the last of them get it as well [our choice: the bonus must not depend on
    the order of the rows; a subgroup of equal texts fares alike].

    Args:
        scores: ``(N,)``; rows that are not finite get nothing.
        subgroups: ``(N,)`` integers, -1 for rows that cannot get it.
        share: In (0, 1] [code: 0.5].
        bonus: Units of reward [paper: 0.1].

    Returns:
        ``(N,)`` float32.

    Example:
        >>> top_share_bonus(torch.tensor([0.9, 0.2, 0.8, 0.7]), torch.tensor([0, 0, 0, 1]))
        tensor([0.1000, 0.0000, 0.1000, 0.0000])
    """
    out = torch.zeros(len(scores))
    values = scores.float().cpu()
    for number in subgroups.unique().tolist():
        rows = ((subgroups.cpu() == number) & values.isfinite()).nonzero().flatten()
        if number < 0 or len(rows) < 2:
            continue
        count = int(-(-len(rows) * share // 1))
        last = values[rows].topk(count).values[-1]
        out[rows[values[rows] >= last - TIE]] = bonus
    return out


def vote_metrics(
    labels: Sequence[int], online: Sequence[Tally], memory: Sequence[Tally]
) -> Metrics:
    """What one draw of pairs says about its pseudo-labels, one entry a pair.

    ``zero``: no label; ``balance``: mean sign of the labels (-1: all slot 1); ``online`` and
    ``memory``: mean absolute mean vote; ``agreement``: both point the same way, where both point.

    Args:
        labels: -1, 0 or 1.
        online: Tallies of this visit.
        memory: Tallies of the memory before it.
    """
    now = torch.tensor([_mean(pair) for pair in online])
    then = torch.tensor([_mean(pair) for pair in memory])
    label = torch.tensor(labels, dtype=torch.float32)
    return {
        "zero": masked_sum_count(label == 0),
        "balance": masked_sum_count(label),
        "online": masked_sum_count(now.abs()),
        "memory": masked_sum_count(then.abs()),
        "agreement": masked_sum_count(now.sign() == then.sign(), (now != 0) & (then != 0)),
    }


def _mean(pair: Tally) -> float:
    total, count = pair
    return float(total) / float(count or 1)
