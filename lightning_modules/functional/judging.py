"""Two-stage inference of ReflectRM (arXiv 2604.07506, equations 5 to 9) as pure functions.

Stage 1 samples N analyses with verdicts; the most confident one is the anchor. Stage 2 compares
every other analysis with the anchor; those that win form W, and W votes.

Shape legend: ``N`` outputs of one comparison, ``T`` padded length. Verdicts are 1 or 2, and 0 where
an output did not parse. All randomness comes in as uniforms, so that a run can be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.votes import UNPARSABLE, as_verdicts, check_uniform, majority

AnchorRule = Literal["confidence", "first", "random"]
WinnerRule = Literal["reflection", "random", "all", "oracle"]


class TwoStage(NamedTuple):
    """Outcome of the vote of stage 2.

    Args:
        verdict: 1 or 2; None if there is nothing to go by (scored as wrong).
        fallback: Whether the anchor had to vote, W being empty or tied.
        tie: Whether the vote of W alone was a tie.
        size: Number of outputs in W with a verdict, the anchor not counted.
    """

    verdict: int | None
    fallback: bool
    tie: bool
    size: int


def tail_confidence(logprobs: Tensor, mask: Tensor, fraction: float = 0.1) -> Tensor:
    """Mean of the lowest log-probs of each output (ReflectRM eq. 5).

    ``k = max(1, ceil(fraction * length))`` (our choice: the paper does not say how it rounds).
    Use the log-probs of the sampling distribution at temperature 1, before any top-p filter.

    Args:
        logprobs: ``[..., T]`` log-probabilities (nats) of the sampled tokens.
        mask: ``[..., T]``, nonzero at tokens of the output, in any position.
        fraction: Share of the tokens to average, in (0, 1].

    Returns:
        ``[...]`` nats, float32 or wider; -inf for an output without tokens. Our choice: an
        undefined (nan) log-prob counts as -inf, so that such an output is never the anchor while
        there is another.

    Raises:
        ValueError: For mismatched shapes or a fraction out of range.

    Example:
        >>> tail_confidence(torch.tensor([[-1.0, -4.0, -9.0]]), torch.tensor([[1, 1, 0]]))
        tensor([-4.])
    """
    if logprobs.shape != mask.shape or logprobs.dim() == 0:
        shapes = f"{tuple(logprobs.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"logprobs and mask must share a shape [..., T], got {shapes}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie in (0, 1]")
    live = mask.to(torch.bool)
    values = logprobs.detach().to(torch.promote_types(torch.float32, logprobs.dtype))
    values = torch.where(values.isnan(), -torch.inf, values)
    ordered = torch.where(live, values, torch.inf).sort(dim=-1).values
    # In integers: the float product 0.07 * 100 is above 7, and its ceiling would be 8.
    share = Fraction(str(float(fraction))).limit_denominator(10**6)
    length = live.sum(dim=-1)
    kept = (length * share.numerator + share.denominator - 1) // share.denominator
    kept = kept.clamp(min=1)
    place = torch.arange(values.shape[-1], device=values.device)
    lowest = torch.where(place < kept.unsqueeze(-1), ordered, 0.0).sum(dim=-1) / kept
    return torch.where(length > 0, lowest, -torch.inf)


def choose_anchor(
    confidence: Tensor | Sequence[float],
    verdicts: Tensor | Sequence[int],
    rule: AnchorRule = "confidence",
    uniform: float | None = None,
) -> int | None:
    """Choose the output that all others are compared with (ReflectRM eq. 6).

    Our choice: an unparsable output is never the anchor, since it could not break a tie.

    Args:
        confidence: ``[N]`` confidences, read by the rule ``confidence`` only; nan counts as -inf.
        verdicts: ``[N]`` values out of 0 (unparsable), 1 and 2.
        rule: ``confidence`` takes the highest (lowest index on ties), ``first`` the first parsable
            one, ``random`` one by ``uniform``.
        uniform: Draw in [0, 1), required by ``random``.

    Returns:
        Index of the anchor; None if no output parses.

    Raises:
        ValueError: For an unknown rule, a missing draw, an illegal verdict or mismatched lengths.

    Example:
        >>> choose_anchor([-0.1, -0.5, -0.3], [0, 1, 2])
        2
    """
    check_choice("rule", rule, get_args(AnchorRule))
    values = as_verdicts(verdicts)
    scores = torch.as_tensor(confidence).tolist()
    if len(scores) != len(values):
        raise ValueError(f"{len(scores)} confidences for {len(values)} verdicts")
    parsable = [index for index, value in enumerate(values) if value != UNPARSABLE]
    if rule == "random":
        if uniform is None:
            raise ValueError("rule='random' needs uniform, a draw from [0, 1)")
        check_uniform("uniform", uniform)
    if not parsable:
        return None
    if rule == "first":
        return parsable[0]
    if rule == "random" and uniform is not None:
        return parsable[min(int(uniform * len(parsable)), len(parsable) - 1)]
    # max keeps the first of equals, which is the lowest index.
    return max(parsable, key=lambda index: _no_nan(scores[index]))


def select_winners(
    beats_anchor: Tensor,
    verdicts: Tensor | Sequence[int],
    anchor: int | None,
    *,
    rule: WinnerRule = "reflection",
    copies: Tensor | None = None,
    exclude_copies: bool = False,
    label: int | None = None,
    uniforms: Tensor | None = None,
) -> Tensor:
    """The set W of outputs that vote (ReflectRM eq. 8), and its ablations.

    Eligible are the parsable outputs other than the anchor and, with ``exclude_copies``, those
    whose analysis is not the anchor's word for word (our choice: between equals a reflection is a
    coin toss). ``reflection`` takes the eligible that beat the anchor, ``random`` as many without
    replacement, ``all`` every eligible one, ``oracle`` those that are right, an upper bound.

    Args:
        beats_anchor: ``[N]`` bool, whether the reflection prefers the output over the anchor; an
            unparsable reflection must be False. The anchor's own entry is ignored.
        verdicts: ``[N]`` values out of 0 (unparsable), 1 and 2.
        anchor: Index of the anchor; None (nothing parses) gives an empty W.
        rule: Which of the eligible enter.
        copies: ``[N]`` bool, True where the analysis equals the anchor's; for ``exclude_copies``.
        exclude_copies: Whether copies are barred, under every rule.
        label: The right verdict, 1 or 2; required by ``oracle``.
        uniforms: ``[N]`` draws; ``random`` takes the eligible with the smallest.

    Returns:
        ``[N]`` bool, on the device of ``beats_anchor``.

    Raises:
        ValueError: For an unknown rule, a missing argument, or mismatched shapes.

    Example:
        >>> select_winners(torch.tensor([True, True, False]), [1, 2, 2], 0)
        tensor([False,  True, False])
    """
    check_choice("rule", rule, get_args(WinnerRule))
    values = torch.tensor(as_verdicts(verdicts), dtype=torch.long, device=beats_anchor.device)
    _check_vectors(len(values), beats_anchor=beats_anchor, copies=copies, uniforms=uniforms)
    if exclude_copies and copies is None:
        raise ValueError("exclude_copies=True needs copies")
    eligible = _eligible(values, anchor, copies if exclude_copies else None)
    chosen = eligible & beats_anchor.to(torch.bool)
    if rule == "reflection":
        return chosen
    if rule == "all":
        return eligible
    if rule == "oracle":
        if label not in (1, 2):
            raise ValueError(f"rule='oracle' needs label 1 or 2, got {label}")
        return eligible & (values == label)
    if uniforms is None:
        raise ValueError("rule='random' needs uniforms, one draw for each output")
    draws = torch.where(eligible, uniforms.to(eligible.device), torch.inf)
    drawn = draws.sort(stable=True).indices[: int(chosen.sum())]
    return torch.zeros_like(eligible).index_fill(0, drawn, True)


def two_stage_verdict(
    winners: Tensor | Sequence[bool], verdicts: Tensor | Sequence[int], anchor: int | None
) -> TwoStage:
    """Let W vote; an empty or tied W is joined by the anchor (ReflectRM eq. 9 and below).

    Our choices: members without a verdict do not vote; if the vote with the anchor ties as well
    (only an anchor without a verdict can leave one), the anchor's verdict counts, which is None.

    Args:
        winners: ``[N]`` bool, the set W; must not hold the anchor.
        verdicts: ``[N]`` values out of 0 (unparsable), 1 and 2.
        anchor: Index of the anchor; None if no output parses.

    Returns:
        The verdict and how it came about.

    Raises:
        ValueError: For mismatched lengths, an illegal verdict or index, an anchor in W, or no
            anchor although an output parses.

    Example:
        >>> two_stage_verdict([False, True, True], [1, 2, 1], 0)
        TwoStage(verdict=1, fallback=True, tie=True, size=2)
    """
    values = as_verdicts(verdicts)
    members = [bool(x) for x in (winners.tolist() if isinstance(winners, Tensor) else winners)]
    if len(members) != len(values):
        raise ValueError(f"{len(members)} winners for {len(values)} verdicts")
    if anchor is None:
        if any(values):
            raise ValueError("anchor=None, but an output parses: take it from choose_anchor")
        return TwoStage(None, fallback=False, tie=False, size=0)
    _check_anchor(anchor, len(values))
    if members[anchor]:
        raise ValueError(f"winners must not hold the anchor ({anchor}): it joins by itself")
    size = sum(
        member and value != UNPARSABLE for member, value in zip(members, values, strict=True)
    )
    verdict = majority(values, members)
    if verdict is not None:
        return TwoStage(verdict, fallback=False, tie=False, size=size)
    members[anchor] = True
    verdict = majority(values, members)
    if verdict is None:
        verdict = values[anchor] or None
    return TwoStage(verdict, fallback=True, tie=size > 0, size=size)


def _eligible(verdicts: Tensor, anchor: int | None, barred: Tensor | None) -> Tensor:
    """Outputs that may enter W: parsable, not the anchor, not barred."""
    eligible = verdicts != UNPARSABLE
    if anchor is None:
        return torch.zeros_like(eligible)
    _check_anchor(anchor, len(verdicts))
    eligible[anchor] = False
    return eligible if barred is None else eligible & ~barred.to(eligible.device, torch.bool)


def _no_nan(score: float) -> float:
    """A score that can be compared: nan becomes -inf."""
    return -math.inf if math.isnan(score) else score


def _check_anchor(anchor: int, size: int) -> None:
    """Refuse an index that is not one; negative ones would silently mean another output."""
    if not 0 <= anchor < size:
        raise ValueError(f"anchor={anchor} is no index into {size} outputs")


def _check_vectors(size: int, **vectors: Tensor | None) -> None:
    """All given tensors must have shape ``[size]``."""
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected ({size},)")
