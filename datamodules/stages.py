"""Sequential training: which domains a rollout draws from, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.sources import nearest


@dataclass(frozen=True)
class Stage:
    """A stretch of rollouts that draw from some domains only.

    Args:
        rollouts: How many.
        counts: Prompts a rollout over all ranks, by domain.
    """

    rollouts: int
    counts: dict[str, int]


def read_stages(stages: Sequence[Mapping[str, Any]], mixture: Mapping[str, int]) -> list[Stage]:
    """Stages of ``data.stages``; each draws as many prompts in all as the mixture.

    Args:
        stages: ``{rollouts: n, domains: [names]}`` each.
        mixture: ``data.prompts_per_rollout`` by domain.

    Raises:
        ValueError: A key, domain or number that cannot be; a total that cannot be divided.

    Example:
        >>> read_stages([{"rollouts": 5, "domains": ["math"]}], {"math": 4, "chat": 4})
        [Stage(rollouts=5, counts={'math': 8})]
    """
    found = []
    for number, stage in enumerate(stages):
        key = f"data.stages[{number}]"
        if set(stage) != {"rollouts", "domains"}:
            raise ValueError(f"{key} has keys {sorted(stage)}; give rollouts and domains")
        rollouts, domains = stage["rollouts"], list(stage["domains"])
        if not isinstance(rollouts, int) or rollouts < 1:
            raise ValueError(f"{key}.rollouts={rollouts} must be at least 1")
        if len(set(domains)) < len(domains):
            raise ValueError(f"{key}.domains={domains} names a domain twice")
        for domain in domains:
            if not mixture.get(domain):
                raise ValueError(
                    f"{key}.domains names {domain!r}, of which data.prompts_per_rollout draws none"
                    f"{nearest(str(domain), mixture)}"
                )
        total, own = sum(mixture.values()), sum(mixture[domain] for domain in domains)
        scaled = {domain: mixture[domain] * total for domain in domains}
        if not own or any(value % own for value in scaled.values()):
            raise ValueError(
                f"{key}.domains={domains}: {total} prompts a rollout cannot be shared among them "
                f"as data.prompts_per_rollout does; change its numbers"
            )
        found.append(Stage(rollouts, {domain: value // own for domain, value in scaled.items()}))
    return found


def counts_at(stages: Sequence[Stage], index: int, mixture: Mapping[str, int]) -> Mapping[str, int]:
    """Prompts of rollout ``index`` by domain: of its stage, or the mixture's without stages.

    Args:
        stages: In order; the last one goes on.
        index: Of the rollout since the start of the run.
        mixture: What is drawn without stages.
    """
    for stage in stages:
        if index < stage.rollouts:
            return stage.counts
        index -= stage.rollouts
    return stages[-1].counts if stages else mixture
