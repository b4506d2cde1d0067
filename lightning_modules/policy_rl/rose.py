"""ROSE: branch where the next words differ in meaning, give credit to segments.

Paper: "Reinforced Efficient Reasoning via Semantically Diverse Exploration", arXiv 2601.05053
(ACL 2026); code: ZiqiZhao1/ROSE-rl.

1. The n completions of a prompt are a tree: with probability epsilon a chain starts at the prompt,
   else it goes on from the node of highest branch score (``datamodules/engines/tree.py``).
2. The score is token entropy times the spread of the candidates' input-embedding rows
   (``functional/branching.py``): a choice among synonyms is uncertain, but no decision.
3. A segment's advantage is the difference of node values, and correct chains that are longer than
   the shortest correct one lose credit (``functional/trees.py``):

       A_t = V(node behind) - V(node before),  V = mean reward of the chains that pass through

4. Loss: the clipped one with dual clip 3 and 0.001 of the k3 KL (``conf/model/rose.yaml``).

Hooks overridden: ``rollout`` (the tree), ``advantages`` (segments). ``epsilon=1 credit=sequence``
is Dr.GRPO on independent samples.

Where we differ from paper and code [our choice]:

* ``branch_score: semantic_rao``. The paper's formula is never positive and largest where the model
  is certain; ``semantic_paper`` and ``semantic_code`` are the faithful ones.
* Nodes are keyed by (chain, position), not by position; chains never branch at an end token.
* The loss is divided by (sequences x max_new_tokens) of the whole window, so it does not depend on
  micro-batches; the code sums over each micro-batch.
* Embedding rows are those of the current policy, not of the first step.
* No filter of prompts whose rewards are all equal: their advantages are 0.

The choice of prefixes is adaptive and shared prefixes are trained several times, so node means are
no unbiased values of the policy: keep the arm ``iid`` in every comparison, and compare by
``rollout/new_tokens``, not by chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.engines.base import Engine, Sampling
from datamodules.engines.tree import Trees, grow_trees
from datamodules.experience import Candidates, Prompt, Rollouts
from lightning_modules.functional.branching import (
    BRANCH_SCORES,
    BranchScore,
    branch_score,
    by_chunks,
    candidate_entropy,
    divergence,
)
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.functional.trees import SegmentAdvantages, segment_advantages
from lightning_modules.policy_rl.grpo import GRPO


class ROSE(GRPO):
    """Semantically diverse trees with length-aware segment credit.

    Args:
        epsilon: Probability that a chain restarts at the prompt [paper: 0.5]; 1 samples flat.
        branch_score: ``entropy``, ``cosine_paper``, ``cosine_code``, ``semantic_paper``,
            ``semantic_code``, ``semantic_rao`` or ``random`` (any allowed node).
        num_candidates: Most probable tokens a position that the score sees [code: 20].
        center_embeddings: Subtract the mean embedding row first: rows with a large common part
            are all alike otherwise.
        min_gap: Fewest tokens between a branch point and either end of its chain.
        no_repeat: Branch at most once at a node (off: code).
        min_new_tokens: Fewest tokens that must have room behind a branch point.
        credit: ``segment``, or ``sequence`` for reward minus the group's mean.
        length_alpha: Exponent of the length term [paper: 0.5 to 3; code: 0, which is off].
        correct_threshold: Least reward of a correct chain, for the length term.
        max_length_share: Most of its credit that a chain can lose by its length.
        node_identity: ``owner``, or ``position`` as in the code.
        dedupe_shared_prefix: Divide a token's advantage by the number of chains that share it.
        **kwargs: Of ``GRPO``; advantages are never divided by a standard deviation [code].

    Raises:
        ValueError: A value is out of range or unknown.
    """

    def __init__(
        self,
        *,
        epsilon: float = 0.5,
        branch_score: str = "semantic_rao",
        num_candidates: int = 20,
        center_embeddings: bool = False,
        min_gap: int = 0,
        no_repeat: bool = False,
        min_new_tokens: int = 1,
        credit: Literal["segment", "sequence"] = "segment",
        length_alpha: float = 0.0,
        correct_threshold: float = 0.5,
        max_length_share: float = 1.0,
        node_identity: Literal["owner", "position"] = "owner",
        dedupe_shared_prefix: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"normalize_std": False} | kwargs)
        self.reads_weights = True
        check_choice("model.branch_score", branch_score, (*BRANCH_SCORES, "random"))
        check_choice("model.credit", credit, ("segment", "sequence"))
        check_choice("model.node_identity", node_identity, ("owner", "position"))
        problems = [
            f"model.{name}={value} must be {bound}"
            for name, value, is_right, bound in (
                ("epsilon", epsilon, 0 <= epsilon <= 1, "in [0, 1]"),
                ("num_candidates", num_candidates, num_candidates >= 1, "at least 1"),
                ("min_gap", min_gap, min_gap >= 0, "at least 0"),
                ("min_new_tokens", min_new_tokens, min_new_tokens >= 1, "at least 1"),
                ("length_alpha", length_alpha, length_alpha >= 0, "at least 0"),
                ("max_length_share", max_length_share, 0 <= max_length_share <= 1, "in [0, 1]"),
            )
            if not is_right
        ]
        if self.normalize_std or self.baseline != "mean":
            problems.append(
                "model.normalize_std=false and model.baseline=mean are the only ones that node "
                "values stand for; model=grpo has the others"
            )
        if problems:
            raise ValueError("; ".join(problems))
        self.epsilon, self.branch_score, self.num_candidates = epsilon, branch_score, num_candidates
        self.center_embeddings, self.credit = center_embeddings, credit
        self.tree_options: dict[str, Any] = {
            "min_gap": min_gap,
            "min_new": min_new_tokens,
            "no_repeat": no_repeat,
        }
        self.credit_options: dict[str, Any] = {
            "length_alpha": length_alpha,
            "correct_threshold": correct_threshold,
            "f_max": max_length_share,
            "node_identity": node_identity,
            "dedupe_shared_prefix": dedupe_shared_prefix,
        }

    # ------------------------------------------------------------------ the tree

    def rollout(self, prompts: Sequence[Prompt], engine: Engine) -> Rollouts:
        """A tree of ``samples_per_prompt`` chains for each prompt.

        ``info`` has the structure: ``chain``, ``parent``, ``branch_pos``, and for branched chains
        entropy and divergence of the candidates where they branched.
        """
        is_flat = self.epsilon >= 1
        sampling = Sampling(
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            candidates=0 if is_flat else self.num_candidates,
        )
        table, center = (torch.zeros(0, 0), None) if is_flat else self._embeddings()

        def score(candidates: Candidates) -> Tensor:
            name: Any = self.branch_score
            one = partial(_score, name, center)
            return by_chunks(one, candidates.ids, candidates.logprobs, table)

        trees = grow_trees(
            prompts,
            engine,
            sampling,
            num_chains=self.samples_per_prompt,
            epsilon=self.epsilon,
            score=None if is_flat or self.branch_score == "random" else score,
            **self.tree_options,
        )
        trees.rollouts.info |= _structure(trees, table, center)
        return trees.rollouts

    def _embeddings(self) -> tuple[Tensor, Tensor | None]:
        """Input-embedding rows ``(V, D)`` of the current policy, and their mean where asked for.

        Under sharding every rank gathers them, once a rollout.
        """
        weight = self.policy.base.get_input_embeddings().weight.detach()
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        return weight, weight.float().mean(0) if self.center_embeddings else None

    # ------------------------------------------------------------------ credit

    def advantages(self, rollouts: Rollouts) -> tuple[Tensor, Metrics]:
        """Advantages ``(N, T)``: differences of node values, or reward minus the group's mean."""
        assert rollouts.reward is not None
        shape = (-1, self.samples_per_prompt)
        parent, branch_pos = (
            torch.tensor(rollouts.info[name], dtype=torch.long).reshape(shape)
            for name in ("parent", "branch_pos")
        )
        lengths = rollouts.mask.sum(1).reshape(shape)
        reward = rollouts.reward.reshape(shape)
        result = segment_advantages(reward, parent, branch_pos, lengths, **self.credit_options)
        values, metrics = super().advantages(rollouts)
        metrics |= _tree_metrics(rollouts, parent, branch_pos, lengths)
        if self.credit == "segment":
            values = result.advantages
            metrics |= _credit_metrics(result, rollouts.mask, reward)
        return values, metrics


def _score(name: BranchScore, center: Tensor | None, logprobs: Tensor, rows: Tensor) -> Tensor:
    return branch_score(name, logprobs, rows, center)


def _structure(trees: Trees, table: Tensor, center: Tensor | None) -> dict[str, list[Any]]:
    """Columns of ``Rollouts.info``; numbers of a branch are None for chains without one."""
    size = trees.parent.shape[1]
    parent, branch_pos = trees.parent.flatten().tolist(), trees.branch_pos.flatten().tolist()
    entropies: list[float | None] = []
    divergences: list[float | None] = []
    for number, (origin, position) in enumerate(zip(parent, branch_pos, strict=True)):
        row = number - number % size + origin
        found = trees.rollouts.completions[row].candidates if origin >= 0 else None
        if found is None:
            entropies.append(None)
            divergences.append(None)
            continue
        logprobs = found.logprobs[position : position + 1]
        spread = by_chunks(
            partial(divergence, center=center), found.ids[position : position + 1], logprobs, table
        )
        entropies.append(float(candidate_entropy(logprobs)))
        divergences.append(float(spread))
    return {
        "chain": list(range(size)) * len(trees.parent),
        "parent": parent,
        "branch_pos": branch_pos,
        "branch_entropy": entropies,
        "branch_divergence": divergences,
    }


def _tree_metrics(
    rollouts: Rollouts, parent: Tensor, branch_pos: Tensor, lengths: Tensor
) -> Metrics:
    """What the trees look like and what they saved."""
    is_branch = parent >= 0
    reused, written = branch_pos.sum(), (lengths - branch_pos).sum()
    trees = float(len(parent))
    origin = lengths.gather(1, parent.clamp(min=0))
    pairs = [
        {(p, k) for p, k in zip(*row, strict=True) if p >= 0}
        for row in zip(parent.tolist(), branch_pos.tolist(), strict=True)
    ]
    reward = rollouts.reward
    assert reward is not None
    is_mixed = reward.reshape(parent.shape).amax(1) > reward.reshape(parent.shape).amin(1)
    metrics: Metrics = {
        "rollout/new_tokens": (float(written), trees),
        "rollout/reused_tokens": (float(reused), trees),
        "rollout/saved_share": (float(reused), float(lengths.sum())),
        "rollout/branch_pos_frac": masked_sum_count(branch_pos / origin.clamp(min=1), is_branch),
        "rollout/frac_root": masked_sum_count(~is_branch[:, 1:]),
        "rollout/unique_branch_points": (float(sum(map(len, pairs))), trees),
        "rollout/mixed_groups": masked_sum_count(is_mixed),
    }
    for name in ("branch_entropy", "branch_divergence"):
        values = [value for value in rollouts.info[name] if value is not None]
        metrics[f"rollout/{name}"] = (float(sum(values)), float(len(values)))
    return metrics


def _credit_metrics(result: SegmentAdvantages, mask: Tensor, reward: Tensor) -> Metrics:
    """Where the credit went."""
    return {
        "rollout/tree_depth": masked_sum_count(result.depth),
        "rollout/advantage_abs": masked_sum_count(result.advantages.abs(), mask),
        "rollout/advantage_zero_tokens": masked_sum_count(result.advantages == 0, mask),
        "rollout/length_term_chains": masked_sum_count(result.factors > 0),
        "rollout/length_term_factor": masked_sum_count(result.factors, result.factors > 0),
    }
