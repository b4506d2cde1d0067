"""One rank with a sharded pair and a whole copy: ``torchrun pair_worker.py <models> <results>``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from lightning_modules.backbones.sharding import shard
from lightning_modules.compressor.decoding import greedy_decode
from lightning_modules.compressor.folders import export_pair, load_pair
from lightning_modules.compressor.pair import Pair
from lightning_modules.compressor.sizes import pair_sizes
from tests.lightning_modules.compressor.small_pair import make_pair, source, targets

CASES: dict[str, dict[str, Any]] = {
    "embeds": {},
    "kv": {"form": "kv", "decoder": "compressor", "segment_tokens": 4},
}


def sharded(folder: Path, options: dict[str, Any]) -> Pair:
    """A pair whose parameters are spread over both ranks."""
    holder = nn.Module()
    holder.policy = pair = make_pair(folder, **options)
    shard(holder, ("policy",), init_device_mesh("cpu", (2,)))
    for name in Pair.forward_methods:
        register_fsdp_forward_method(pair, name)
    return pair


def gradient_gap(pair: Pair, whole: Pair, texts: Any, labels: Any) -> float:
    """Largest difference to the mean of both ranks' own gradients: one call, then two."""
    for each in (pair, whole):
        _, scores = each(*texts, *labels, entropy_grad=True)
        (scores.loss.mean() + scores.entropy.mean()).backward()
        memory = each.compress(*texts)
        each.score(memory, *labels).loss.mean().backward()
    gaps = []
    for own, other in zip(pair.parameters(), whole.parameters(), strict=True):
        if own.requires_grad:
            mean = other.grad.clone()
            dist.all_reduce(mean)
            gaps.append(float((own.grad.full_tensor() - mean / 2).abs().max()))
    return max(gaps)


def any_rank(value: bool) -> bool:
    """Whether it is true on one rank at least."""
    flag = torch.tensor(float(value))
    dist.all_reduce(flag)
    return bool(flag)


def measure(folder: Path, results: Path, name: str) -> dict[str, float | bool]:
    """Compare a sharded pair with a whole one on data of this rank."""
    rank, options = dist.get_rank(), CASES[name]
    pair, whole = sharded(folder, options), make_pair(folder, **options)
    texts = source([8, 5], seed=rank)
    labels = targets([4, 6], seed=rank) if name == "embeds" else texts
    found: dict[str, float | bool] = {"gradients": gradient_gap(pair, whole, texts, labels)}
    found["sizes"] = pair_sizes(pair) == pair_sizes(whole)
    pair.eval(), whole.eval()
    with torch.no_grad():
        expected = whole.compress(*texts)
        plain = greedy_decode(whole, expected, 5 + rank, eos_ids=[])
        mine = greedy_decode(pair, pair.compress(*texts), 5 + rank, eos_ids=[], any_rank=any_rank)
        found["decodes"] = plain.texts() == mine.texts()
        with pair.gathered() as is_whole:  # now each rank may stop by itself
            mine = greedy_decode(pair, pair.compress(*texts), 5 + rank, eos_ids=[])
            found["gathered"] = is_whole and plain.texts() == mine.texts()
        tokenizers = [
            AutoTokenizer.from_pretrained(folder / one)
            for one in ("compressor", options.get("decoder", "decoder"))
        ]
        export_pair(pair, *tokenizers, results / name, is_writer=rank == 0)
        dist.barrier()
        again = load_pair(results / name).compress(*texts)
        found["export"] = float((again.hidden - expected.hidden).abs().max())
    return found


def replicated(folder: Path, name: str) -> bool:
    """Whether DDP gets a gradient for each parameter; it raises in the second step if not."""
    model = DistributedDataParallel(make_pair(folder, **CASES[name]))
    texts = source([8, 5], seed=dist.get_rank())
    for _ in range(3):
        labels = targets([4, 6]) if name == "embeds" else texts
        model(*texts, *labels)[1].loss.mean().backward()
    return True


def main(folder: Path, results: Path) -> None:
    """Write what this rank found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        name: {**measure(folder, results, name), "ddp": replicated(folder, name)} for name in CASES
    }
    (results / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
