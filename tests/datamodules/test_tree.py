"""Tree rollouts on a toy sampler: no model, the whole loop."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.engines.base import Engine, Sampling, sample_seed
from datamodules.engines.scripted import ScriptedEngine
from datamodules.engines.tree import Trees, grow_trees
from datamodules.experience import Candidates, Completion, FinishReason, Prompt, Rollouts
from datamodules.tasks.prefix_audit import PrefixAudit

EOS, FORK = 2, 9
TASK = PrefixAudit()
SAMPLING = Sampling(candidates=2, max_new_tokens=12)


class Toy(Engine):
    """Writes random tokens until an end token; the candidates say which position is a fork."""

    def __init__(self, end: float = 0.15, **fixed: list[int]) -> None:
        self.end, self.fixed = end, fixed
        self.calls: list[tuple[int, Sampling]] = []
        self.written = 0
        self.key = "toy"

    def sync(self, policy: Any, version: int) -> None:
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append((len(prompts), sampling))
        return [
            [self._one(prompt, sampling, number) for number in range(sampling.samples)]
            for prompt in prompts
        ]

    def _one(self, prompt: Prompt, sampling: Sampling, number: int) -> Completion:
        rng = Random(sample_seed(self.key, prompt.uid, number))
        limit = min(sampling.max_new_tokens, prompt.max_new_tokens or sampling.max_new_tokens)
        ids: list[int] = list(self.fixed.get(prompt.uid.replace("#", "_"), []))[:limit]
        while not ids or (prompt.uid.replace("#", "_") not in self.fixed and len(ids) < limit):
            ids.append(EOS if rng.random() < self.end else rng.randrange(3, 12))
            if ids[-1] == EOS:
                break
        self.written += len(ids)
        reason = FinishReason.STOP if ids[-1] == EOS else FinishReason.LENGTH
        table = torch.tensor([[token, 0] for token in ids])
        logprobs = torch.tensor([[rng.random() - 1.0, -3.0] for _ in ids])
        asked = Candidates(table, logprobs) if sampling.candidates else None
        return Completion(tuple(ids), tuple(logprobs[:, 0].tolist()), reason, 0, asked)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", (3, 4 + i), TASK) for i in range(count)]


def forks(candidates: Candidates) -> Tensor:
    """1 where the fork token came, else 0."""
    return (candidates.ids[:, 0] == FORK).float()


def first_logprob(candidates: Candidates) -> Tensor:
    return candidates.logprobs[:, 0]


def grow(engine: Engine, count: int = 1, num_chains: int = 6, **options: Any) -> Trees:
    settings: dict[str, Any] = {"epsilon": 0.0, "score": first_logprob} | options
    return grow_trees(prompts(count), engine, SAMPLING, num_chains=num_chains, **settings)


def ids(trees: Trees) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in trees.rollouts.completions]


@pytest.mark.parametrize("options", [{}, {"no_repeat": True}, {"score": None}, {"min_gap": 2}])
def test_chains_share_their_prefixes(options: dict[str, Any]) -> None:
    trees = grow(Toy(), count=40, epsilon=0.3, **options)
    assert len(trees.rollouts) == 40 * 6
    assert trees.rollouts.groups.tolist() == [i for i in range(40) for _ in range(6)]
    branched = 0
    for tree in range(40):
        chains = trees.rollouts.completions[tree * 6 : tree * 6 + 6]
        for number, chain in enumerate(chains):
            parent, k = int(trees.parent[tree, number]), int(trees.branch_pos[tree, number])
            assert parent < number
            assert 0 < len(chain.token_ids) <= 12
            assert len(chain.logprobs) == len(chain.token_ids) == len(chain.candidates or ())
            if parent < 0:
                assert k == 0
                continue
            branched += 1
            whole = chains[parent]
            assert chain.token_ids[:k] == whole.token_ids[:k]
            assert chain.logprobs[:k] == whole.logprobs[:k]
            assert torch.equal(chain.candidates.ids[:k], whole.candidates.ids[:k])
            assert chain.candidates.ids[:, 0].tolist() == list(chain.token_ids)
            # never at the end token, nor at a node that an ancestor owns
            assert EOS not in whole.token_ids[: k + 1]
            assert k > int(trees.branch_pos[tree, parent])
            assert len(whole.token_ids) - k >= options.get("min_gap", 0)
    assert branched > 60


def test_a_tree_never_writes_more_than_flat_sampling() -> None:
    """Tokens as the engine counts them; chains have the same length limit in both."""
    tree_engine, flat_engine = Toy(end=0.0), Toy(end=0.0)
    trees = grow(tree_engine, count=50, epsilon=0.2)
    flat = grow(flat_engine, count=50, epsilon=1.0)
    assert flat_engine.written == 50 * 6 * 12 == int(flat.new_tokens.sum())
    assert tree_engine.written == int(trees.new_tokens.sum())
    assert trees.lengths.tolist() == flat.lengths.tolist()
    assert bool((trees.new_tokens <= flat.new_tokens).all())
    assert tree_engine.written == flat_engine.written - int(trees.branch_pos.sum())
    assert tree_engine.written < 0.8 * flat_engine.written


def test_same_seed_same_tree_in_any_batch() -> None:
    all_trees, again = grow(Toy(), count=8, epsilon=0.4), grow(Toy(), count=8, epsilon=0.4)
    assert ids(all_trees) == ids(again)
    assert torch.equal(all_trees.parent, again.parent)
    alone = grow_trees(prompts(8)[5:6], Toy(), SAMPLING, num_chains=6, epsilon=0.4,
                       score=first_logprob)  # fmt: skip
    assert ids(alone) == ids(all_trees)[30:36]
    other = Toy()
    other.key = "another rollout"
    assert ids(grow(other, count=8, epsilon=0.4)) != ids(all_trees)
    torch.manual_seed(77)
    assert ids(grow(Toy(), count=8, epsilon=0.4)) == ids(again)


def test_epsilon() -> None:
    never = grow(Toy(end=0.0), count=60)
    assert bool((never.parent[:, 1:] >= 0).any())
    # node 0 of chain 0 is the root: only where it scores highest does a chain restart
    gap = grow(Toy(end=0.0), count=60, min_gap=1)
    assert bool((gap.parent[:, 1:] >= 0).all())
    engine = Toy()
    always = grow(engine, count=60, epsilon=1.0)
    assert bool((always.parent < 0).all())
    assert engine.calls == [(60, Sampling(samples=6, candidates=2, max_new_tokens=12))]
    half = grow(Toy(end=0.0), count=400, epsilon=0.5, min_gap=1)
    restarts, count = int((half.parent[:, 1:] < 0).sum()), 400 * 5
    assert abs(restarts - count / 2) < 4 * (count / 4) ** 0.5


def test_the_highest_score_wins_and_the_first_of_equals() -> None:
    engine = Toy(p0_0=[5, 6, FORK, 7, FORK, EOS], p0_1=[3, 4, FORK, EOS])
    trees = grow(engine, score=forks, num_chains=4)
    # chain 1 = [5, 6 | 3, 4, FORK, EOS]; its fork scores as high as that of chain 0
    assert trees.parent[0].tolist() == [-1, 0, 0, 0]
    assert trees.branch_pos[0].tolist() == [0, 2, 2, 2]
    assert ids(trees)[1] == (5, 6, 3, 4, FORK, EOS)
    engine = Toy(p0_0=[5, 6, FORK, 7, FORK, EOS], p0_1=[3, 4, FORK, EOS], p0_2=[3, EOS],
                 p0_3=[3, EOS])  # fmt: skip
    again = grow(engine, score=forks, num_chains=5, no_repeat=True)
    assert again.parent[0].tolist() == [-1, 0, 0, 1, 0]
    assert again.branch_pos[0].tolist() == [0, 2, 4, 4, 1]


def test_a_tree_of_end_tokens_restarts_at_the_root() -> None:
    engine = Toy(**{f"p0_{i}": [EOS] for i in range(4)})
    trees = grow(engine, num_chains=4)
    assert trees.parent[0].tolist() == [-1] * 4
    assert ids(trees) == [(EOS,)] * 4


def test_room_behind_a_branch() -> None:
    def last(candidates: Candidates) -> Tensor:
        return torch.arange(len(candidates)).float()

    assert int(grow(Toy(end=0.0), score=last, num_chains=2).branch_pos[0, 1]) == 11
    assert int(grow(Toy(end=0.0), score=last, num_chains=2, min_new=5).branch_pos[0, 1]) == 7
    short = [Prompt("p0", (3,), TASK, max_new_tokens=6)]
    trees = grow_trees(short, Toy(end=0.0), SAMPLING, num_chains=2, epsilon=0.0, score=last)
    assert trees.lengths[0].tolist() == [6, 6]
    assert int(trees.branch_pos[0, 1]) == 5


def test_every_rank_calls_the_engine_equally_often() -> None:
    for count in (0, 1, 7):
        engine = Toy()
        trees = grow(engine, count=count, num_chains=5)
        assert [size for size, _ in engine.calls] == [count] * 5
        assert trees.parent.shape == (count, 5)


def test_a_tree_is_replayed_from_its_record() -> None:
    trees = grow(Toy(), count=5, epsilon=0.3)
    records = [
        {
            "uid": prompt.uid, "token_ids": one.token_ids, "logprobs": one.logprobs,
            "finish_reason": one.finish_reason.value, "chain": number % 6, "branch_pos": k,
            "candidates": {"ids": one.candidates.ids.tolist(),
                           "logprobs": one.candidates.logprobs.tolist()},
        }
        for number, (prompt, one, k) in enumerate(zip(
            trees.rollouts.prompts, trees.rollouts.completions, trees.branch_pos.flatten().tolist(),
            strict=True,
        ))
    ]  # fmt: skip
    engine = ScriptedEngine(records=records)
    engine.sync(None, 0)
    engine.key = "toy"  # coins come from it
    again = grow(engine, count=5, epsilon=0.3)
    assert again.rollouts.completions == trees.rollouts.completions
    assert torch.equal(again.branch_pos, trees.branch_pos)
    for one, two in zip(again.rollouts.completions, trees.rollouts.completions, strict=True):
        assert torch.equal(one.candidates.logprobs, two.candidates.logprobs)
    flat = engine.generate(prompts(1), Sampling(samples=6))
    assert Rollouts.from_groups(prompts(1), flat).completions == trees.rollouts.completions[:6]
    with pytest.raises(ValueError, match="branches elsewhere"):
        grow(ScriptedEngine(records=records), count=5, epsilon=0.0, score=lambda c: -c.ids[:, 0])


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"epsilon": 1.5}, "epsilon=1.5"),
        ({"num_chains": 0}, "num_chains=0"),
        ({"min_gap": -1}, "min_gap=-1"),
        ({"min_new": 0}, "min_new=0"),
    ],
)
def test_bad_options(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        grow(Toy(), **options)


def test_without_candidates_there_is_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="candidates=0"):
        grow_trees(prompts(1), Toy(), Sampling(), num_chains=2, epsilon=0.5, score=forks)
    silent = ScriptedEngine(records=[{"uid": "p0", "token_ids": [4], "chain": 0}])
    with pytest.raises(ValueError, match="reports no candidates"):
        grow(silent, num_chains=1)
