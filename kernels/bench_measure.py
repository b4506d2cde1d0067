"""Clocks and memory meters of ``bench.py``."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

#: FLOP a second that the fixed floor assumes of a CUDA device (bfloat16, H100).
ASSUMED_RATE = 800e12
#: Rows of the product that measures the device's own rate, at most.
RATE_ROWS = 8192
MIB = 2**20


class Times(NamedTuple):
    """Seconds of one run."""

    forward: float
    backward: float
    both: float


class Spread(NamedTuple):
    """Median and two percentiles, in milliseconds."""

    median: float
    p10: float
    p90: float


def spread(seconds: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile in milliseconds.

    Example:
        >>> spread([0.003, 0.001, 0.002])
        Spread(median=2.0, p10=1.2, p90=2.8)
    """
    values = torch.tensor(seconds, dtype=torch.float64) * 1e3
    points = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    return Spread(*(round(float(value), 6) for value in values.quantile(points)))


class Stopwatch:
    """Times forward and backward of one run: events on CUDA, a clock elsewhere.

    Args:
        device: ``cuda`` or ``cpu``.
        clock: On a CPU: ``wall``, or ``process`` for the processor time of all threads, which
            other work on the machine disturbs less.
    """

    def __init__(self, device: str, clock: str = "wall") -> None:
        self.is_cuda = device == "cuda"
        self.clock = time.process_time if clock == "process" else time.perf_counter
        if self.is_cuda:
            cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * MIB)
            self.flush = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def run(self, forward: Callable[[], Any], backward: Callable[[Any], None]) -> Times:
        """Time one run; on CUDA nothing of the inputs is left in the second-level cache."""
        if not self.is_cuda:
            start = self.clock()
            found = forward()
            middle = self.clock()
            backward(found)
            end = self.clock()
            return Times(middle - start, end - middle, end - start)
        self.flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        found = forward()
        events[1].record()
        backward(found)
        events[2].record()
        torch.cuda.synchronize()
        first = events[0].elapsed_time(events[1]) / 1e3
        second = events[1].elapsed_time(events[2]) / 1e3
        return Times(first, second, first + second)


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Most bytes that ``function`` held at once, beyond what was there before.

    On a CPU every allocation is read from PyTorch's profiler, which sees those inside a custom
    operator and on other threads too.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    del kept
    assert record.profiler is not None
    found = record.profiler.kineto_results.events()
    events = [(event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]"]
    living = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        living += size
        most = max(most, living)
    return most


def check_meter(device: str) -> None:
    """Measure allocations whose peak is known.

    Raises:
        RuntimeError: The meter is wrong on this PyTorch.
    """

    def work() -> torch.Tensor:
        first = torch.empty(8 * MIB, dtype=torch.int8, device=device)
        second = torch.empty(4 * MIB, dtype=torch.int8, device=device)
        del first
        third = torch.empty(2 * MIB, dtype=torch.int8, device=device)
        del second
        return third

    found = peak_bytes(work, device) / MIB
    if not 11.9 < found < 12.1:
        raise RuntimeError(f"the memory meter reads {found:.2f} MiB where 12 MiB were allocated")


def product_rate(
    hidden: torch.Tensor, weight: torch.Tensor, watch: Stopwatch, repeats: int
) -> float:
    """FLOP a second of ``hidden @ weight.T`` into memory that is there, median of some runs."""
    hidden, weight = hidden.detach()[:RATE_ROWS], weight.detach()
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])

    def product() -> None:
        torch.mm(hidden, weight.T, out=out)

    times = [watch.run(product, lambda _: None).forward for _ in range(repeats + 2)][2:]
    return 2.0 * hidden.numel() * weight.shape[0] / (spread(times).median / 1e3)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "not enough memory" in text or "can't allocate" in text)
    )
