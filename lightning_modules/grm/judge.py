"""A trained judge at work: pairs in, one record or one comparison a pair out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from datamodules.engines.base import Engine
from datamodules.engines.hf import HFEngine
from datamodules.tasks.base import JudgeTask, Pair
from lightning_modules.grm.candidates import Candidates, Comparison

if TYPE_CHECKING:
    from lightning_modules.grm.base import GenerativeRewardModule


@torch.no_grad()
def judge_pairs(
    module: GenerativeRewardModule,
    pairs: Sequence[Pair],
    *,
    engine: Engine | None = None,
    task: JudgeTask | None = None,
) -> list[dict[str, Any]]:
    """Judge pairs in both orders with the module's own inference; see ``module.judge``."""
    orders = [order for pair in pairs for order in (pair, pair.swap())]
    candidates, verdicts = decided(module, orders, engine, task)
    records = []
    for number, pair in enumerate(pairs):
        first, second = candidates[2 * number], candidates[2 * number + 1]
        forward, backward = verdicts[2 * number], verdicts[2 * number + 1]
        mapped = None if backward is None else 3 - backward
        agree = forward is not None and forward == mapped
        best = _best(first, forward)
        records.append(
            {
                "uid": pair.uid,
                "verdict": forward if agree else None,
                "verdicts": [forward, mapped],
                "orders_agree": agree,
                "analysis": best.verdict.analysis if best else None,
                "confidence": best.confidence if best else None,
                "votes": _votes(first, second),
                "label": pair.label,
                "extra": pair.extra,
            }
        )
    return records


@torch.no_grad()
def compare_pairs(
    module: GenerativeRewardModule,
    pairs: Sequence[Pair],
    *,
    engine: Engine | None = None,
    task: JudgeTask | None = None,
) -> list[Comparison]:
    """Judge every pair in the order it has; see ``module.compare``."""
    candidates, verdicts = decided(module, pairs, engine, task)
    return [
        Comparison.of(verdict, module.outcome(one, verdict), one.num_tokens)
        for one, verdict in zip(candidates, verdicts, strict=True)
    ]


def decided(
    module: GenerativeRewardModule,
    pairs: Sequence[Pair],
    engine: Engine | None,
    task: JudgeTask | None,
) -> tuple[list[Candidates], list[int | None]]:
    """Candidates and verdicts of the module's inference, one a pair.

    Raises:
        ValueError: There is neither a trainer nor a task.
    """
    data = module._trainer.datamodule if module._trainer is not None else None  # type: ignore[attr-defined]
    task = task or (data.task if data is not None else module.judge_task)
    if task is None:
        raise ValueError("give judge() a task that was bound to the tokenizer: task=...")
    module.judge_task = module._given_task = task
    try:
        module.configure_model()
        engine = engine or (data.engine if data is not None else HFEngine())
        engine.sync(module.policy, module.global_step)
        is_greedy = module.inference == "greedy"
        with engine.keyed("judge"):
            candidates = module.sample(
                pairs, engine, greedy=is_greedy, samples=0 if is_greedy else module.num_votes
            )
            return candidates, module.decide(candidates, engine)
    finally:
        module._given_task = None


def _best(candidates: Candidates, verdict: int | None) -> Any:
    """The most confident judgement that says ``verdict``."""
    everything = candidates.samples or ([candidates.greedy] if candidates.greedy else [])
    agreeing = [one for one in everything if one.winner is not None and one.winner == verdict]
    return max(agreeing, key=lambda one: one.confidence, default=None)


def _votes(first: Candidates, second: Candidates) -> list[int]:
    """Samples for response 1 and response 2 over both orders."""
    forward = first.verdicts or ([first.greedy.winner or 0] if first.greedy else [])
    backward = second.verdicts or ([second.greedy.winner or 0] if second.greedy else [])
    slots = forward + [3 - verdict if verdict else 0 for verdict in backward]
    return [slots.count(1), slots.count(2)]
