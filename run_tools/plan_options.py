"""Keys of the config group ``plan``, checked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PlanOptions:
    """Keys under ``plan``; their meanings are in conf/train.yaml."""

    gpus: list[int]
    gpu_memory_gib: float
    reserve_gib: float
    peak_tflops: float
    bandwidth_tbs: float
    mfu: float
    bandwidth_share: float
    launch_us: float
    prompt_tokens: int | None
    completion_tokens: int | None
    output: str | None

    def __post_init__(self) -> None:
        problems = [
            f"plan.{name}={getattr(self, name)} must be above 0"
            for name in ("gpu_memory_gib", "peak_tflops", "bandwidth_tbs")
            if not getattr(self, name) > 0
        ]
        problems += [
            f"plan.{name}={getattr(self, name)} must be in (0, 1]"
            for name in ("mfu", "bandwidth_share")
            if not 0 < getattr(self, name) <= 1
        ]
        problems += [
            f"plan.{name}={getattr(self, name)} must be 0 or more"
            for name in ("reserve_gib", "launch_us")
            if getattr(self, name) < 0
        ]
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        problems += [
            f"plan.{name}={value} must be at least 1"
            for name, value in counts.items()
            if value is not None and value < 1
        ]
        if any(number < 1 for number in self.gpus):
            problems.append(f"plan.gpus={list(self.gpus)}: give numbers of GPUs, 1 or more")
        if problems:
            raise ValueError("; ".join(problems))
