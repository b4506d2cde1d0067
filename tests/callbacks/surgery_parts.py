"""A module, named domains with fixed numbers, and a trainer for tests of gradient surgery."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.gradient_surgery import GradientSurgery
from datamodules.loader import Loader, Source

ORDER = ("chat", "math", "if", "math")


class Batches(Source):
    """Named domains with fixed random numbers: the same window at every step."""

    def __init__(self, order: tuple[str, ...] = ORDER, steps: int = 8) -> None:
        self.order, self.window, self.steps = order, len(order), steps

    def __len__(self) -> int:
        return self.window * self.steps

    def batch(self, epoch: int, index: int) -> dict[str, Any]:
        domain = self.order[index % self.window]
        number = self.order[: index % self.window].count(domain)
        generator = torch.Generator().manual_seed(sum(map(ord, domain)) + 31 * number)
        x = torch.randn(6, 8, generator=generator)
        return {"domain": domain, "x": x, "y": torch.randn(6, 4, generator=generator)}


class Net(LightningModule):
    """Two linear layers; plain SGD, so that a step shows its gradient."""

    def __init__(self, *, frozen: bool = False, lr: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.unused = nn.Parameter(torch.ones(20))
        self.layers[0].requires_grad_(not frozen)
        self.lr = lr
        self.grads: list[dict[str, Tensor | None]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return (self.layers(batch["x"]) - batch["y"]).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()}
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def fit(
    surgery: GradientSurgery | None,
    *,
    module: Any = None,
    source: Any = None,
    steps: int = 1,
    **flags: Any,
) -> Any:
    source = source or Batches()
    module = module or Net()
    callbacks: list[Callback] = [*flags.pop("callbacks", []), *([surgery] if surgery else [])]
    own = {"accumulate_grad_batches": source.window, "logger": False}
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, callbacks=callbacks, **own | flags,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=Loader(source))
    return module


def domain_gradients(module: Net, source: Batches) -> dict[str, dict[str, Tensor]]:
    """Each domain's gradient of the window's mean loss, by plain autograd."""
    found: dict[str, dict[str, Tensor]] = {}
    for index in range(source.window):
        batch = source.batch(0, index)
        loss = module.training_step(batch, index) / source.window
        named = [(n, p) for n, p in module.named_parameters() if n != "unused" and p.requires_grad]
        values = torch.autograd.grad(loss, [p for _, p in named])
        mine = found.setdefault(batch["domain"], {})
        for (name, _), value in zip(named, values, strict=True):
            mine[name] = mine.get(name, 0) + value
    return found
