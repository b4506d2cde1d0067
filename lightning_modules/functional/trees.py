"""Credit in a tree of completions: what each segment between two branch points was worth (ROSE).

A node is a place at which a chain branched off, and the root. Its value is the mean reward of the
chains that pass through it; a leaf's is its own reward. Every token of a segment gets the
difference of the values at its ends [paper]:

    A_t = V(node behind) - V(node before),   summed over a chain: r - V(root)

Without any branching that is ``r - mean`` (Dr.GRPO). The length term then takes credit from correct
chains that are longer than the shortest correct one, from where the two part:

    ratio = (|shortest| - b) / (|chain| - b),   f = min(1 - ratio^alpha, f_max)
    A_t <- A_t - |A_t| f   behind the last common node b

Where we differ from the authors' code [our choice: card section 8]: a node is (first chain that has
it, position), where theirs is the position alone, so that different nodes of one depth are averaged
(``node_identity="position"`` does as they do); "correct" is a reward of at least
``correct_threshold``, where theirs is any reward that is not 0.

Shape legend: ``B`` prompts, ``n`` chains a prompt, ``N = B n``, ``T`` longest chain.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_modules.functional.choices import check_choice

NodeIdentity = Literal["owner", "position"]


class SegmentAdvantages(NamedTuple):
    """Advantages and what the length term did.

    Args:
        advantages: ``(N, T)`` float32, 0 behind the end of a chain.
        factors: ``(B, n)`` the f of each chain, 0 where it lost nothing.
        depth: ``(B, n)`` nodes on the way to the leaf, without the root.
    """

    advantages: Tensor
    factors: Tensor
    depth: Tensor


def token_owners(parent: Tensor, branch_pos: Tensor, width: int) -> Tensor:
    """Which chain first wrote each token.

    Args:
        parent: ``(n,)`` earlier chains, -1 for none.
        branch_pos: ``(n,)`` tokens taken from the parent.
        width: Tokens.

    Returns:
        ``(n, width)``; a chain owns what follows its branch position.
    """
    owners = torch.arange(len(parent))[:, None].repeat(1, width)
    for chain, (origin, position) in enumerate(
        zip(parent.tolist(), branch_pos.tolist(), strict=True)
    ):
        if origin >= 0:
            owners[chain, :position] = owners[origin, :position]
    return owners


def node_values(
    reward: Tensor, parent: Tensor, branch_pos: Tensor, lengths: Tensor
) -> dict[tuple[int, int], float]:
    """Values of the nodes of one tree without its root, for pictures.

    Args:
        reward: ``(n,)``.
        parent: ``(n,)`` earlier chains, -1 for none.
        branch_pos: ``(n,)`` tokens taken from the parent.
        lengths: ``(n,)`` tokens of whole chains.

    Returns:
        ``(chain, position)`` of a node to the mean reward of the chains that pass through; the
        chain is the first that has the node.
    """
    owners = token_owners(parent, branch_pos, int(lengths.max()) + 1)
    found: dict[tuple[int, int], float] = {}
    for chain in (parent >= 0).nonzero().flatten().tolist():
        position = int(branch_pos[chain])
        owner = int(owners[chain, position - 1])
        found[owner, position] = float(reward[owners[:, position - 1] == owner].mean())
    return found


class _Nodes(NamedTuple):
    positions: Tensor  # (K,) ascending, the root first
    passes: Tensor  # (n, K) whether a chain has a node there
    same: Tensor  # (n, n, K) whether two chains share it


def _nodes(parent: Tensor, branch_pos: Tensor, lengths: Tensor, identity: str) -> _Nodes:
    """Nodes of one tree. Node k lies before token k, so its owner is that of token ``k - 1``."""
    positions = torch.cat([torch.zeros(1, dtype=torch.long), branch_pos.unique()]).unique()
    owners = token_owners(parent, branch_pos, int(lengths.max()) + 1)
    owner = owners[:, (positions - 1).clamp(min=0)]
    owner[:, 0] = -1  # all chains share the root
    opened = {
        (int(owner[chain, torch.searchsorted(positions, position)]), int(position))
        for chain, position in enumerate(branch_pos)
        if parent[chain] >= 0
    }
    passes = torch.tensor(
        [[k == 0 or (o, k) in opened for o, k in zip(row, positions.tolist(), strict=True)]
         for row in owner.tolist()]
    )  # fmt: skip
    same = passes[:, None] & passes[None, :]
    if identity == "owner":
        same &= owner[:, None] == owner[None, :]
    return _Nodes(positions, passes, same)


def segment_advantages(
    reward: Tensor,
    parent: Tensor,
    branch_pos: Tensor,
    lengths: Tensor,
    *,
    length_alpha: float = 0.0,
    correct_threshold: float = 0.5,
    f_max: float = 1.0,
    node_identity: NodeIdentity = "owner",
    dedupe_shared_prefix: bool = False,
) -> SegmentAdvantages:
    """Advantages of all tokens of B trees.

    Args:
        reward: ``(B, n)``.
        parent: ``(B, n)`` chain that a chain branched from, always an earlier one; -1 for none.
        branch_pos: ``(B, n)`` tokens it took from there; 0 where there is none.
        lengths: ``(B, n)`` tokens of whole chains.
        length_alpha: Exponent of the length term; 0 for none.
        correct_threshold: Least reward of a correct chain.
        f_max: Bound on the share of credit that the length term takes.
        node_identity: ``owner``, or ``position`` as in the authors' code.
        dedupe_shared_prefix: Divide a token's advantage by the number of chains that share it.

    Raises:
        ValueError: Shapes differ, a parent is not earlier, a value is out of range.

    Example:
        >>> zero, none = torch.zeros(1, 2, dtype=torch.long), -torch.ones(1, 2, dtype=torch.long)
        >>> result = segment_advantages(torch.tensor([[1.0, 0.0]]), none, zero, zero + 2)
        >>> result.advantages
        tensor([[ 0.5000,  0.5000],
                [-0.5000, -0.5000]])
    """
    check_choice("node_identity", node_identity, get_args(NodeIdentity))
    _check(reward, parent, branch_pos, lengths, length_alpha, f_max)
    batch, size = reward.shape
    width = int(lengths.max()) if lengths.numel() else 0
    advantages = torch.zeros(batch, size, width, dtype=torch.float64)
    factors, depth = torch.zeros(batch, size), torch.zeros(batch, size)
    for tree in range(batch):
        nodes = _nodes(parent[tree], branch_pos[tree], lengths[tree], node_identity)
        rewards = reward[tree].double()
        advantages[tree] = _differences(rewards, nodes, lengths[tree], width)
        depth[tree] = nodes.passes.sum(1) - 1.0
        if length_alpha > 0:
            is_correct = rewards >= correct_threshold
            starts, shares = _length_factors(is_correct, nodes, lengths[tree], length_alpha, f_max)
            behind = torch.arange(width) >= starts[:, None]
            advantages[tree] -= advantages[tree].abs() * shares[:, None] * behind
            factors[tree] = shares.float()
        if dedupe_shared_prefix:
            owners = token_owners(parent[tree], branch_pos[tree], width)
            advantages[tree] /= (owners[:, None] == owners[None, :]).sum(1)
    flat = advantages.reshape(batch * size, width).float()
    return SegmentAdvantages(flat, factors, depth)


def _differences(rewards: Tensor, nodes: _Nodes, lengths: Tensor, width: int) -> Tensor:
    """``(n, width)`` value behind minus value before, for every token."""
    shared = nodes.same.double()
    values = torch.einsum("cdk,d->ck", shared, rewards) / shared.sum(1).clamp(min=1)
    result = torch.zeros(len(rewards), width, dtype=torch.float64)
    for chain, length in enumerate(lengths.tolist()):
        own = nodes.passes[chain]
        edges = [*nodes.positions[own].tolist(), length]
        levels = [*values[chain, own].tolist(), float(rewards[chain])]
        for start, end, before, behind in zip(edges, edges[1:], levels, levels[1:], strict=False):
            result[chain, start:end] = behind - before
    # rounding in a mean of equal rewards must not make a gradient
    return torch.zeros_like(result) if bool((rewards == rewards[0]).all()) else result


def _length_factors(
    is_correct: Tensor, nodes: _Nodes, lengths: Tensor, alpha: float, f_max: float
) -> tuple[Tensor, Tensor]:
    """Where each chain parted from the shortest correct one, and the share f that it loses."""
    starts = torch.zeros(len(lengths), dtype=torch.long)
    shares = torch.zeros(len(lengths), dtype=torch.float64)
    correct = is_correct.nonzero().flatten().tolist()
    if len(correct) < 2:
        return starts, shares
    shortest = min(correct, key=lambda chain: int(lengths[chain]))  # the first of equals
    for chain in correct:
        if chain == shortest:
            continue
        common = nodes.positions[nodes.same[shortest, chain]]
        start = int(common.max())
        longer = int(lengths[chain]) - start
        ratio = (int(lengths[shortest]) - start) / longer if longer else 1.0
        starts[chain] = start
        shares[chain] = min(1.0 - ratio**alpha, f_max)
    return starts, shares


def _check(
    reward: Tensor,
    parent: Tensor,
    branch_pos: Tensor,
    lengths: Tensor,
    length_alpha: float,
    f_max: float,
) -> None:
    shapes = {tuple(value.shape) for value in (reward, parent, branch_pos, lengths)}
    if len(shapes) != 1 or reward.ndim != 2:
        raise ValueError(
            f"reward, parent, branch_pos and lengths must be tables (B, n) of one shape, got "
            f"{', '.join(map(str, sorted(shapes)))}"
        )
    if not bool((parent < torch.arange(reward.shape[1])).all()):
        raise ValueError("parent: a chain must come after the chain that it branched from")
    if not length_alpha >= 0:
        raise ValueError(f"length_alpha={length_alpha} must be at least 0")
    if not 0 <= f_max <= 1:
        raise ValueError(f"f_max={f_max} must be in [0, 1]")
