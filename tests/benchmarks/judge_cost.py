"""What a judge in the loop costs a policy run: ``python -m tests.benchmarks.judge_cost``.

Ten prompts of mini writing, eight completions each; policy and AC-GenRM judge are random models of
the default tiny shape on the ``hf`` engine. A repeat times each arm in turn: one rollout, then the
reward of one set of completions. Medians of seven, after one of each to warm up; counts are of the
timed repeats. Nothing is asserted; the promise is that the judge generates at most twice a rollout
(criteria, verdicts), whatever the scheme, and that it writes nothing for what was compared before.

* What is scored are texts of the task's demonstrations, half of them with a plan: most texts of a
  random policy do not end, and such texts lose unread. Equal texts tie unread, and a comparison
  that comes twice is one: two members that draw each other as opponents may ask once.
* The rollout is of the random policy with the same prompts: it writes about 17 tokens of the 19
  that a prompt allows, a demonstration has about 10. So a ratio is that of a long rollout; the
  judge's tokens are counted per token of the texts that it judged.
* A random judge seldom says a right word, but the task allows its criteria and verdicts two tokens,
  which is what a trained one writes: a word and the end. Only its criteria rarely parse, which
  makes a judgement's prompt one token shorter.
* Each measurement begins with a judge that has read nothing. In a run criteria are written once a
  query: mini writing has 32, so that after some ten rollouts there is mostly one call.
* Both models are equally small: the ratio is of the miniature, the counts hold for any size.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hub_logging

from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, FinishReason, Prompt, Rollouts
from datamodules.rewards import RewardFunction, VerifierReward
from datamodules.tasks.base import Pair, Task
from datamodules.tasks.mini_writing import MiniWriting
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.tiny import TinyOptions, build_tiny, word_tokenizer
from lightning_modules.grm.candidates import Comparison
from lightning_modules.grm.exported import ExportedJudge, PairJudge, TaskJudge
from lightning_modules.grm.judge_reward import ComparisonReward
from lightning_modules.options import BackboneOptions
from tests.benchmarks.rollout_speed import seconds
from tests.data_files import write_judge

NEW_TOKENS = 1024  # as in conf/model/grpo.yaml; the prompts allow 19
ARMS: dict[str, dict[str, Any]] = {
    "no_judge": {},
    "task_judge": {},
    "bootstrap": {},
    "bootstrap_both_orders": {"both_orders": True},
    "random_opponent": {"scheme": "random_opponent"},
    "round_robin": {"scheme": "round_robin"},
}


class CountingEngine(HFEngine):
    """Counts calls with prompts, tokens read and tokens written."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.read, self.written = 0, 0, 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """See ``Engine.generate``."""
        found = super().generate(prompts, sampling)
        self.calls += bool(prompts)
        self.read += sum(len(prompt.token_ids) for prompt in prompts)
        self.written += sum(len(one.token_ids) for group in found for one in group)
        return found


class CountingJudge:
    """Counts what a judge is asked."""

    def __init__(self, judge: PairJudge) -> None:
        self.judge, self.asked = judge, 0

    def compare(self, pairs: Sequence[Pair], task: Task) -> list[Comparison]:
        """See ``PairJudge``."""
        self.asked += len(pairs)
        return self.judge.compare(pairs, task)


class Texts:
    """Rollouts of demonstrations.

    Args:
        task: Its queries and demonstrations.
        samples: Completions a prompt.
    """

    def __init__(self, task: MiniWriting, samples: int) -> None:
        self.task, self.samples, self.step = task, samples, 0
        self.known: dict[tuple[int, ...], list[Completion]] = defaultdict(list)

    def rollouts(self, prompts: Sequence[Prompt], index: int) -> Rollouts:
        """Completions that nobody has seen yet."""
        groups = [[self._next(prompt) for _ in range(self.samples)] for prompt in prompts]
        return replace(Rollouts.from_groups(prompts, groups), index=index)

    def _next(self, prompt: Prompt) -> Completion:
        while not self.known[prompt.token_ids]:
            for one in self.task.demonstrations(0, self.step, 256):
                ids = one.completion_ids
                text = Completion(ids, (0.0,) * len(ids), FinishReason.STOP)
                self.known[one.prompt_ids].append(text)
            self.step += 1
        return self.known[prompt.token_ids].pop()


def judge_of(arm: str, folder: str, engine: HFEngine, task: Task) -> CountingJudge:
    """A judge that is loaded and has read nothing."""
    if arm == "task_judge":
        return CountingJudge(TaskJudge())
    judge = ExportedJudge(folder, inference="greedy", engine=engine)
    judge.compare([], task)
    return CountingJudge(judge)


def score(arm: str, folder: str, rollouts: Rollouts) -> dict[str, float]:
    """Seconds and counts of one reward, and what a second one need not ask."""
    if arm == "no_judge":
        return {"reward": seconds(lambda: VerifierReward()(rollouts))}
    engine = CountingEngine()
    judge = judge_of(arm, folder, engine, rollouts.prompts[0].task)
    reward: RewardFunction = ComparisonReward(judge, **ARMS[arm])
    row = {"reward": seconds(lambda: reward(rollouts)), "asked": float(judge.asked)}
    row |= {name: float(getattr(engine, name)) for name in ("calls", "read", "written")}
    reward(rollouts)
    return row | {"cached": 1 - (judge.asked - row["asked"]) / max(row["asked"], 1.0)}


def summary(arm: str, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One line of the table."""
    sums = {name: sum(row.get(name, 0.0) for row in rows) for name in ("asked", "read", "written")}
    tokens, texts = (sum(row[name] for row in rows) for name in ("tokens", "texts"))
    ratios = [row["reward"] / row["rollout"] for row in rows]
    return {
        "arm": arm,
        "judgements_per_completion": round(sums["asked"] / texts, 3),
        "most_judge_calls": int(max(row.get("calls", 0.0) for row in rows)),
        "written_per_policy_token": round(sums["written"] / tokens, 3),
        "read_per_policy_token": round(sums["read"] / tokens, 3),
        "rollout_seconds": round(statistics.median(row["rollout"] for row in rows), 4),
        "reward_seconds": round(statistics.median(row["reward"] for row in rows), 4),
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "cache_share": min((row["cached"] for row in rows if "cached" in row), default=""),
    }


def measure(repeats: int = 7, prompts: int = 10, samples: int = 8) -> list[dict[str, Any]]:
    """A line for every arm.

    Args:
        repeats: Timed ones.
        prompts: Of a rollout, long and short queries in turn.
        samples: Completions a prompt.
    """
    task = MiniWriting(num_train=prompts * (repeats + 1))
    task.bind(word_tokenizer(task.vocabulary()))
    queries = [task.prompt(record) for record in task.records("train")]
    texts, engine = Texts(task, samples), HFEngine()
    sampling = Sampling(samples=samples, max_new_tokens=NEW_TOKENS)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as place:
        policy, judge = Path(place, "policy"), write_judge(Path(place, "judge"))
        build_tiny(policy, task.vocabulary(), TinyOptions(), seed=0)
        build_tiny(judge, task.vocabulary(), TinyOptions(), seed=1)  # in place of a smaller one
        engine.sync(load_causal_lm(BackboneOptions(path=str(policy))), 0)
        for index in range(repeats + 1):
            drawn = queries[prompts * index : prompts * (index + 1)]
            rollouts = texts.rollouts(drawn, index)
            tokens = sum(len(one.token_ids) for one in rollouts.completions)
            for arm, rows in found.items():
                with engine.keyed(str(index)):
                    rollout = seconds(lambda own=drawn: engine.generate(own, sampling))
                row = {"rollout": rollout, "tokens": float(tokens), "texts": float(len(rollouts))}
                rows.append(row | score(arm, str(judge), rollouts))
    setting = {"prompts": prompts, "samples": samples, "repeats": repeats}
    setting["threads"] = torch.get_num_threads()
    return [summary(arm, rows[1:]) | setting for arm, rows in found.items()]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print them as a table."""
    cells = [[str(name) for name in rows[0]], *([str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    """One line an arm; ``--output`` writes them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hub_logging.disable_progress_bar()
    rows = measure(args.repeats, args.prompts, args.samples)
    show(rows)
    if args.output:
        with args.output.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
