"""What lets a checkpoint go on under another strategy or on another number of processes.

An optimizer numbers its parameters, and strategies number them differently. So checkpoints hold its
state under the parameters' names; what loads it numbers them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn


def named_optimizer_state(
    state: dict[str, Any], module: nn.Module, optimizer: Any, strategy: Any
) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with parameter names in place of numbers.

    Args:
        state: What Lightning's strategy gave; empty on ranks that do not write.
        module: Whose parameters.
        optimizer: Of these parameters.
        strategy: Lightning's: FSDP2 numbers all parameters of the module, others the optimizer's.
    """
    if not state:
        return state
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    if isinstance(strategy, ModelParallelStrategy):
        names: Sequence[str] = list(name_of.values())
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = [name_of[id(parameter)] for parameter in parameters]
    return _renamed(state, dict(enumerate(names)))


def numbered_optimizer_state(state: dict[str, Any]) -> dict[str, Any]:
    """The same with numbers again, in the order of its groups, as ``torch.optim`` counts them."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    if not all(isinstance(name, str) for name in names):
        return state
    return _renamed(state, {name: number for number, name in enumerate(names)})


def _renamed(state: dict[str, Any], new: dict[Any, Any]) -> dict[str, Any]:
    return {
        **state,
        "state": {new.get(key, key): value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [new.get(key, key) for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def what_is_lost(checkpoint: dict[str, Any], world_size: int) -> str | None:
    """One line for a checkpoint that another number of processes wrote; None where it was as many.

    Args:
        checkpoint: Whole, or without the weights.
        world_size: Processes of this run.
    """
    before = int(checkpoint.get("litpost", {}).get("world_size", world_size))
    if before == world_size:
        return None
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    loaders = loop.get("combined_loader") or []
    pending = [ranks for loader in loaders for ranks in loader["source"].get("pending", [])]
    num_pending = sum(len(ranks) for ranks in pending)
    dropped = (
        f"{num_pending} mini-batches of the open rollout (the next rollout is sampled now) and "
        if num_pending
        else ""
    )
    return (
        f"{before} process(es) wrote this checkpoint, {world_size} go on: weights, optimizer, "
        f"schedule and place in the data are restored; not restored: {dropped}the random states "
        f"of each process (dropout differs, sampling does not)"
    )
