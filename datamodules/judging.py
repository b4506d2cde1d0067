"""Training data of ReflectRM: preference and reflection prompts, built once from the backbone.

For every training pair the untrained backbone writes ``samples`` outputs at T = 1 [paper]:

    all right               -> the pair is too easy and dropped
    otherwise               -> the pair joins the pool of preference prompts
    some right, some wrong  -> exactly one reflection prompt: an analysis that led to the right
                               verdict beside one that led to the wrong one, in random order

Preference and reflection items stand 4 : 1 [paper]. The label of a reflection item is the outcome
[paper]; ``reflection_label=step_truth`` takes the task's own truth instead. An unparsed output is
neither right nor wrong, so it keeps its pair from being "all right" [our choice]. The data are
never refreshed [paper].
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import AutoModelForCausalLM

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Prompt
from datamodules.prepared import fingerprint, prepare
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.base import JudgeTask, Pair


class JudgeDataModule(RolloutDataModule):
    """Rollouts of a judge over preference (``pref``) and reflection (``refl``) prompts.

    Args:
        task: A ``JudgeTask``.
        build_samples: Outputs a pair when the data are built.
        pref_refl_ratio: Preference items for each reflection item; None keeps all of both.
        reflection_label: ``outcome`` or ``step_truth``.
        rebalance_slots: Swap preference pairs after the filter until both slots win equally often
            (the filter skews slots when the backbone is biased) [our choice, off = paper].
        pair_order: ``single`` as in the data, ``both`` orders of each preference pair.
        drop_all_right: Whether to filter at all; False trains on every pair.
        **kwargs: Of ``RolloutDataModule``. ``prompts_per_rollout: {pref: 12, refl: 0}`` trains on
            preferences only.

    Raises:
        ValueError: A value is out of range, or the task is no judge task.
    """

    def __init__(
        self,
        *,
        task: JudgeTask,
        build_samples: int = 8,
        pref_refl_ratio: float | None = 4.0,
        reflection_label: Literal["outcome", "step_truth"] = "outcome",
        rebalance_slots: bool = False,
        pair_order: Literal["single", "both"] = "single",
        drop_all_right: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(task=task, **kwargs)
        if not isinstance(task, JudgeTask):
            raise ValueError(f"data.task '{task.name}' has no pairs to judge; use a JudgeTask")
        if build_samples < 1:
            raise ValueError(f"data.build_samples={build_samples} must be at least 1")
        if pref_refl_ratio is not None and pref_refl_ratio <= 0:
            raise ValueError(f"data.pref_refl_ratio={pref_refl_ratio} must be above 0, or null")
        for key, value, allowed in (
            ("reflection_label", reflection_label, ("outcome", "step_truth")),
            ("pair_order", pair_order, ("single", "both")),
        ):
            if value not in allowed:
                raise ValueError(f"data.{key}={value!r} is unknown; allowed: {', '.join(allowed)}")
        self.judge_task = task
        self.build_samples = build_samples
        self.pref_refl_ratio = pref_refl_ratio
        self.reflection_label = reflection_label
        self.rebalance_slots = rebalance_slots
        self.pair_order = pair_order
        self.drop_all_right = drop_all_right
        self.folder: Path | None = None
        self.build_stats: dict[str, Any] = {}

    def prepare(
        self,
        backbone: str,
        cache_dir: str | Path,
        task_settings: Any = None,
        for_training: bool = True,
    ) -> None:
        """Bind the tokenizer and build the training items once for this backbone and task."""
        super().prepare(backbone, cache_dir, task_settings, for_training)
        if not for_training:
            return
        material = {
            "format": 1,
            "backbone": fingerprint(backbone),
            "task": task_settings,
            "samples": self.build_samples,
            "ratio": self.pref_refl_ratio,
            "label": self.reflection_label,
            "rebalance": self.rebalance_slots,
            "drop_all_right": self.drop_all_right,
            "seed": self.seed,
        }
        self.folder = prepare(
            cache_dir, "judging", material, lambda folder: self._build(folder, backbone)
        )
        self.build_stats = json.loads((self.folder / "stats.json").read_text())
        rank_zero_info(f"training items: {self.build_stats}")

    def _build(self, folder: Path, backbone: str) -> None:
        pairs = [pair for pair in self.judge_task.records("train") if pair.label is not None]
        model = AutoModelForCausalLM.from_pretrained(backbone)
        self.engine.sync(model, 0)
        with self.engine.keyed(f"{self.seed}/build"):
            pref, refl, stats = build_items(
                self.judge_task,
                self.engine,
                pairs,
                samples=self.build_samples,
                ratio=self.pref_refl_ratio,
                label=self.reflection_label,
                rebalance_slots=self.rebalance_slots,
                drop_all_right=self.drop_all_right,
                seed=self.seed,
            )
        for name, rows in (("pref", pref), ("refl", refl)):
            lines = [json.dumps(row) for row in rows]
            (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
        (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")

    def train_prompts(self) -> list[Prompt]:
        """Preference prompts, then reflection prompts, as built.

        Raises:
            RuntimeError: ``prepare`` was not called.
        """
        if self.folder is None:
            raise RuntimeError("call prepare(backbone, cache_dir) before asking for prompts")
        prompts = []
        for row in _rows(self.folder / "pref.jsonl"):
            pair = _pair(row["pair"])
            orders = (pair, pair.swap()) if self.pair_order == "both" else (pair,)
            prompts += [self.judge_task.preference_prompt(order) for order in orders]
        for number, row in enumerate(_rows(self.folder / "refl.jsonl")):
            prompts.append(
                self.judge_task.reflection_prompt(
                    _pair(row["pair"]), tuple(row["analyses"]), row["label"], f"refl/{number}"
                )
            )
        return prompts

    def pools(self) -> dict[str, list[Prompt]]:
        """Training prompts by domain; reflections that could not be built are left out.

        Raises:
            ValueError: No preference prompts although they are asked for.
        """
        wanted = self.prompts_per_rollout
        if self._pools is None and wanted.get("refl") and not self.build_stats.get("reflections"):
            rank_zero_warn(
                "the backbone gave no pair both a right and a wrong verdict, so there are no "
                "reflection prompts: training goes on with preferences only"
            )
            self.prompts_per_rollout = {k: v for k, v in wanted.items() if k != "refl"}
            if self.shares:
                raise ValueError("data.shares asks for reflections, but none could be built")
        return super().pools()


def build_items(
    task: JudgeTask,
    engine: Engine,
    pairs: Sequence[Pair],
    *,
    samples: int,
    ratio: float | None,
    label: str,
    rebalance_slots: bool,
    drop_all_right: bool,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Filter pairs and make reflection items; see the module's docstring.

    Args:
        task: Renders and parses.
        engine: Holds the untrained backbone.
        pairs: With labels.
        samples: Outputs a pair.
        ratio: Preference items a reflection item, None for all.
        label: ``outcome`` or ``step_truth``.
        rebalance_slots: See ``JudgeDataModule``.
        drop_all_right: See ``JudgeDataModule``.
        seed: Of orders and subsets.

    Returns:
        Preference rows, reflection rows, and counts.
    """
    prompts = [task.preference_prompt(pair) for pair in pairs]
    groups = engine.generate(
        prompts, Sampling(temperature=1.0, samples=samples, max_new_tokens=_limit(prompts))
    )
    chance = random.Random(f"{seed}/judging")
    pool: list[Pair] = []
    refl: list[dict[str, Any]] = []
    unparsed = right_total = 0
    for pair, prompt, group in zip(pairs, prompts, groups, strict=True):
        verdicts = [task.parse(prompt, completion) for completion in group]
        right = [v.analysis for v in verdicts if v.winner == pair.label]
        wrong = [v.analysis for v in verdicts if v.winner == 3 - (pair.label or 0)]
        unparsed += len(verdicts) - len(right) - len(wrong)
        right_total += len(right)
        if drop_all_right and len(right) == len(group):
            continue
        pool.append(pair)
        if right and wrong:
            item = _reflection(
                task, pair, chance.choice(right), chance.choice(wrong), label, chance.random() < 0.5
            )
            if item is not None:
                refl.append(item)
    stats = {
        "pairs": len(pairs),
        "dropped_all_right": len(pairs) - len(pool),
        "mixed": len(refl),
        "sample_accuracy": right_total / max(1, len(pairs) * samples),
        "unparsed": unparsed / max(1, len(pairs) * samples),
    }
    pref, refl = _proportion(pool, refl, ratio, chance)
    gold_first = sum(pair.label == 1 for pair in pref) / max(1, len(pref))
    if rebalance_slots:
        pref = _rebalance(pref, chance)
    stats |= {
        "preferences": len(pref),
        "reflections": len(refl),
        "gold_first_slot": gold_first,
        "gold_first_slot_used": sum(pair.label == 1 for pair in pref) / max(1, len(pref)),
    }
    return [{"pair": asdict(pair)} for pair in pref], refl, stats


def _limit(prompts: Sequence[Prompt]) -> int:
    return max((prompt.max_new_tokens or 1024 for prompt in prompts), default=1024)


def _reflection(
    task: JudgeTask, pair: Pair, good: str, bad: str, label: str, good_first: bool
) -> dict[str, Any] | None:
    analyses = (good, bad) if good_first else (bad, good)
    slot: int | None = 1 if good_first else 2
    if label == "step_truth":
        slot = task.better_analysis(pair, analyses)
        if slot is None:
            return None
    return {"pair": asdict(pair), "analyses": list(analyses), "label": slot}


def _proportion(
    pool: list[Pair], refl: list[dict[str, Any]], ratio: float | None, chance: random.Random
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Random subsets in the wanted proportion, exact to one item, as large as they can be."""
    if ratio is None or not refl:
        return pool, refl
    num_pref = min(len(pool), int(ratio * len(refl)))
    num_refl = min(len(refl), max(1, round(num_pref / ratio)))
    chosen = sorted(chance.sample(range(len(pool)), num_pref))
    return [pool[i] for i in chosen], chance.sample(refl, num_refl)


def _rebalance(pairs: list[Pair], chance: random.Random) -> list[Pair]:
    """Swap random pairs of the more frequent label until both labels are equally frequent."""
    slots = {
        1: [i for i, p in enumerate(pairs) if p.label == 1],
        2: [i for i, p in enumerate(pairs) if p.label == 2],
    }
    more = max(slots, key=lambda slot: len(slots[slot]))
    surplus = abs(len(slots[1]) - len(slots[2])) // 2
    swapped = set(chance.sample(slots[more], surplus))
    return [pair.swap() if i in swapped else pair for i, pair in enumerate(pairs)]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _pair(values: Mapping[str, Any]) -> Pair:
    pair = Pair(**values)
    return replace(pair, responses=(pair.responses[0], pair.responses[1]))


__all__ = ["JudgeDataModule", "build_items"]
