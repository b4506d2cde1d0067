"""One rank that runs search episodes: ``torchrun search_worker.py <folder> <output>``.

The policy is sharded and rank 0 has more episodes than rank 1, so ranks run out of work at
different times; then rank 1 has none at all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.engines.search import SearchEngine
from datamodules.experience import Prompt
from datamodules.tasks.searching import Question
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.sharding import shard
from lightning_modules.options import BackboneOptions
from tests.datamodules.search_parts import PLACES, Overlap, Quiz

COUNT = 5


def episodes(policy: Any, numbers: list[int]) -> dict[str, Any]:
    """Tokens and searches of the numbered prompts."""
    task = Quiz()
    engine = SearchEngine(
        HFEngine(), task=task, retriever=Overlap(), top_k=1, max_searches=3, turn_tokens=8
    )
    engine.sync(policy, 0)
    prompts = [
        Prompt(f"p{n}", task.ids(PLACES[n]), task, record=Question(f"p{n}", PLACES[n], ("x",)))
        for n in numbers
    ]
    groups = engine.generate(prompts, Sampling(samples=2, max_new_tokens=20 + 10 * len(numbers)))
    return {
        str(n): [
            [list(one.token_ids), one.trace.num_invalid, len(one.trace.turns)] for one in group
        ]
        for n, group in zip(numbers, groups, strict=True)
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    policy = load_causal_lm(BackboneOptions(path=sys.argv[1])).eval()
    holder = torch.nn.Module()
    holder.policy = policy
    shard(holder, ("policy",), init_device_mesh("cpu", (world,)))
    found: dict[str, Any] = {}
    for unshard in ("never", "always"):
        policy.unshard_for_rollout = unshard
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, episodes(policy, [0, 1, 2] if rank == 0 else [3]))
        found[unshard] = parts
        dist.all_gather_object(parts := [None] * world, episodes(policy, [4] * (rank == 0)))
        found[f"{unshard}, one rank idle"] = parts
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's threads sometimes abort an interpreter that is being taken down


if __name__ == "__main__":
    main()
