"""Segment credit: worked trees, telescoping on random ones, the length term."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.advantages import group_advantages
from lightning_modules.functional.trees import node_values, segment_advantages, token_owners


def credit(
    reward: list[float], parent: list[int], branch: list[int], lengths: list[int], **options: Any
) -> Tensor:
    tables = (torch.tensor([values]) for values in (parent, branch, lengths))
    return segment_advantages(torch.tensor([reward]), *tables, **options).advantages


def random_tree(rng: Random, size: int) -> tuple[list[float], list[int], list[int], list[int]]:
    parent, branch, lengths = [-1], [0], [rng.randint(2, 9)]
    for chain in range(1, size):
        origin = rng.randrange(-1, chain)
        # a node is the first chain's that has it, as ``grow_trees`` gives them
        low = branch[origin] + 1 if origin >= 0 else 0
        if origin >= 0 and low < lengths[origin]:
            position = rng.randrange(low, lengths[origin])
        else:
            origin, position = -1, 0
        parent.append(origin)
        branch.append(position)
        lengths.append(position + rng.randint(1, 6))
    return [float(rng.random() < 0.5) for _ in range(size)], parent, branch, lengths


def slow_credit(
    reward: list[float], parent: list[int], branch: list[int], lengths: list[int]
) -> list[tuple[list[float], list[int]]]:
    """Walks from every token to its node, and to all chains through it: credit and nodes."""

    def owner(chain: int, position: int) -> tuple[int, int]:
        if position == 0:
            return -1, 0
        while parent[chain] >= 0 and position <= branch[chain]:
            chain = parent[chain]
        return chain, position

    size = len(reward)
    opened = {owner(c, branch[c]) for c in range(size)} | {(-1, 0)}

    def value(node: tuple[int, int]) -> float:
        through = [c for c in range(size) if node[1] <= lengths[c] and owner(c, node[1]) == node]
        return sum(reward[c] for c in through) / len(through)

    rows = []
    for chain in range(size):
        edges = [k for k in range(lengths[chain]) if owner(chain, k) in opened]
        levels = [value(owner(chain, k)) for k in edges] + [reward[chain]]
        row = []
        for token in range(lengths[chain]):
            place = max(i for i, k in enumerate(edges) if k <= token)
            row.append(levels[place + 1] - levels[place])
        rows.append((row, edges))
    return rows


WORKED = ([0.0, 1.0, 0.0, 1.0], [-1, 0, 1, -1], [0, 4, 6, 0], [10, 8, 9, 7])


def test_the_worked_tree() -> None:
    sixth = 1 / 6
    expected = [
        [-sixth] * 4 + [-2 * sixth] * 6,
        [-sixth] * 4 + [sixth] * 2 + [0.5] * 2 + [0.0] * 2,
        [-sixth] * 4 + [sixth] * 2 + [-0.5] * 3 + [0.0],
        [0.5] * 7 + [0.0] * 3,
    ]
    assert torch.allclose(credit(*WORKED), torch.tensor(expected), atol=1e-6)


def test_values_of_the_worked_tree() -> None:
    reward, *tables = (torch.tensor(values) for values in WORKED)
    found = node_values(reward, *tables)
    assert found == {(0, 4): pytest.approx(1 / 3), (1, 6): 0.5}


def test_random_trees_telescope_and_equal_the_slow_loop() -> None:
    rng = Random(5)
    for number in range(400):
        reward, parent, branch, lengths = random_tree(rng, 2 + number % 7)
        found = credit(reward, parent, branch, lengths)
        mean = sum(reward) / len(reward)
        slow = slow_credit(reward, parent, branch, lengths)
        owners = token_owners(torch.tensor(parent), torch.tensor(branch), found.shape[1])
        for chain, (row, edges) in enumerate(slow):
            own = found[chain, : lengths[chain]]
            assert own.tolist() == pytest.approx(row, abs=1e-6)
            assert bool((found[chain, lengths[chain] :] == 0).all())
            assert float(found[chain].abs().max()) <= 1 + 1e-6
            # each segment once, whatever its length
            total = sum(float(own[k]) for k in edges)
            assert total == pytest.approx(reward[chain] - mean, abs=1e-5)
            for other in range(chain):  # tokens of a shared prefix get the same in all its chains
                shared = owners[chain] == owners[other]
                assert torch.equal(found[chain, shared], found[other, shared])


def test_without_branches_it_is_dr_grpo() -> None:
    rng = Random(6)
    for size in (1, 2, 8):
        reward = [float(rng.random() < 0.5) for _ in range(size)]
        found = credit(reward, [-1] * size, [0] * size, [3] * size)
        flat = group_advantages(
            torch.tensor(reward), torch.zeros(size, dtype=torch.long), normalize_std=False
        ).advantages
        assert torch.equal(found, flat[:, None].expand(size, 3))


def test_equal_rewards_have_no_gradient() -> None:
    assert bool((credit([0.1] * 4, *WORKED[1:]) == 0).all())


def test_two_nodes_of_one_depth_are_two_nodes() -> None:
    """Chains A and B from the prompt, a child of each at index 4."""
    tree = ([1.0, 0.0, 1.0, 0.0], [-1, -1, 0, 1], [0, 0, 4, 4], [6, 6, 6, 6])
    found = credit(*tree)
    assert found[:, 0].tolist() == [0.5, -0.5, 0.5, -0.5]
    assert found[:, 5].tolist() == [0.0, 0.0, 0.0, 0.0]
    collided = credit(*tree, node_identity="position")
    assert collided[:, 0].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert collided[:, 5].tolist() == [0.5, -0.5, 0.5, -0.5]


#: Chain 1 leaves chain 0 at 4; both are right and end after 8 and 12 tokens; chain 2 is wrong.
PAIR = ([1.0, 1.0, 0.0], [-1, 0, -1], [0, 4, 0], [8, 12, 5])


@pytest.mark.parametrize(("alpha", "left"), [(0.0, 1.0), (1.0, 0.5), (2.0, 0.25)])
def test_the_length_term_takes_from_the_longer_chain(alpha: float, left: float) -> None:
    reward, parent, branch, lengths = PAIR
    # a second wrong child makes the value of the node less than 1, so that there is credit behind
    tree = ([*reward, 0.0], [*parent, 0], [*branch, 4], [*lengths, 6])
    plain, found = credit(*tree), credit(*tree, length_alpha=alpha)
    assert float(plain[1, 4]) == pytest.approx(1 / 3)
    assert torch.allclose(found[1, 4:], plain[1, 4:] * left)
    assert torch.equal(found[1, :4], plain[1, :4]), "the common prefix is untouched"
    for other in (0, 2, 3):
        assert torch.equal(found[other], plain[other]), "so are the shortest and wrong chains"


def test_the_length_term_never_flips_a_sign() -> None:
    """A correct chain behind a node that is better than itself: -A grows, to at most twice."""
    reward, parent, branch, lengths = PAIR
    reward = [2.0, 0.6, 0.0]  # both correct, but the second is below the node's mean
    plain = credit(reward, parent, branch, lengths)
    found = credit(reward, parent, branch, lengths, length_alpha=1.0)
    assert float(plain[1, 4]) < 0
    assert torch.allclose(found[1, 4:], plain[1, 4:] * 1.5)
    rng = Random(7)
    for _ in range(200):
        tree = random_tree(rng, 6)
        plain, found = credit(*tree), credit(*tree, length_alpha=3.0)
        assert bool((plain * found >= 0).all())
        assert float(found.abs().max()) <= 2 + 1e-6


def test_the_length_term_needs_two_correct_chains_of_different_length() -> None:
    alone = ([1.0, 0.0, 0.0], *PAIR[1:])
    assert torch.equal(credit(*alone, length_alpha=2.0), credit(*alone))
    equal = ([1.0, 1.0, 0.0], [-1, -1, -1], [0, 0, 0], [7, 7, 9])
    assert torch.equal(credit(*equal, length_alpha=2.0), credit(*equal))
    minus = ([1.0, -1.0, -1.0], [-1, -1, -1], [0, 0, 0], [3, 9, 9])
    assert torch.equal(credit(*minus, length_alpha=2.0), credit(*minus)), "-1 is not correct"


def test_two_restarts_share_the_root_alone() -> None:
    """The longer chain branched at 4 from another chain than the shortest correct one."""
    tree = ([0.0, 1.0, 1.0], [-1, -1, 0], [0, 0, 4], [9, 6, 12])
    plain, found = credit(*tree), credit(*tree, length_alpha=1.0)
    assert torch.allclose(found[2], torch.where(plain[2] > 0, plain[2] / 2, plain[2] * 1.5))


def test_the_share_that_is_lost_is_bounded() -> None:
    """The shortest ends where the other one goes on: ratio 0."""
    tree = ([1.0, 1.0, 0.0, 0.0], [-1, 0, 0, -1], [0, 4, 4, 0], [5, 400, 6, 6])
    plain = credit(*tree)
    assert float(credit(*tree, length_alpha=3.0)[1, 10]) == pytest.approx(0.0, abs=1e-6)
    bounded = credit(*tree, length_alpha=3.0, f_max=0.75)
    assert float(bounded[1, 10]) == pytest.approx(float(plain[1, 10]) / 4)


def test_shared_tokens_can_be_counted_once() -> None:
    found, plain = credit(*WORKED, dedupe_shared_prefix=True), credit(*WORKED)
    assert torch.allclose(found[:3, :4], plain[:3, :4] / 3)
    assert torch.allclose(found[1:3, 4:6], plain[1:3, 4:6] / 2)
    assert torch.equal(found[3], plain[3])
    assert torch.equal(found[0, 4:], plain[0, 4:])


def test_several_prompts_at_once() -> None:
    rng = Random(8)
    trees = [random_tree(rng, 5) for _ in range(6)]
    tables = [torch.tensor([tree[i] for tree in trees]) for i in range(4)]
    result = segment_advantages(*tables, length_alpha=1.0)
    assert result.depth.shape == result.factors.shape == (6, 5)
    for number, tree in enumerate(trees):
        alone = credit(*tree, length_alpha=1.0)
        block = result.advantages[5 * number : 5 * number + 5]
        assert torch.equal(block[:, : alone.shape[1]], alone)
        assert not bool(block[:, alone.shape[1] :].any())


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"parent": torch.tensor([[-1, 1]])}, "must come after"),
        ({"parent": torch.tensor([-1, 0])}, "one shape"),
        ({"length_alpha": -1.0}, "length_alpha=-1.0"),
        ({"f_max": 2.0}, "f_max=2.0"),
        ({"node_identity": "chain"}, "owner"),
    ],
)
def test_bad_arguments(change: dict[str, Any], fragment: str) -> None:
    zero = torch.zeros(1, 2, dtype=torch.long)
    good = {"reward": zero.float(), "parent": zero - 1, "branch_pos": zero, "lengths": zero + 3}
    segment_advantages(**good)
    with pytest.raises(ValueError, match=fragment):
        segment_advantages(**(good | change))
