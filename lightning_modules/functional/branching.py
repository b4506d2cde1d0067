"""Where to branch: scores of a position from its most probable next tokens (ROSE).

Paper: "Reinforced Efficient Reasoning via Semantically Diverse Exploration", arXiv 2601.05053.
With probabilities ``p_i`` of the returned candidates (not renormalised [code]) and unit vectors
``e_i`` of their input-embedding rows:

    H   = -sum_i p_i log p_i                                        ``entropy``
    SD  = -sum_ij p_i p_j cos_ij        = -|sum p e|^2              ``cosine_paper``   [paper]
    SD' = -sum_{i != j} p_i p_j cos_ij  = -(|sum p e|^2 - sum p^2)  ``cosine_code``    [code]
    D   = sum_ij p_i p_j (1 - cos_ij)   = (sum p)^2 - |sum p e|^2   (Rao's quadratic entropy)

``semantic_paper = SD H``, ``semantic_code = SD' H``, ``semantic_rao = D H``.

SD and SD' are largest where the model is certain, so the first two products prefer a certain token
to almost any uncertain one. ``semantic_rao`` is 0 exactly there (and where all candidates mean the
same) and grows in both factors, which is what the paper describes [our choice: the default].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_modules.functional.choices import check_choice

BranchScore = Literal[
    "entropy",
    "cosine_paper",
    "cosine_code",
    "semantic_paper",
    "semantic_code",
    "semantic_rao",
]
BRANCH_SCORES: tuple[str, ...] = get_args(BranchScore)
#: Positions whose embedding rows exist at once: C rows of the model's width each.
CHUNK = 256


def candidate_entropy(logprobs: Tensor) -> Tensor:
    """Entropy ``H`` over the returned candidates.

    Args:
        logprobs: ``(L, C)`` nats; minus infinity for a token that cannot come.

    Returns:
        ``(L,)``.
    """
    return torch.special.entr(logprobs.exp()).sum(-1)


def resultant(logprobs: Tensor, rows: Tensor, center: Tensor | None = None) -> Tensor:
    """``|sum_i p_i e_i|^2``, the probability-weighted sum of all cosines.

    Args:
        logprobs: ``(L, C)``.
        rows: ``(L, C, D)`` embedding rows, of any length; a zero row has cosine 0 with all others.
        center: ``(D,)`` subtracted from the rows first, e.g. their mean over the vocabulary.

    Returns:
        ``(L,)``.
    """
    rows = rows.to(logprobs.dtype)
    if center is not None:
        rows = rows - center.to(rows)
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return (logprobs.exp()[..., None] * unit).sum(-2).square().sum(-1)


def divergence(logprobs: Tensor, rows: Tensor, center: Tensor | None = None) -> Tensor:
    """Rao's quadratic entropy ``D`` of the candidates; arguments and shape as ``resultant``."""
    total = logprobs.exp().sum(-1).square()
    return (total - resultant(logprobs, rows, center)).clamp(min=0)


def branch_score(
    name: BranchScore, logprobs: Tensor, rows: Tensor, center: Tensor | None = None
) -> Tensor:
    """Score of every position; branch at the largest.

    Args:
        name: See the module's docstring.
        logprobs: ``(L, C)`` nats of the candidates.
        rows: ``(L, C, D)`` their embedding rows.
        center: ``(D,)`` or None, see ``resultant``.

    Returns:
        ``(L,)``.

    Raises:
        ValueError: An unknown name.

    Example:
        >>> two = torch.tensor([[0.5, 0.5]]).log()  # equally probable, orthogonal
        >>> branch_score("semantic_rao", two, torch.eye(2)[None])
        tensor([0.3466])
    """
    check_choice("branch_score", name, BRANCH_SCORES)
    entropy = candidate_entropy(logprobs)
    if name == "entropy":
        return entropy
    if name == "semantic_rao":
        return entropy * divergence(logprobs, rows, center)
    spread = -resultant(logprobs, rows, center)
    if name.endswith("_code"):
        spread = spread + logprobs.exp().square().sum(-1)
    return spread * entropy if name.startswith("semantic_") else spread


def by_chunks(
    score: Callable[[Tensor, Tensor], Tensor], ids: Tensor, logprobs: Tensor, table: Tensor
) -> Tensor:
    """``score(logprobs, rows)`` of all positions, with few embedding rows in memory at once.

    Args:
        score: Of ``(l, C)`` and ``(l, C, D)``.
        ids: ``(L, C)`` token ids.
        logprobs: ``(L, C)``.
        table: ``(V, D)`` input-embedding rows, anywhere.

    Returns:
        ``(L,)`` on the table's device.
    """
    pieces = [
        score(values.to(table.device), table[index.to(table.device)])
        for index, values in zip(ids.split(CHUNK), logprobs.split(CHUNK), strict=True)
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0)
