"""Trees of completions on any engine: chains that share their beginnings (ROSE, arXiv 2601.05053).

For every prompt ``n`` chains are written one after another. Chain 0 starts at the prompt. Each
later chain restarts there with probability ``epsilon``; otherwise it takes the first ``k`` tokens
of the chain and position with the highest score and the engine writes the rest, token ``k`` anew
[code]. All prompts advance together: one round is one call of the engine, its prompts are "prompt
plus prefix", so an engine that caches prefixes reads them once.

    node (r, k)   lies before token k of chain r; r is the first chain that has it
    k = 0         is the root: choosing it is a restart
    parents       are always earlier than their children

Where we differ from the authors' code [our choice: card section 8]: never branch at the end token
(it would go on behind a finished answer) nor closer than ``min_gap`` to either end, nor where
fewer than ``min_new`` tokens have room; a tree without any allowed position restarts at the root;
scores of a chain count only behind its own branch, where its tokens are its own (their copies in
a child never win, since the first maximum does).

Coins and random branch points derive from (key, uid, chain), so a tree does not depend on the
batch, on the rank, or on global random state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from datamodules.engines.base import Engine, Sampling, sample_seed
from datamodules.experience import Candidates, Completion, FinishReason, Prompt, Rollouts

#: Gives ``(L,)`` scores of the positions of a piece of a chain; higher is a better place to branch.
Score = Callable[[Candidates], Tensor]


@dataclass(frozen=True)
class Trees:
    """Completions of B prompts with n chains each, chains in the order of their creation.

    Args:
        rollouts: ``N = B n`` whole chains (prefix and continuation), a prompt's chains together.
        parent: ``(B, n)`` chain that a chain branched from; -1 where it started at the prompt.
        branch_pos: ``(B, n)`` tokens that it took from there; 0 where it took none.
    """

    rollouts: Rollouts
    parent: Tensor
    branch_pos: Tensor

    @property
    def lengths(self) -> Tensor:
        """``(B, n)`` tokens of whole chains."""
        sizes = [len(completion.token_ids) for completion in self.rollouts.completions]
        return torch.tensor(sizes, dtype=torch.long).reshape(self.parent.shape)

    @property
    def new_tokens(self) -> Tensor:
        """``(B, n)`` tokens that the engine wrote; ``branch_pos`` counts the reused ones."""
        return self.lengths - self.branch_pos


@dataclass
class _Tree:
    prompt: Prompt
    limit: int  # most tokens of a chain
    chains: list[Completion] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)  # of each chain's own tokens
    origin: list[tuple[int, int]] = field(default_factory=list)  # parent, branch_pos
    used: set[tuple[int, int]] = field(default_factory=lambda: {(0, 0)})  # the root


def grow_trees(
    prompts: Sequence[Prompt],
    engine: Engine,
    sampling: Sampling,
    *,
    num_chains: int,
    epsilon: float,
    score: Score | None,
    min_gap: int = 0,
    min_new: int = 1,
    no_repeat: bool = False,
) -> Trees:
    """Write ``num_chains`` chains for every prompt.

    Under sharding every rank calls it with the same options: the engine is then called equally
    often, with an empty list where a rank has no prompts.

    Args:
        prompts: B prompts; their uids name the random streams.
        engine: Asked for chain ``n`` of a prompt under the uid ``<uid>#<n>``.
        sampling: ``samples`` is ignored; ``candidates`` must be set where ``score`` is given.
        num_chains: Chains a prompt, n.
        epsilon: Probability of a restart at the prompt; 1 is flat sampling, in one call.
        score: Where to branch; None for an allowed position at random.
        min_gap: Fewest tokens between a branch point and either end of the chain.
        min_new: Fewest tokens that must have room behind a branch point.
        no_repeat: Branch at most once at a node (the authors do not exclude used ones).

    Raises:
        ValueError: A value is out of range, or the engine gives no candidates.

    Example:
        >>> trees = grow_trees(
        ...     prompts, engine, Sampling(candidates=20), num_chains=8, epsilon=0.5, score=score
        ... )  # doctest: +SKIP
        >>> trees.parent[0]  # doctest: +SKIP
        tensor([-1,  0, -1,  1,  0, -1,  4,  0])
    """
    _check(sampling, num_chains, epsilon, score, min_gap, min_new)
    if epsilon >= 1:
        groups = engine.generate(prompts, replace(sampling, samples=num_chains))
        nowhere = torch.zeros(len(prompts), num_chains, dtype=torch.long)
        return Trees(_rollouts(prompts, groups, num_chains), nowhere - 1, nowhere)
    bound = sampling.max_new_tokens
    trees = [_Tree(prompt, min(bound, prompt.max_new_tokens or bound)) for prompt in prompts]
    for chain in range(num_chains):
        origins = [
            _choose(tree, engine.key, chain, epsilon, score, min_gap, min_new, no_repeat)
            for tree in trees
        ]
        asked = [_prompt(tree, chain, *origin) for tree, origin in zip(trees, origins, strict=True)]
        answers = engine.generate(asked, replace(sampling, samples=1))
        for tree, origin, (answer,) in zip(trees, origins, answers, strict=True):
            _extend(tree, origin, answer, score)
    origins = [origin for tree in trees for origin in tree.origin]
    table = torch.tensor(origins, dtype=torch.long).reshape(len(trees), num_chains, 2)
    rollouts = _rollouts(prompts, [tree.chains for tree in trees], num_chains)
    return Trees(rollouts, table[..., 0], table[..., 1])


def _rollouts(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], num_chains: int
) -> Rollouts:
    """As ``Rollouts.from_groups``, also of no prompts at all."""
    return Rollouts(
        prompts=[prompt for prompt in prompts for _ in range(num_chains)],
        completions=[chain for group in groups for chain in group],
        groups=torch.arange(len(prompts)).repeat_interleave(num_chains),
    )


def _check(
    sampling: Sampling,
    num_chains: int,
    epsilon: float,
    score: Score | None,
    min_gap: int,
    min_new: int,
) -> None:
    problems = []
    if num_chains < 1:
        problems.append(f"num_chains={num_chains} must be at least 1")
    if not 0 <= epsilon <= 1:
        problems.append(f"epsilon={epsilon} must be in [0, 1]")
    if min_gap < 0:
        problems.append(f"min_gap={min_gap} must be at least 0")
    if min_new < 1:
        problems.append(f"min_new={min_new} must be at least 1")
    if score is not None and epsilon < 1 and not sampling.candidates:
        problems.append("sampling.candidates=0 leaves nothing to score: ask for at least 1")
    if problems:
        raise ValueError("tree: " + "; ".join(problems))


def _choose(
    tree: _Tree,
    key: str,
    chain: int,
    epsilon: float,
    score: Score | None,
    min_gap: int,
    min_new: int,
    no_repeat: bool,
) -> tuple[int, int]:
    """Parent and branch position of the next chain; (-1, 0) starts at the prompt."""
    coin = sample_seed(key, f"{tree.prompt.uid}#{chain}/restart", 0) / 2**64
    if chain == 0 or coin < epsilon:
        return -1, 0
    places = [_places(tree, owner, min_gap, min_new) for owner in range(chain)]
    blocked = tree.used if no_repeat else set()
    if score is None:
        free = [(o, k) for o, row in enumerate(places) for k in row if (o, k) not in blocked]
        seed = sample_seed(key, f"{tree.prompt.uid}#{chain}/place", 0)
        best = free[seed % len(free)] if free else (-1, 0)
    else:
        best = _best(tree, places, blocked)
    tree.used.add(best)
    return best if best[1] else (-1, 0)


def _best(tree: _Tree, places: Sequence[range], blocked: set[tuple[int, int]]) -> tuple[int, int]:
    """The first node of highest score, (-1, 0) where there is none."""
    best, highest = (-1, 0), -torch.inf
    for owner, row in enumerate(places):
        first = row.start - tree.origin[owner][1]
        values = tree.scores[owner][first : first + len(row)].clone()
        for chain, position in blocked:
            if chain == owner and position in row:
                values[position - row.start] = -torch.inf
        if len(row) and float(values.max()) > highest:
            place = int(values.argmax())  # of equal values the first
            best, highest = (owner, row[place]), float(values[place])
    return best


def _places(tree: _Tree, owner: int, min_gap: int, min_new: int) -> range:
    """Positions of a chain's own nodes at which a later chain may branch."""
    branch_pos, chain = tree.origin[owner][1], tree.chains[owner]
    # node branch_pos is the parent's, and the root that of chain 0
    first = max(branch_pos + 1 if owner else 0, min_gap)
    last = len(chain.token_ids) - 1 - int(chain.finish_reason is FinishReason.STOP)
    last = min(last - min_gap, tree.limit - min_new)
    return range(first, max(first, last + 1))


def _prompt(tree: _Tree, chain: int, parent: int, branch_pos: int) -> Prompt:
    prefix = tree.chains[parent].token_ids[:branch_pos] if parent >= 0 else ()
    return replace(
        tree.prompt,
        uid=f"{tree.prompt.uid}#{chain}",
        token_ids=tree.prompt.token_ids + prefix,
        max_new_tokens=tree.limit - branch_pos,
    )


def _extend(tree: _Tree, origin: tuple[int, int], answer: Completion, score: Score | None) -> None:
    """Join prefix and continuation into a chain, and score the continuation."""
    parent, branch_pos = origin
    scores = torch.zeros(0)
    if score is not None:
        if answer.candidates is None:
            raise ValueError(
                "the engine reports no candidates, which a tree needs to choose where to branch: "
                "use engine=hf, vllm or vllm_server, or a record with candidates"
            )
        scores = score(answer.candidates).detach().float().cpu()
    if parent >= 0:
        answer = _joined(tree.chains[parent], branch_pos, answer)
    tree.chains.append(answer)
    tree.scores.append(scores)
    tree.origin.append(origin)


def _joined(parent: Completion, branch_pos: int, rest: Completion) -> Completion:
    candidates = rest.candidates
    if candidates is not None and parent.candidates is not None:
        both = (parent.candidates, candidates)
        width = min(one.ids.shape[1] for one in both)
        cuts = (slice(branch_pos), slice(None))
        candidates = Candidates(
            torch.cat([one.ids[cut, :width] for one, cut in zip(both, cuts, strict=True)]),
            torch.cat([one.logprobs[cut, :width] for one, cut in zip(both, cuts, strict=True)]),
        )
    return replace(
        rest,
        token_ids=parent.token_ids[:branch_pos] + rest.token_ids,
        logprobs=parent.logprobs[:branch_pos] + rest.logprobs,
        candidates=candidates,
    )
