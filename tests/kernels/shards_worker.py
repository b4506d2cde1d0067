"""One rank of a vocabulary in unequal shares; prints nothing, writes errors against one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_modules.ops import TopK, linear_cross_entropy, linear_logprob_entropy

#: First token of each rank's rows.
STARTS = {"unequal": (0, 37, 101), "one tiny": (0, 99, 101)}
REGIONS = {"none": None, "K=1": TopK(1), "K=4": TopK(4), "K=50": TopK(50, preserve_mass=True)}


def inputs(*, ties: bool, dead: bool) -> dict[str, torch.Tensor]:
    """Full tensors, equal on every rank."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "hidden": random(23, 16),
        "weight": random(101, 16),
        "bias": random(101),
        "side_hidden": random(23, 3),
        "side_weight": random(101, 3),
    }
    if ties:  # equal logits on both sides of the border; small integers, so equal to the last bit
        for name in ("hidden", "weight", "bias", "side_hidden", "side_weight"):
            values[name] = values[name].round()
        values["weight"][30:60] = values["weight"][30]
        values["bias"][30:60] = 1.0
        values["side_weight"][30:60] = 0.0
    if dead:  # the whole of the first share is impossible
        values["bias"][:37] = -torch.inf
    values["targets"] = torch.randint(40, 101, (23,), generator=generator)
    values["targets"][[2, 22]] = -100
    return values


def results(values: dict[str, Any], rows: slice, region: Any, **shard: Any) -> dict[str, Any]:
    """Outputs and gradients from the rows of the vocabulary that a rank has."""
    leaves = {k: v.clone() for k, v in values.items() if k != "targets"}
    for name in ("weight", "bias", "side_weight"):
        leaves[name] = leaves[name][rows].clone()
    for leaf in leaves.values():
        leaf.requires_grad_()
    common = {
        "bias": leaves["bias"],
        "side": (leaves["side_hidden"], leaves["side_weight"]),
        "temperature": 0.8,
        "backend": "torch",
        **shard,
    }
    head = leaves["hidden"], leaves["weight"], values["targets"]
    found = linear_logprob_entropy(*head, region=region, **common)
    generator = torch.Generator().manual_seed(4)
    loss, stats = linear_cross_entropy(*head, z_loss=1e-3, return_stats=True, **common)
    if not values["bias"].isinf().any():
        loss = loss + linear_cross_entropy(*head, label_smoothing=0.1, **common)
    for value in (found.logprob, found.entropy, found.region_entropy):
        if value is not None:
            weights = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            loss = loss + (value * weights).sum()
    loss.backward()
    named = {k: v for k, v in found._asdict().items() if v is not None}
    named |= {f"stats.{k}": v for k, v in stats._asdict().items()} | {"loss": loss}
    return named | {f"d {k}": v.grad for k, v in leaves.items()}


def main(folder: str) -> None:
    """Compare every case and write the largest errors of this rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    errors = {}
    for share, starts in STARTS.items():
        rows = slice(starts[rank], starts[rank + 1])
        for kind in ("plain", "ties", "dead"):
            values = inputs(ties=kind == "ties", dead=kind == "dead")
            for name, region in REGIONS.items():
                alone = results(values, slice(0, 101), region)
                group = dist.group.WORLD
                own = results(values, rows, region, process_group=group, vocab_start=starts[rank])
                for key, value in own.items():
                    whole = alone[key]
                    if key in ("d weight", "d bias", "d side_weight"):
                        whole = whole[rows]
                    gap = float((whole.double() - value.double()).detach().abs().max())
                    errors[f"{share}/{kind}/{name}/{key}"] = gap
    refused = ""
    try:
        linear_logprob_entropy(
            *(torch.zeros(1, 4), torch.zeros(3, 4), torch.tensor([6])),
            process_group=dist.group.WORLD,
            vocab_start=3 * rank,
        )
    except IndexError as error:
        refused = str(error)
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"errors": errors, "refused": refused}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
