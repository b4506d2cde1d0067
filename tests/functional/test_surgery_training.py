"""Surgery trains a weak domain that plain mixing drowns: the exact-gradient toy of the card, 9B.

Two domains share an MLP; their targets oppose each other in part, and one loss is ten times as
large. Measured over three seeds: see the table that this file prints when it is run as a script.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.functional.surgery import gram_of, pcgrad_weights
from lightning_modules.functional.units import partition

POINTS, FEATURES, WIDTH, STEPS = 256, 8, 64, 400
SCALES = (10.0, 1.0)
GRANULARITIES = ("global", "module", "tensor")
SEEDS = (0, 1, 2)


def problem(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs with a small flag of the domain, and targets, for both domains."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(POINTS, FEATURES, generator=generator)
    v, u = torch.randn(2, FEATURES, 1, generator=generator) / FEATURES**0.5
    first = torch.tanh(2 * x @ v)
    second = -0.7 * first + 0.7 * torch.tanh(x @ u)
    flags = 0.5 * torch.eye(2)
    return [
        (torch.cat([x, flag.expand(POINTS, 2)], 1), y)
        for flag, y in zip(flags, (first, second), strict=True)
    ]


def train(granularity: str, seed: int) -> tuple[float, float, float]:
    """Final loss of the strong and the weak domain, and the share of steps in conflict."""
    torch.manual_seed(100 + seed)
    net = nn.Sequential(
        nn.Linear(FEATURES + 2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(),
        nn.Linear(WIDTH, 1),
    )  # fmt: skip
    data = problem(seed)
    names, parameters = zip(*net.named_parameters(), strict=True)
    sizes = [parameter.numel() for parameter in parameters]
    kind: Any = "global" if granularity == "none" else granularity
    unit_of = torch.tensor(partition(names, sizes, granularity=kind).unit_of)
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    conflicts = 0
    for _ in range(STEPS):
        losses = [s * (net(x) - y).square().mean() for s, (x, y) in zip(SCALES, data, strict=True)]
        gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
        grams = torch.stack([gram_of(pair) for pair in zip(*gradients, strict=True)])
        conflicts += bool(grams.sum(0)[0, 1] < 0)
        total = torch.zeros(int(unit_of.max()) + 1, 2, 2).index_add_(0, unit_of, grams)
        weights = torch.ones(len(total), 2)
        if granularity != "none":
            weights = pcgrad_weights(total, generator=generator).float()
        for parameter, unit, one, other in zip(parameters, unit_of, *gradients, strict=True):
            parameter.grad = weights[unit, 0] * one + weights[unit, 1] * other
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    final = [float((net(x) - y).square().mean().detach()) for x, y in data]
    return final[0], final[1], conflicts / STEPS


def averages(granularity: str) -> list[float]:
    rows = torch.tensor([train(granularity, seed) for seed in SEEDS])
    return rows.mean(0).tolist()


@pytest.mark.slow
def test_surgery_saves_the_weak_domain() -> None:
    strong, weak, conflicts = averages("none")
    assert conflicts > 0.9
    for granularity in GRANULARITIES:
        mine = averages(granularity)
        assert mine[1] < 0.6 * weak, granularity
        assert mine[0] + mine[1] < strong + weak, granularity


if __name__ == "__main__":
    for arm in ("none", *GRANULARITIES):
        print(arm, " ".join(f"{value:.3f}" for value in averages(arm)))
