"""FSDP2: ``fully_shard`` on decoder layers and on each root that holds trainable parameters.

``trainer=fsdp`` is ``FSDP2`` below: data-parallel over all devices of all machines, checkpoints as
one file that loads without pickle. Between steps a rollout may gather the weights once
(``gathered``) instead of layer by layer for every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

Dtype = Literal["bfloat16", "float16", "float32"]
Unshard = Literal["auto", "always", "never"]


@dataclass
class ShardingOptions:
    """How the parts of a module are sharded.

    Args:
        param_dtype: Of gathered parameters and of the computation; None keeps the parameters' own.
        reduce_dtype: In which gradients are summed over the ranks; None is ``param_dtype``.
        reshard_after_forward: Free a layer's gathered weights until its backward pass.
        activation_checkpointing: Recompute activations in the backward pass.
        cpu_offload: Keep shards, gradients and optimizer on the host; needs CUDA.
        unshard_for_rollout: Gather all weights once for a rollout of the ``hf`` engine: where they
            fit into half of the free memory (``auto``), ``always`` or ``never``.
    """

    param_dtype: Dtype | None = None
    reduce_dtype: Dtype | None = "float32"
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    unshard_for_rollout: Unshard = "auto"


class FSDP2(ModelParallelStrategy):
    """Lightning's model-parallel strategy with one data-parallel dimension over all devices.

    Modules shard themselves in ``configure_model`` and read ``options`` there.

    Args:
        param_dtype: This and the next five are those of ``ShardingOptions``.
        reduce_dtype: In which gradients are summed over the ranks.
        reshard_after_forward: Free a layer's gathered weights until its backward pass.
        activation_checkpointing: Recompute activations in the backward pass.
        cpu_offload: Keep shards, gradients and optimizer on the host.
        unshard_for_rollout: Gather all weights once for a rollout.
        timeout_minutes: Of a collective: how long the other ranks wait for one that died.

    Raises:
        ValueError: A value that is not known.

    Example:
        >>> FSDP2(param_dtype="bfloat16").options.param_dtype
        'bfloat16'
    """

    def __init__(
        self,
        *,
        param_dtype: Dtype | None = None,
        reduce_dtype: Dtype | None = "float32",
        reshard_after_forward: bool = True,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        unshard_for_rollout: Unshard = "auto",
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            data_parallel_size=1,  # set once the devices are known
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,  # a distributed one would unpickle
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.options = ShardingOptions(
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            reshard_after_forward=reshard_after_forward,
            activation_checkpointing=activation_checkpointing,
            cpu_offload=cpu_offload,
            unshard_for_rollout=unshard_for_rollout,
        )
        known = {
            "param_dtype": (None, "bfloat16", "float16", "float32"),
            "reduce_dtype": (None, "bfloat16", "float16", "float32"),
            "unshard_for_rollout": ("auto", "always", "never"),
        }
        for name, allowed in known.items():
            value = getattr(self.options, name)
            if value not in allowed:
                names = ", ".join("null" if one is None else one for one in allowed)
                raise ValueError(f"trainer.strategy.{name}={value!r}: give one of {names}")

    def setup_environment(self) -> None:
        """Shard over all devices of all machines (Lightning's own default is machines only)."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        if self.options.cpu_offload and self.root_device.type == "cpu":
            raise ValueError(
                "trainer.strategy.cpu_offload=true: the weights are on the CPU already; use it "
                "with trainer.accelerator=gpu"
            )
        super().setup_environment()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the model's own ``blocks``, or items of its longest ``ModuleList``.

    Every rank must run each of them in every forward pass: a part that a batch may do without (a
    vision tower) names others as its ``blocks``.
    """
    own = getattr(model, "blocks", None)
    if own is not None:
        return list(own)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def shard(
    module: nn.Module, parts: Iterable[str], mesh: Any, options: ShardingOptions | None = None
) -> None:
    """Shard the named parts of a module (and a frozen ``reference`` if there is one).

    Args:
        module: The LightningModule.
        parts: Attribute names of the parts that hold trainable parameters.
        mesh: One-dimensional device mesh.
        options: How; None for the defaults.

    Raises:
        ValueError: A trainable parameter is left unsharded, which would break norm clipping.
    """
    from torch.distributed.fsdp import fully_shard

    options = options or ShardingOptions()
    keywords = {"mesh": mesh, **_policies(options)}
    for name in (*parts, "reference"):
        part = getattr(module, name, None)
        if part is None:
            continue
        if options.activation_checkpointing:
            _checkpoint_activations(part)
        layers = decoder_layers(part)
        for layer in layers:
            fully_shard(layer, reshard_after_forward=options.reshard_after_forward, **keywords)
        fully_shard(part, reshard_after_forward=False, **keywords)
        part.unshard_for_rollout = options.unshard_for_rollout
        part.resharded = [*((layer, options.reshard_after_forward) for layer in layers)]
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


def _policies(options: ShardingOptions) -> dict[str, Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

    def dtype(name: str | None) -> torch.dtype | None:
        return None if name is None else getattr(torch, name)

    precision = MixedPrecisionPolicy(
        param_dtype=dtype(options.param_dtype), reduce_dtype=dtype(options.reduce_dtype)
    )
    offload = CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy()
    return {"mp_policy": precision, "offload_policy": offload}


def _checkpoint_activations(part: nn.Module) -> None:
    for model in part.modules():
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is not None:
            enable({"use_reentrant": False})
            return


@contextmanager
def gathered(part: nn.Module) -> Iterator[bool]:
    """Inside the block a sharded part is whole on every rank, where that is wanted and fits.

    Every rank must enter and leave it. No rank waits for another inside: forward passes may then
    differ in number. The weights must not be changed inside.

    Args:
        part: A module that ``shard`` has treated, or any other.

    Yields:
        Whether the part is whole (also where it never was sharded).
    """
    units = [unit for unit in part.modules() if hasattr(unit, "unshard")]
    if not units:
        yield True
        return
    if not _fits(part):
        yield False
        return
    layers = getattr(part, "resharded", [])
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
            unit.unshard()  # type: ignore[operator]
        yield True
    finally:
        for unit in units:
            unit.reshard()  # type: ignore[operator]
        for layer, is_resharded in layers:
            layer.set_reshard_after_forward(is_resharded, recurse=False)


def _fits(part: nn.Module) -> bool:
    """Whether all ranks have room for the whole part; the same answer on each."""
    wanted = getattr(part, "unshard_for_rollout", "auto")
    if wanted != "auto":
        return wanted == "always"
    needed = sum(p.numel() * p.element_size() for p in part.parameters())  # of whole tensors
    device = next(part.parameters()).device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // max(1, dist.get_world_size())
    fits = torch.tensor(int(needed < free // 2), device=device)
    dist.all_reduce(fits, dist.ReduceOp.MIN)
    return bool(fits)
