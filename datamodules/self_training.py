"""Pairs without labels: training data of a judge that labels them itself.

Labels, where the data have any, never reach a training prompt unless ``labels=given`` asks for
them: ``score`` cannot read what is not there. ``hidden_labels`` keeps them apart, for logging only.

Before training the backbone may vote on every pair: such votes begin the memory of ConsistRM
[code: a column of the data that holds the starting model's votes].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoModelForCausalLM

from datamodules.engines.base import Sampling, sample_seed
from datamodules.experience import Prompt
from datamodules.prepared import fingerprint, prepare
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.base import JudgeTask, Pair

VOTED_AT_ONCE = 4096  # prompts; what they wrote is dropped before the next ones


class SelfTrainingDataModule(RolloutDataModule):
    """Rollouts of a judge over pairs, with both orders of a pair in one draw where asked.

    Hidden labels are hidden from training. The warm start of a tiny backbone stands for the
    supervised training that a published backbone has had, and may have seen verdicts.

    Args:
        task: A ``JudgeTask``.
        labels: ``hidden``, or ``given`` for methods that learn from them.
        pair_order: ``single`` as in the data [code]; ``both``: every drawn pair comes in both
            orders, so that a draw has twice as many prompts as ``prompts_per_rollout``; ``random``:
            a coin a pair and draw [summary: UniCreative].
        prior_votes: Samples a prompt that the untrained backbone casts before training; 0 for none
            [code: 8].
        **kwargs: Of ``RolloutDataModule``.

    Raises:
        ValueError: A value is out of range, or the task is no judge task.
    """

    def __init__(
        self,
        *,
        task: JudgeTask,
        labels: Literal["hidden", "given"] = "hidden",
        pair_order: Literal["single", "both", "random"] = "both",
        prior_votes: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(task=task, **kwargs)
        if not isinstance(task, JudgeTask):
            raise ValueError(f"data.task '{task.name}' has no pairs to judge; use a JudgeTask")
        problems = [
            f"data.{key}={value!r} is unknown; allowed: {', '.join(allowed)}"
            for key, value, allowed in (
                ("labels", labels, ("hidden", "given")),
                ("pair_order", pair_order, ("single", "both", "random")),
            )
            if value not in allowed
        ]
        if prior_votes < 0:
            problems.append(f"data.prior_votes={prior_votes} must be 0 (none) or more")
        if problems:
            raise ValueError("; ".join(problems))
        self.judge_task = task
        self.labels, self.pair_order, self.prior_votes = labels, pair_order, prior_votes
        self.folder: Path | None = None
        self._hidden: dict[str, int] | None = None

    def prepare(
        self,
        backbone: str,
        cache_dir: str | Path,
        task_settings: Any = None,
        for_training: bool = True,
    ) -> None:
        """Bind the tokenizer and let the backbone vote once for this task."""
        super().prepare(backbone, cache_dir, task_settings, for_training)
        if not for_training or not self.prior_votes:
            return
        material = {
            "format": 1,
            "backbone": fingerprint(backbone),
            "task": task_settings,
            "votes": self.prior_votes,
            "order": self.pair_order,
            "seed": self.seed,
        }
        self.folder = prepare(
            cache_dir, "votes", material, lambda folder: self._vote(folder, backbone)
        )

    def _vote(self, folder: Path, backbone: str) -> None:
        pairs = [replace(pair, label=None) for pair in self.judge_task.records("train")]
        prompts = [order for pair in pairs for order in self._orders(pair)]
        model: Any = AutoModelForCausalLM.from_pretrained(
            backbone, trust_remote_code=self.trust_remote_code
        )
        if torch.cuda.is_available():
            model = model.to(torch.cuda.current_device())
        rank_zero_info(
            f"the backbone votes on {len(prompts)} prompts, {self.prior_votes} times each"
        )
        self.engine.sync(model, 0)
        limit = max((prompt.max_new_tokens or 1024 for prompt in prompts), default=1024)
        sampling = Sampling(temperature=1.0, samples=self.prior_votes, max_new_tokens=limit)
        rows: list[dict[str, Any]] = []
        with self.engine.keyed(f"{self.seed}/votes"):
            for start in range(0, len(prompts), VOTED_AT_ONCE):
                asked = prompts[start : start + VOTED_AT_ONCE]
                rows += [
                    {
                        "uid": prompt.record.uid,
                        "swapped": prompt.record.swapped,
                        "votes": [self.judge_task.parse(prompt, one).winner for one in group],
                    }
                    for prompt, group in zip(
                        asked, self.engine.generate(asked, sampling), strict=True
                    )
                ]
                if len(prompts) > VOTED_AT_ONCE:
                    rank_zero_info(f"voted on {len(rows)}/{len(prompts)} prompts")
        valid = sum(vote is not None for row in rows for vote in row["votes"])
        share = valid / max(1, len(prompts) * self.prior_votes)
        rank_zero_info(f"{share:.0%} of these votes parsed")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "votes.jsonl").write_text(text)

    def prior(self) -> list[tuple[str, bool, list[int | None]]]:
        """``(uid, swapped, slots)`` of every prompt that was voted on; slots as in that order."""
        if self.folder is None:
            return []
        lines = (self.folder / "votes.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [(str(row["uid"]), bool(row["swapped"]), row["votes"]) for row in rows]

    def _pairs(self) -> list[Pair]:
        """Training pairs as prompts may see them."""
        pairs = list(self.judge_task.records("train"))
        if self.labels == "given":
            return [pair for pair in pairs if pair.label is not None]
        return [replace(pair, label=None) for pair in pairs]

    @property
    def hidden_labels(self) -> Mapping[str, int]:
        """uid -> slot of the better response in the data's order, for logging only."""
        if self._hidden is None:
            pairs = self.judge_task.records("train")
            self._hidden = {pair.uid: pair.label for pair in pairs if pair.label is not None}
        return self._hidden

    def train_prompts(self) -> list[Prompt]:
        """One prompt a pair, in the order of the data.

        Raises:
            ValueError: ``labels=given``, but no pair has one.
        """
        pairs = self._pairs()
        if not pairs and self.labels == "given":
            raise ValueError("data.labels=given, but no training pair has a label")
        return [self.judge_task.preference_prompt(pair) for pair in pairs]

    def draw(self, index: int) -> list[Prompt]:
        """Prompts of rollout ``index`` on this rank; both orders of a pair stand side by side."""
        drawn: list[Pair] = [prompt.record for prompt in super().draw(index)]
        if self.pair_order == "random":
            key = f"{self.seed}/order/{index}"
            drawn = [p.swap() if sample_seed(key, p.uid, 0) % 2 else p for p in drawn]
        return [order for pair in drawn for order in self._orders(pair)]

    @property
    def prompts_per_record(self) -> int:
        """2 where both orders of a pair are drawn."""
        return 2 if self.pair_order == "both" else 1

    def _orders(self, pair: Pair) -> list[Prompt]:
        pairs = [pair, pair.swap()] if self.pair_order == "both" else [pair]
        return [self.judge_task.preference_prompt(order) for order in pairs]
