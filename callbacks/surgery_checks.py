"""What gradient surgery needs of batches and trainers, and what it says where that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

#: Of the callback's entry in a config.
KEY = "callbacks.gradient_surgery"


def domain_of(batch: Any) -> str | None:
    """The one domain of a batch.

    Args:
        batch: With a ``domain`` (attribute or key), or with ``domains`` (indices ``(N,)``) and
            ``domain_names``.

    Returns:
        Its name; None if it has none or several.

    Example:
        >>> domain_of({"domain": "math", "x": 1})
        'math'
    """

    def read(name: str) -> Any:
        return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)

    domain, domains, names = read("domain"), read("domains"), read("domain_names")
    if domain is None and isinstance(domains, Tensor) and names is not None:
        present = domains.unique().tolist()
        return str(names[present[0]]) if len(present) == 1 else None
    if isinstance(domain, (list, tuple)):  # what a default collate makes of strings
        return str(domain[0]) if len(set(domain)) == 1 else None
    return None if domain is None else str(domain)


def no_domain(number: int) -> str:
    """What to say of a micro-batch without a domain of its own.

    Args:
        number: Of the micro-batch in its window.

    Returns:
        The message.
    """
    return (
        f"gradient surgery needs micro-batches of one domain each; number {number} of this window "
        f"has none or several. Give data.shares, the micro-batches of each domain in an optimizer "
        f"step, such as 'data.shares={{math: 1, chat: 1}}'; other batches need a key or attribute "
        f"'domain'"
    )


def check_trainer(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a run in which gradients cannot be taken aside.

    Args:
        trainer: Set up.
        pl_module: Its module.

    Raises:
        ValueError: Manual optimization, a strategy that hides gradients, scaled losses.
    """
    strategy = trainer.strategy
    problem = ""
    if not pl_module.automatic_optimization:
        problem = "a module with automatic_optimization=False steps by itself"
    elif isinstance(strategy, FSDPStrategy) or strategy.handles_gradient_accumulation:
        problem = (
            f"trainer.strategy={type(strategy).__name__} keeps gradients to itself; use one "
            f"process, trainer.strategy=ddp or trainer=fsdp"
        )
    elif trainer.scaler is not None:
        problem = (
            f"trainer.precision={trainer.precision} scales losses; use bf16-mixed, bf16-true or "
            f"32-true"
        )
    if problem:
        raise ValueError(f"{KEY} cannot work here: {problem}")
    if trainer.accumulate_grad_batches == 1:
        rank_zero_warn(
            f"{KEY} has no effect: an optimizer step is one micro-batch, so one domain. Give "
            f"data.shares several domains"
        )
