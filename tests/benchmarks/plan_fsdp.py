"""Planned gathering beside FSDP2's own: ``python -m tests.benchmarks.plan_fsdp``.

One process takes the part of one of eight ranks: a process group of torch's own tests whose
collectives do nothing, so that real shards, buffers and gathered weights are allocated. Sequences
are so short that little else is. Prints MiB and ratios planned / measured; asserts nothing.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_modules.backbones.causal_lm import completion_logprobs
from lightning_modules.backbones.sharding import ShardingOptions, shard
from run_tools.plan_memory import Layout, Machine, count
from tests.benchmarks.plan_memory import MIB, Case, allocations, build, highest

RANKS = 8
SHORT: dict[str, Any] = {"prompt": 4, "new": 2, "prompts": 1, "samples": 1}
CASES: list[tuple[dict[str, Any], Case]] = [
    ({}, Case(width=512, layers=6, vocabulary=100, **SHORT)),
    ({"param_dtype": "bfloat16"}, Case(width=512, layers=6, vocabulary=100, **SHORT)),
    ({"reduce_dtype": None}, Case(width=512, layers=6, vocabulary=100, **SHORT)),
    ({"reshard_after_forward": False}, Case(width=512, layers=6, vocabulary=100, **SHORT)),
    ({}, Case(width=512, layers=6, vocabulary=100, lora=True, **SHORT)),
    ({}, Case(width=256, layers=2, vocabulary=8000, **SHORT)),
    ({"param_dtype": "bfloat16"}, Case(width=256, layers=2, vocabulary=8000, **SHORT)),
]


def compare(given: dict[str, Any], case: Case, folder: Path) -> dict[str, tuple[float, float]]:
    """Planned and measured bytes by phase."""
    options = ShardingOptions(**given)
    module, _ = build(case, folder)
    module.configure_model()
    counts = count(module, None)
    shard(module, module.trainable_parts, init_device_mesh("cpu", (RANKS,)), options)
    ids, mask = torch.ones(1, 6, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)

    def loss() -> torch.Tensor:
        found = completion_logprobs(module.policy, ids, torch.tensor([4]), mask)
        return found.logprob.sum()

    loss().backward()
    with allocations() as forward:
        value = loss()
    with allocations() as backward:
        value.backward()
    with allocations() as whole:
        with module.policy.gathered():
            pass
    size = 2 if given.get("param_dtype") else 4
    layout = Layout(counts, Machine("", RANKS, 1e12, False), options, size, None)
    planned = {name: layout.gathered(name) for name in ("start", "forward", "early", "late")}
    return {
        "forward": (max(planned["start"], planned["forward"]), highest(forward)),
        "backward": (
            max(planned["early"], planned["late"]),
            sum(forward) + highest(backward),
        ),
        "rollout": (layout.gathered("decode_whole"), highest(whole)),
    }


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        for given, case in CASES:
            with tempfile.TemporaryDirectory() as place:
                found = compare(given, case, Path(place) / "model")
            cells = [f"{n} {b / MIB:7.2f} MiB {a / b:.2f}" for n, (a, b) in found.items()]
            name = " ".join([case.label(), *(f"{k}={v}" for k, v in given.items())])
            print(f"{name:<44}{'   '.join(cells)}", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
