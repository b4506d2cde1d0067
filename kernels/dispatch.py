"""Which back end runs, and how much workspace it may take.

``FUSED_KERNELS=torch|triton|interpret|reference`` decides where ``backend="auto"`` was asked for;
``FUSED_WORKSPACE_MB`` replaces the default workspace.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "interpret", "reference")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Below so many logits the kernels' launches cost more than they save.
LEAST_LOGITS = 2**20

log = logging.getLogger("litpost.kernels")


def workspace_bytes(workspace_mb: int | None, hidden: Tensor) -> int:
    """Bytes of the workspace.

    Raises:
        ValueError: Less than 1 MiB.
    """
    default, variable = 512 if hidden.is_cuda else 64, os.environ.get("FUSED_WORKSPACE_MB")
    if workspace_mb is None and variable is not None:
        if not variable.isdecimal() or int(variable) < 1:
            raise ValueError(f"FUSED_WORKSPACE_MB={variable!r}: give a whole number, 1 or more")
        return int(variable) * 2**20
    if workspace_mb is None:
        workspace_mb = default
    if workspace_mb < 1:
        raise ValueError(f"workspace_mb={workspace_mb}: give 1 or more (MiB)")
    return workspace_mb * 2**20


def available_backend(device: torch.device | str) -> str:
    """``triton`` where its kernels can run on this device, else ``torch``."""
    return "torch" if _why_not(torch.device(device)) else "triton"


def _why_not(device: torch.device) -> str:
    """Why Triton cannot run on a device; empty if it can."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}, its kernels need CUDA"
    return _why_not_cuda(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _why_not_cuda(index: int) -> str:
    if torch.version.hip is not None:
        return "ROCm was not tested"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the device has compute capability {major}.{minor}, the kernels need 8.0"
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return "this torch cannot say whether Triton works"
    return "" if has_triton() else "Triton is not installed or finds no driver (pip install triton)"


def choose_backend(backend: str, hidden: Tensor, weight: Tensor) -> str:
    """The back end for these tensors.

    Args:
        backend: As asked for.
        hidden: ``(N, H)``.
        weight: ``(V, H)``.

    Returns:
        ``triton``, ``torch``, ``interpret`` or ``reference``.

    Raises:
        ValueError: An unknown name.
        RuntimeError: ``triton`` or ``interpret`` was asked for and cannot run; says why.
    """
    asked = backend
    if backend == "auto":
        backend = os.environ.get("FUSED_KERNELS", "auto")
    if backend not in BACKENDS:
        where = "backend" if asked != "auto" else "FUSED_KERNELS"
        raise ValueError(f"{where}={backend!r}: give one of {', '.join(BACKENDS)}")
    if backend in ("torch", "reference"):
        return backend
    if backend == "interpret":
        if hidden.device.type != "cpu" or hidden.dtype not in TRITON_DTYPES:
            raise RuntimeError(
                f"backend='interpret' runs the Triton kernels on CPU tensors of float32, bfloat16 "
                f"or float16; these are {hidden.dtype} on {hidden.device.type}"
            )
        return backend
    reason = _why_not(hidden.device)
    if not reason and hidden.dtype not in TRITON_DTYPES:
        reason = f"its kernels do not compute in {hidden.dtype}"
    if backend == "triton":
        if reason:
            raise RuntimeError(
                f"backend='triton' cannot run: {reason}. Use backend='torch' (any device) or "
                f"backend='auto'"
            )
        return backend
    if reason or hidden.shape[1] % 8 or hidden.shape[0] * weight.shape[0] < LEAST_LOGITS:
        if hidden.is_cuda and reason:
            _say_once(reason)
        return "torch"
    return "triton"


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("the fused head runs in PyTorch, not in Triton: %s", reason)
