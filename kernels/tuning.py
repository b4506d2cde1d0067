"""Block sizes of the Triton kernels.

Nothing here has been measured on a GPU: the shipped table is what the tile sizes of ordinary matrix
products on each generation suggest, checked only against shared memory. ``FUSED_AUTOTUNE=1``
measures the candidates on the machine at hand and keeps the best in ``~/.cache/litpost``.

The kernels only write buffers that they own, so a candidate can be run again; no autotuner
wraps them all the same [our choice: with several processes all must take one configuration, since
another block size rounds differently].
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Config:
    """Blocks of one kernel.

    Args:
        block_m: Rows of a tile.
        block_n: Columns of a tile; elements that a program of the row kernels takes at once.
        block_k: Width of a step of the inner product.
        group: Row blocks that share the weight's tiles in the L2 cache.
        warps: Warps of a program.
        stages: Stages of the load pipeline.
        splits: Splits of the vocabulary (``forward``); 0 lets ``choose_splits`` decide.
        capacity: Candidates a row may have before the row itself is searched (``region``).
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 32
    group: int = 16
    warps: int = 8
    stages: int = 3
    splits: int = 0
    capacity: int = 8192


#: Shared memory of a program by compute capability, in bytes.
SHARED_MEMORY = {(8, 0): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448}

_HALF = {
    (8, 0): Config(128, 128, 64, warps=8, stages=3),
    (8, 9): Config(128, 128, 32, warps=8, stages=3),
    (9, 0): Config(128, 256, 64, warps=8, stages=3),
    (10, 0): Config(128, 256, 64, warps=8, stages=3),
}
#: float32 without TF32 runs on the ordinary cores: smaller tiles, registers are the limit.
_SINGLE = {capability: Config(64, 64, 32, warps=4, stages=2) for capability in _HALF}
_ROWS = Config(block_m=1, block_n=4096, warps=8, stages=2)

_overrides: dict[str, dict[str, int]] = {}
_measured: dict[str, Config] = {}


@contextmanager
def override(**kernels: dict[str, int]) -> Iterator[None]:
    """Set fields of the configurations for the length of a ``with`` block.

    Example:
        >>> with override(forward={"block_n": 16, "splits": 7}):
        ...     get_config("forward", 5, 8, 131, torch.float32, "", torch.device("cpu")).splits
        7
    """
    before = dict(_overrides)
    _overrides.update(kernels)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def get_config(
    kernel: str,
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    flags: str,
    device: torch.device,
    measure: Callable[[Config], Any] | None = None,
    *,
    is_collective: bool = False,
) -> Config:
    """The configuration of a kernel for a problem.

    Args:
        kernel: ``forward``, ``backward`` or ``region``.
        n: Rows.
        h: Width of the hidden states.
        v: Columns.
        dtype: Of the hidden states.
        flags: What is compiled in, as a text that is part of the key.
        device: Of the tensors; anything but CUDA is the interpreter.
        measure: Launches the kernel once with a configuration, for ``FUSED_AUTOTUNE=1``; None
            takes what is known.
        is_collective: Every process of a job makes this call, also those without rows.
    """
    if device.type != "cuda":
        config = interpreted(kernel, n, h, v)
    else:
        config = shipped(kernel, n, dtype, torch.cuda.get_device_capability(device))
        if os.environ.get("FUSED_AUTOTUNE") == "1" and kernel != "region":
            rows = 0 if is_collective and _is_distributed() else n  # processes differ in N
            key = key_of(kernel, rows, h, v, dtype, flags, device)
            config = _tuned(config, key, dtype, measure, is_collective)
    return replace(config, **_overrides.get(kernel, {}))


def interpreted(kernel: str, n: int, h: int, v: int) -> Config:
    """One configuration with blocks as large as the problem: a step costs 5 ms at any size."""
    if kernel == "region":
        return replace(_ROWS, block_n=_power(v, 16, 8192))
    return Config(_power(n, 16, 256), _power(v, 16, 2048), _power(h, 16, 1024), splits=1)


def shipped(kernel: str, n: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """The table's entry, with fewer rows a tile where there are few rows."""
    if kernel == "region":
        return _ROWS
    table = _SINGLE if dtype == torch.float32 else _HALF
    config = table[generation(capability)]
    return replace(config, block_m=_power(n, 16, config.block_m))


def generation(capability: tuple[int, int]) -> tuple[int, int]:
    """The row of the tables for a compute capability; unknown ones get the small tiles."""
    major, minor = capability
    if major in (9, 10):
        return (major, 0)
    return (8, 0) if (major, minor) == (8, 0) else (8, 9)


def candidates(base: Config, dtype: torch.dtype, capability: tuple[int, int]) -> list[Config]:
    """At most 12 configurations that fit into shared memory, the shipped one first."""
    limit = SHARED_MEMORY[generation(capability)]
    size = torch.finfo(dtype).bits // 8
    found = [base]
    for block_m, block_n in ((128, 256), (128, 128), (64, 256), (256, 128), (64, 128)):
        for block_k, stages in ((64, 3), (64, 4), (32, 4)):
            warps = 8 if block_m * block_n >= 128 * 128 else 4
            config = replace(
                *(base,),
                **dict(block_m=block_m, block_n=block_n, block_k=block_k),
                **dict(warps=warps, stages=stages),
            )
            if config not in found and shared_bytes(config, size) <= limit:
                found.append(config)
    return found[:12]


def shared_bytes(config: Config, element_size: int) -> int:
    """Shared memory of the load pipeline."""
    return (config.block_m + config.block_n) * config.block_k * element_size * config.stages


def choose_splits(num_row_blocks: int, num_tiles: int, num_processors: int) -> int:
    """Splits of the vocabulary: at least 4 programs a processor, then the least idle time.

    All programs do the same work, so the time is the number of rounds times the tiles of a split.
    """
    least = min(num_tiles, max(1, -(-4 * num_processors // num_row_blocks)))
    best, best_time = least, math.inf
    for splits in range(least, min(num_tiles, 4 * least) + 1):
        rounds = -(-num_row_blocks * splits // num_processors)
        time = rounds * -(-num_tiles // splits)
        if time < best_time:
            best, best_time = splits, time
    return best


# ------------------------------------------------------------------------------------- autotune


def key_of(
    kernel: str, n: int, h: int, v: int, dtype: torch.dtype, flags: str, device: torch.device
) -> str:
    """Key of a measurement; N counts by powers of two, 0 is any N."""
    bucket = str(_power(n, 16, 2**30)) if n else "any"
    name = torch.cuda.get_device_name(device)
    return " ".join(
        [kernel, bucket, str(h), str(v), str(dtype), flags, name.replace(" ", "_")]
        + [f"triton-{triton.__version__}"]
    )


def cache_file() -> Path:
    """Where measurements are kept."""
    return Path("~/.cache/litpost/fused_head.json").expanduser()


def _tuned(
    base: Config,
    key: str,
    dtype: torch.dtype,
    measure: Callable[[Config], Any] | None,
    is_collective: bool,
) -> Config:
    """The best candidate by time, from this process, from the disk or by measuring.

    In a job of several processes only rank 0 reads and measures, at the collective call for the
    forward kernel; it broadcasts the result and all that it knows. Other kernels take from that:
    a process without rows never launches them, and would leave the rest waiting.
    """
    is_job = _is_distributed()
    if key in _measured or (is_job and not is_collective):
        return _measured.get(key, base)
    box: list[Any] = [None, None]
    if not is_job or torch.distributed.get_rank() == 0:
        known = _read()
        if key not in known and measure is not None:
            known[key] = asdict(_fastest(base, dtype, measure))
            _write(key, known[key])
        box = [known.get(key, asdict(base)), known]
    if is_job:
        torch.distributed.broadcast_object_list(box, src=0)
    if is_job or measure is not None:
        _measured.update({k: Config(**v) for k, v in box[1].items()} | {key: Config(**box[0])})
    return Config(**box[0])


def _fastest(base: Config, dtype: torch.dtype, measure: Callable[[Config], Any]) -> Config:
    best, best_time = base, math.inf
    for config in candidates(base, dtype, torch.cuda.get_device_capability()):
        try:
            time = triton.testing.do_bench(lambda c=config: measure(c), warmup=20, rep=60)
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            continue
        if time < best_time:
            best, best_time = config, time
    return best


def _read() -> dict[str, dict[str, int]]:
    try:
        return json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(key: str, config: dict[str, int]) -> None:
    """Add a measurement; the file is replaced whole, so a reader never sees half of it."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(_read() | {key: config}, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError:
        pass  # a read-only home: measured again next time


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _power(value: int, least: int, most: int) -> int:
    """The power of two at or above ``value``, between two bounds."""
    return min(most, max(least, triton.next_power_of_2(value)))
