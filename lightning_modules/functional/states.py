"""Tensors of a live module to disk and back, one at a time, sharded or not.

A sharded tensor (DTensor) is gathered on the way out and cut again on the way in: every rank must
then take part in every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def reshard(module: torch.nn.Module) -> None:
    """Let go of gathered parameters: after a forward pass without a backward one FSDP2 keeps the
    root's, and the module's parameters are then no shards.

    Args:
        module: Sharded in parts, or not at all.
    """
    for unit in module.modules():
        if hasattr(unit, "reshard"):
            unit.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """The tensor without shards and gradient."""
    gather = getattr(tensor.detach(), "full_tensor", None)
    return tensor.detach() if gather is None else gather()


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into a live one of the same shape, in its dtype and sharding.

    Args:
        target: Parameter or buffer.
        value: What it becomes, equal on every rank.

    Raises:
        ValueError: Shapes differ.
    """
    if tuple(target.shape) != tuple(value.shape):
        raise ValueError(f"shape {tuple(value.shape)} does not fit {tuple(target.shape)}")
    moved = value.to(target.device, target.dtype)
    mesh = getattr(target, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        moved = distribute_tensor(moved, mesh, sharded.placements)
    target.copy_(moved)


def write_tensors(
    path: Path, named: Iterable[tuple[str, Tensor]], *, is_writer: bool = True
) -> None:
    """Write tensors as one safetensors file, whole or not at all.

    Args:
        path: The file.
        named: Names and live tensors.
        is_writer: Whether this rank writes.
    """
    state = {}
    for name, tensor in named:
        value = whole(tensor)
        if is_writer:
            state[name] = value.cpu().clone()
    if not is_writer:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(state, unfinished)
    unfinished.replace(path)


def read_tensors(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Write the tensors of a file into live ones of the same names, one at a time.

    Args:
        path: Made by ``write_tensors``.
        targets: By name; all of them must be in the file.

    Raises:
        ValueError: A name is missing, or a shape differs.
    """
    with safe_open(path, framework="pt") as file:
        known = set(file.keys())
        for name, target in targets.items():
            if name not in known:
                raise ValueError(f"{path} has no tensor {name}")
            assign(target, file.get_tensor(name))


def folder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a Hugging Face folder's safetensors files, one at a time.

    Args:
        folder: With ``model.safetensors`` or shards of it.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_tensor(name)


def load_dense(model: torch.nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Write whole dense weights into a live Hugging Face model; adapters then add nothing.

    Args:
        model: The base model, with adapters in its layers or without.
        named: Names and tensors as an export has them.

    Raises:
        ValueError: A weight of the model is missing, or ``exported_weights`` refuses the model.
    """
    live = model.state_dict(keep_vars=True)
    dense = exported_weights(model)
    seen = set()
    for name, value in named:
        if name in dense:
            assign(dense[name], value)
            seen.add(_place(dense[name]))
    if lost := [name for name, tensor in dense.items() if _place(tensor) not in seen]:
        raise ValueError(f"the weights have no tensor {lost[0]}")
    for name, tensor in live.items():
        if "lora_B" in name or "lora_embedding_B" in name:
            with torch.no_grad():
                tensor.zero_()


def exported_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Live dense weights under the names that an export gives them.

    Exports may have other names than the model: those of Qwen2.5-VL keep its first checkpoints'.

    Args:
        model: The base model, with adapters in its layers or without.

    Raises:
        ValueError: Adapters are of a kind that cannot be made to add nothing (DoRA), or exports cut
            or join weights (the experts of some mixtures).
    """
    live = model.state_dict(keep_vars=True)
    if odd := [name for name in live if "lora_magnitude" in name]:
        raise ValueError(f"merged weights cannot be loaded under DoRA ({odd[0]})")
    dense = {
        name.replace(".base_layer.", "."): t for name, t in live.items() if "lora_" not in name
    }
    if not isinstance(model, PreTrainedModel):
        return dense
    marks = {name: torch.empty(t.shape, device="meta") for name, t in dense.items()}
    names = {id(mark): name for name, mark in marks.items()}
    exported = revert_weight_conversion(model, dict(marks))
    if odd := [name for name, mark in exported.items() if id(mark) not in names]:
        raise ValueError(
            f"exports of this architecture cut or join weights ({odd[0]}): merges cannot be loaded "
            f"into the running model; merge exported folders with mode=merge instead"
        )
    return {name: dense[names[id(mark)]] for name, mark in exported.items()}


def _place(tensor: Tensor) -> int:
    """Equal for names of one (tied) tensor."""
    return (
        id(tensor) if tensor.requires_grad else getattr(tensor, "_local_tensor", tensor).data_ptr()
    )
