"""One rank that decodes with a sharded policy: ``torchrun decode_worker.py <folder> <output>``.

Rank 0 has one prompt more than rank 1 and completions of different lengths, so ranks run out of
work at different times.
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
from datamodules.experience import Prompt
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.sharding import shard
from lightning_modules.options import BackboneOptions

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12), (4, 13), (3, 9, 4, 5)] + [(7, 5)]
LIMITS = [12, 5, 20, 9, 3]
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0, max_new_tokens=20),
    "sampled": Sampling(temperature=1.0, samples=3, max_new_tokens=20),
}


class Holder(torch.nn.Module):
    """What ``shard`` expects: a module with the policy as an attribute."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy


def completions(policy: Any, task: Any, numbers: list[int], max_sequences: int = 512) -> Any:
    """Tokens and log-probs of the numbered prompts, by kind of sampling and number."""
    engine = HFEngine(max_sequences=max_sequences)
    engine.sync(policy, 0)
    prompts = [
        Prompt(f"p{i}", PROMPTS[i], task, "default", max_new_tokens=LIMITS[i]) for i in numbers
    ]
    return {
        kind: {
            str(number): [[list(c.token_ids), list(c.logprobs)] for c in group]
            for number, group in zip(numbers, engine.generate(prompts, sampling), strict=True)
        }
        for kind, sampling in SAMPLINGS.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    policy = load_causal_lm(BackboneOptions(path=sys.argv[1])).eval()
    shard(Holder(policy), ("policy",), init_device_mesh("cpu", (world,)))
    assert all(hasattr(parameter, "full_tensor") for parameter in policy.parameters())
    numbers = list(range(rank, len(PROMPTS), world))
    found = {}
    for unshard, key in (("never", "all"), ("always", "gathered"), ("auto", "again")):
        policy.unshard_for_rollout = unshard
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, completions(policy, None, numbers, max_sequences=6))
        found[key] = {
            kind: {k: v for part in parts for k, v in part[kind].items()} for kind in SAMPLINGS
        }
        found[f"{key}, one rank idle"] = completions(policy, None, numbers if rank == 0 else [])
        if unshard != "never":  # fully_shard itself leaves a root whole after its forward
            assert all(hasattr(parameter, "full_tensor") for parameter in policy.parameters())
    with policy.gathered() as is_whole:
        assert is_whole and not any(hasattr(p, "full_tensor") for p in policy.parameters())
    loss = policy(torch.tensor([PROMPTS[0]])).logits.square().mean()  # trains as if never gathered
    loss.backward()
    gradients = [p.grad.full_tensor().norm().item() for p in policy.parameters()]
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found | {"gradients": gradients}))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # torch's threads sometimes abort an interpreter that is being taken down (seen with 2.13:
    # "terminate called without an active exception"); the work is done and checked by then
    os._exit(0)


if __name__ == "__main__":
    main()
