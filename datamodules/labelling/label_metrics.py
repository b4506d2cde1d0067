"""What labels look like in numbers (card, section 7): ``labels/*``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.labelling.records import LabelledTurn, UtilityRow


def label_metrics(
    turns: Sequence[LabelledTurn],
    rows: Sequence[UtilityRow],
    drops: Counter[str],
    counts: Counter[str],
) -> dict[str, float]:
    """Metrics of one labelling; those of a signal that was not measured are left out.

    Args:
        turns: All labelled ones.
        rows: Made of them.
        drops: Turns without rows, by reason.
        counts: Sums over questions, see ``pipeline``.

    Returns:
        By name ``labels/...``. ``drop_*``, ``skipped_*``, ``failed_*``, ``rows``, ``turns``,
        ``rollouts``, ``trajectories`` and ``mismatched`` count; ``lr_mean`` is in [0, 1];
        ``searches`` are a trajectory's mean.
    """
    kept = len(turns) - sum(drops.values())
    found = {
        "rows": len(rows),
        "turns": len(turns),
        "rows_per_turn": _share(len(rows), kept),
        "kept_turn_frac": _share(kept, len(turns)),
        "positives_per_turn": _share(sum(_sibling_counts(rows)), kept),
        "drop_no_em": drops["no_em"],
        "drop_low_lr": drops["low_lr"],
        "drop_few_negs": drops["few_negatives"],
        "drop_unreadable": drops["unreadable"],
        "trajectories": counts["trajectories"],
        "mismatched": counts["mismatched"],
        "failed_trajectories": counts["failed_trajectories"],
        "failed_turns": counts["failed_turns"],
        "trajectory_em": _share(counts["right"], counts["trajectories"]),
        "searches": _share(counts["searches"], counts["trajectories"]),
        "skipped_no_budget": counts["no_budget"],
        "skipped_few_candidates": counts["few_candidates"],
    }
    if counts["requests"]:
        found["judge_parse_fail"] = _share(counts["unread"], counts["requests"])
    if counts["queries"]:
        found["subanswer_coverage"] = _share(counts["sub_answers"], counts["queries"])
    if counts["rollouts"]:
        found["rollouts"] = counts["rollouts"]
    found |= _local(turns) | _global(turns) | _together(turns)
    return {f"labels/{name}": float(value) for name, value in found.items()}


def histograms(turns: Sequence[LabelledTurn]) -> dict[str, Tensor]:
    """Local scores (0 to 100) of candidates, apart for those whose rollout was wrong and right.

    Args:
        turns: Labelled.

    Returns:
        ``labels/lr_gac0`` and ``labels/lr_gac1``, or ``labels/lr`` without rollouts; float ``(n,)``
        each, empty ones left out.
    """
    parts: dict[str, list[int]] = {}
    for turn in turns:
        for place, score in enumerate(turn.local or ()):
            name = "lr" if turn.right is None else f"lr_gac{turn.right[place]}"
            parts.setdefault(f"labels/{name}", []).append(score)
    return {name: torch.tensor(parts[name], dtype=torch.float32) for name in sorted(parts)}


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation; None where one of them is constant.

    Args:
        first: Numbers.
        second: As many.

    Example:
        >>> correlation([0, 1, 0, 1], [10, 90, 10, 90]), correlation([1, 1], [0, 5])
        (1.0, None)
    """
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    both = torch.tensor([first, second], dtype=torch.float64)
    return float(torch.corrcoef(both)[0, 1])


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _sibling_counts(rows: Sequence[UtilityRow]) -> list[int]:
    """Positives of each turn that gave rows."""
    return [len(row.siblings) for row in rows if row.uid.endswith("/0")]


def _local(turns: Sequence[LabelledTurn]) -> dict[str, float]:
    scores = [score for turn in turns for score in turn.local or ()]
    return {"lr_mean": sum(scores) / len(scores) / 100} if scores else {}


def _global(turns: Sequence[LabelledTurn]) -> dict[str, float]:
    known = [turn.right for turn in turns if turn.right]
    if not known:
        return {}
    flat = [value for right in known for value in right]
    return {
        "gac_mean": sum(flat) / len(flat),
        "gac_all_one_frac": sum(all(right) for right in known) / len(known),
        "gac_all_zero_frac": sum(not any(right) for right in known) / len(known),
    }


def _together(turns: Sequence[LabelledTurn]) -> dict[str, float]:
    known = [(t.right, t.local) for t in turns if t.right is not None and t.local is not None]
    pairs = [pair for right, local in known for pair in zip(right, local, strict=True)]
    found = correlation([gac for gac, _ in pairs], [lr for _, lr in pairs])
    return {} if found is None else {"gac_lr_corr": found}
