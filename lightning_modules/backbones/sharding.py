"""FSDP2: ``fully_shard`` on decoder layers and on each root that holds trainable parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: items of the longest ``ModuleList`` of each part."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def shard(module: nn.Module, parts: Iterable[str], mesh: Any) -> None:
    """Shard the named parts of a module (and a frozen ``reference`` if there is one).

    Args:
        module: The LightningModule.
        parts: Attribute names of the parts that hold trainable parameters.
        mesh: One-dimensional device mesh.

    Raises:
        ValueError: A trainable parameter is left unsharded, which would break norm clipping.
    """
    from torch.distributed.fsdp import fully_shard

    for name in (*parts, "reference"):
        part = getattr(module, name, None)
        if part is None:
            continue
        for layer in decoder_layers(part):
            fully_shard(layer, mesh=mesh)
        fully_shard(part, mesh=mesh)
    whole = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not hasattr(parameter, "full_tensor")
    ]
    if whole:
        raise ValueError(
            f"trainer=fsdp leaves {len(whole)} trainable parameters unsharded, such as {whole[0]}: "
            f"add the attribute that holds them to `trainable_parts` of your module"
        )
