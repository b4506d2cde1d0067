"""Seconds of a step, from floating-point operations, bytes and launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from run_tools.plan_options import PlanOptions
from run_tools.plan_steps import Numbers, Request


@dataclass
class Work:
    """What one GPU does for one rollout and the optimizer steps on it.

    Args:
        request: The largest chunk decoded at once.
        waves: How many such chunks there are, in prompts (a broken number).
        updates: Optimizer steps on this rollout.
        window: Micro-batches a step.
        prompt_share: Mean prompt as a share of the longest.
        is_eager: Decoding launches each operation by itself.
    """

    request: Request | None = None
    waves: float = 0.0
    updates: int = 1
    window: int = 1
    prompt_share: float = 1.0
    is_eager: bool = True


def waves(requests: Sequence[Request], chunk: Request | None) -> float:
    """How many chunks like ``chunk`` all requests make."""
    size = len(chunk.prompts) * chunk.samples if chunk is not None else 0
    everything = sum(len(one.prompts) * one.samples for one in requests)
    return everything / size if size else 0.0


def flops(numbers: Numbers, work: Work, completion_tokens: int | None = None) -> dict[str, float]:
    """Floating-point operations of one optimizer step on one GPU, by what they are for.

    ``prefill``, ``decode`` and ``annotate`` are a rollout's share of the step. All use mean lengths
    [our choice: linear in tokens, the square of attention included].
    """
    steps, share = _lengths(work, completion_tokens)
    return {
        "prefill": work.waves * numbers.prefill_flops * work.prompt_share / work.updates,
        "decode": work.waves * numbers.decode_flops * steps / work.updates,
        "annotate": numbers.annotate_flops * share / work.updates,
        "training": numbers.train_flops * share * work.window,
    }


def _lengths(work: Work, completion_tokens: int | None) -> tuple[float, float]:
    """Decoding steps, and mean sequence as a share of the longest."""
    if work.request is None:
        return 0.0, 1.0
    limit = max(work.request.limits)
    prompt = max(len(one.token_ids) for one in work.request.prompts)
    steps = min(limit, completion_tokens or limit)
    return float(steps), (prompt * work.prompt_share + steps) / (prompt + limit)


def seconds(
    numbers: Numbers, work: Work, weight_bytes: float, options: PlanOptions
) -> dict[str, float]:
    """Seconds of one optimizer step, by what they are for.

    A decoding step reads all weights and the cache once: it takes the longest of that, its
    arithmetic and, where each operation is launched by itself, its launches.

    Args:
        numbers: Of one GPU.
        work: Of one GPU.
        weight_bytes: Weights that a decoding step reads.
        options: Of the hardware.
    """
    done = flops(numbers, work, options.completion_tokens)
    rate = options.peak_tflops * 1e12 * options.mfu
    found = {name: value / rate for name, value in done.items()}
    if work.request is not None:
        limit = max(work.request.limits)
        prompt = max(len(one.token_ids) for one in work.request.prompts)
        steps, _ = _lengths(work, options.completion_tokens)
        middle = (prompt * work.prompt_share + steps / 2) / (prompt + limit)
        read = weight_bytes + numbers.decode.parts["kv_cache"] * middle
        bandwidth = options.bandwidth_tbs * 1e12 * options.bandwidth_share
        launches = numbers.decode_ops * options.launch_us * 1e-6 if work.is_eager else 0.0
        step = max(read / bandwidth, numbers.decode_flops / rate, launches)
        found["decode"] = work.waves * steps * step / work.updates
    return found


def figures(value: float, unit: str = "") -> str:
    """A number in three figures.

    Example:
        >>> figures(1234567.0), figures(0.012345), figures(0.0)
        ('1,234,567', '0.0123', '0')
    """
    text = f"{value:.3g}" if value else "0"
    if 1000 <= abs(value) < 1e9:
        text = f"{value:,.0f}"
    return f"{text}{unit}"
