"""From labelled turns to training rows: positives, negatives, and why turns are dropped.

Card, 2.5 [code]: candidates are ordered by (global, local), both descending. The first one must
be right and have ``pos_threshold`` points; everything equal to it is a positive, everything else a
negative. ``local`` orders by the judge alone, ``global`` by the rollouts alone without a threshold
[code]; ``gold_ids`` takes the supporting passages [our choice]. Scores are integers, so equality
is exact.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from datamodules.labelling.options import LABELS, NEGATIVES
from datamodules.labelling.records import LabelledTurn, UtilityRow


def select(
    turns: Sequence[LabelledTurn],
    label: str = "both",
    pos_threshold: int = 60,
    max_positives: int = 3,
    num_negatives: int = 15,
    negatives: str = "random",
    seed: int = 0,
) -> tuple[list[UtilityRow], Counter[str]]:
    """Training rows of all turns; see ``LabelOptions`` for the options.

    Rows of a turn share its negatives, which are drawn once from (seed, question, turn); of more
    positives than ``max_positives`` the retriever's best make rows, all are ``siblings``.

    Args:
        turns: With the labels that ``label`` needs.
        label: Which signals count.
        pos_threshold: Fewest points of a positive.
        max_positives: Most rows a turn.
        num_negatives: Negatives a row.
        negatives: Which ones.
        seed: Of the draw.

    Returns:
        Rows in the order of the turns, and dropped turns by reason: ``unreadable`` (a signal is
        missing), ``no_em`` (no candidate is right; none is gold), ``low_lr``, ``few_negatives``.

    Raises:
        ValueError: ``label`` or ``negatives`` is unknown.

    Example:
        >>> turn = LabelledTurn("q", 0, "?", (), "x", ("a", "b"), (90, 90), (0, 1), (0, 0))
        >>> [(row.positive, row.negatives) for row in select([turn], num_negatives=1)[0]]
        [('b', ('a',))]
    """
    _check(label, negatives)
    rows: list[UtilityRow] = []
    drops: Counter[str] = Counter()
    for turn in turns:
        positives, reason = _positives(turn, label, pos_threshold)
        if not reason:
            drawn = _negatives(turn, positives, num_negatives, negatives, seed)
            reason = "few_negatives" if drawn is None else ""
        if reason:
            drops[reason] += 1
        else:
            rows += _rows(turn, positives, drawn or [], max_positives)
    return rows, drops


def _check(label: str, negatives: str) -> None:
    problems = []
    if label not in LABELS:
        problems.append(f"data.labels.label={label!r}: allowed are {', '.join(LABELS)}")
    if negatives not in NEGATIVES:
        problems.append(f"data.labels.negatives={negatives!r}: allowed are {', '.join(NEGATIVES)}")
    if problems:
        raise ValueError("; ".join(problems))


def _positives(turn: LabelledTurn, label: str, threshold: int) -> tuple[list[int], str]:
    """Indices of the candidates that equal the best one, or why there are none."""
    ranks = _ranks(turn, label)
    if ranks is None:
        return [], "unreadable"
    best = max(ranks)
    if label != "local" and best[0] == 0:
        return [], "no_em"
    if label in ("both", "local") and best[-1] < threshold:
        return [], "low_lr"
    return [index for index, rank in enumerate(ranks) if rank == best], ""


def _ranks(turn: LabelledTurn, label: str) -> list[tuple[int, ...]] | None:
    """What candidates are ordered by; None where a signal is missing."""
    signals = {
        "both": (turn.right, turn.local),
        "local": (turn.local,),
        "global": (turn.right,),
        "gold_ids": (turn.gold,),
    }[label]
    known = [signal for signal in signals if signal is not None]
    return [*zip(*known, strict=True)] if len(known) == len(signals) else None


def _negatives(
    turn: LabelledTurn, positives: Sequence[int], count: int, form: str, seed: int
) -> list[int] | None:
    """Indices of the turn's negatives; None where there are fewer than ``count``."""
    if form == "in_batch_only":
        return []
    pool = [index for index in range(len(turn.candidates)) if index not in set(positives)]
    if form == "gac0_only":
        pool = [index for index in pool if turn.right is not None and turn.right[index] == 0]
    if len(pool) < count:
        return None
    if form == "top":
        return pool[:count]
    return random.Random(f"{seed}/negatives/{turn.question_uid}/{turn.turn}").sample(pool, count)


def _rows(
    turn: LabelledTurn, positives: Sequence[int], negatives: Sequence[int], most: int
) -> list[UtilityRow]:
    siblings = tuple(turn.candidates[index] for index in positives)
    return [
        UtilityRow(
            uid=f"{turn.question_uid}/{turn.turn}/{number}",
            question=turn.question,
            history=turn.history,
            query=turn.query,
            positive=turn.candidates[index],
            negatives=tuple(turn.candidates[one] for one in negatives),
            scores=tuple(-1 if turn.local is None else turn.local[one] for one in order),
            siblings=siblings,
        )
        for number, index in enumerate(positives[:most])
        for order in [(index, *negatives)]
    ]
