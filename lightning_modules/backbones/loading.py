"""What every kind of backbone does alike: loading a folder or hub name, putting adapters on it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig

from lightning_modules.functional.states import reshard
from lightning_modules.options import BackboneOptions, LoraOptions


def load_pretrained(cls: Any, options: BackboneOptions, kind: str, **extra: Any) -> Any:
    """Load a Hugging Face model, or make a random one of its configuration.

    Args:
        cls: A class of transformers with ``from_pretrained``, such as ``AutoModel``.
        options: Of the backbone.
        kind: What is loaded, for messages.
        **extra: Of the model's constructor.

    Raises:
        ValueError: The folder is missing or holds something else.
    """
    dtype: Any = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    attention = options.attn_implementation
    shared = {
        "trust_remote_code": options.trust_remote_code,
        "revision": options.revision or "main",
    }
    try:
        if options.random_init:
            config = AutoConfig.from_pretrained(options.path, **shared)
            model = cls.from_config(
                config,
                dtype=None if dtype == "auto" else dtype,
                attn_implementation=attention,
                trust_remote_code=options.trust_remote_code,
                **extra,
            )
        else:
            model = cls.from_pretrained(
                options.path, dtype=dtype, attn_implementation=attention, **shared, **extra
            )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"backbone.path={options.path!r} cannot be loaded as {kind}: {first}"
        ) from error
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def add_lora(model: Any, lora: LoraOptions, task_type: str) -> Any:
    """Put adapters on a model.

    Args:
        model: A Hugging Face model.
        lora: Of the adapters.
        task_type: As in PEFT, such as ``CAUSAL_LM``.
    """
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,  # type: ignore[arg-type]
            target_modules=lora.target_modules,
            task_type=task_type,
        ),
    )


@torch.no_grad()
def fold_adapters(model: Any, seed: int) -> None:
    """Add what the adapters have learnt to the weights under them, and start them afresh.

    The model computes what it did before: fresh adapters add nothing (B is 0, A as PEFT draws it).

    Args:
        model: A PEFT model or what holds one, sharded or not; every rank must call it.
        seed: Of the fresh adapters, equal on all ranks.
    """
    reshard(model)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        weight = module.base_layer.weight
        for adapter in module.active_adapters:
            delta = module.get_delta_weight(adapter)
            weight.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta)
            first, second = (part[adapter].weight for part in (module.lora_A, module.lora_B))
            bound = first.shape[1] ** -0.5
            fresh = torch.empty(first.shape).uniform_(-bound, bound, generator=generator)
            if isinstance(first, DTensor):
                first.copy_(
                    distribute_tensor(fresh.to(first.device), first.device_mesh, first.placements)
                )
            else:
                first.copy_(fresh)
            second.zero_()
