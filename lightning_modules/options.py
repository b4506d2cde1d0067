"""Option groups that modules take as plain mappings, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def read_options(cls: type[T], values: Mapping[str, Any] | T | None, key: str) -> T:
    """Make the dataclass ``cls`` of a mapping.

    Args:
        cls: A dataclass of options.
        values: Plain mapping, an instance (returned as it is) or None (all defaults).
        key: Config key for messages, e.g. ``optimizer``.

    Raises:
        ValueError: A key that ``cls`` does not have; names the nearest spelling.
    """
    if isinstance(values, cls):
        return values
    given: Mapping[str, Any] = values or {}  # type: ignore[assignment]
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    problems = []
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean '{key}.{near[0]}'?" if near else f"; known: {', '.join(known)}"
            problems.append(f"unknown key '{key}.{name}'{hint}")
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**given)


@dataclass
class BackboneOptions:
    """Which model, and how to load it.

    Args:
        path: Folder or hub name of a Hugging Face causal LM.
        dtype: Of the parameters; ``auto`` keeps the folder's.
        attn_implementation: As in transformers.
        gradient_checkpointing: Recompute activations in the backward pass.
        trust_remote_code: Run code that comes with the model; off unless asked.
        revision: Of the hub repository.
        random_init: Take the configuration only and start from random weights (a checkpoint
            brings its own).
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    random_init: bool = False


@dataclass
class MergeOptions:
    """A start from several exported folders.

    Args:
        folders: Exports of one architecture.
        method: A name of ``functional.merging.METHODS``.
        weights: One a folder, in any proportion; None for equal ones.
        base: Folder of the model that all started from, for methods on task vectors.
        options: Of the method, such as ``density``, and ``one_d``.
    """

    folders: list[str] = field(default_factory=list)
    method: str = "linear"
    weights: list[float] | None = None
    base: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoraOptions:
    """Low-rank adapters through PEFT; the reference policy is then the adapter switched off.

    Args:
        r: Rank.
        alpha: Scale is ``alpha / r``.
        dropout: On the adapter's input.
        target_modules: Names of linear layers, or ``all-linear`` (the head is left out).
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class KernelOptions:
    """The head that turns hidden states into log-probs (``kernels/``).

    Args:
        backend: ``auto`` is Triton on CUDA and PyTorch elsewhere; ``reference`` makes full logits
            and leaves gradients to autograd.
        workspace_mb: Most MiB of logits that exist at once; None for 64 on a CPU, 512 on CUDA.
    """

    backend: Literal["auto", "triton", "torch", "interpret", "reference"] = "auto"
    workspace_mb: int | None = None


@dataclass
class OptimizerOptions:
    """Optimizer and learning-rate schedule, stepped once an optimizer step.

    Args:
        class_path: Dotted path of a ``torch.optim.Optimizer``.
        lr: Peak learning rate.
        weight_decay: Decoupled for AdamW.
        betas: AdamW's moments; ignored where the optimizer has none.
        warmup_steps: Linear warm-up from 0; step 1 already has ``lr / warmup_steps``.
        warmup_ratio: The warm-up as a share of the steps, where ``warmup_steps`` is 0.
        schedule: After warm-up: constant, or linear or cosine down to ``final_fraction`` of ``lr``
            at the last step of the run.
        final_fraction: Of ``lr``.
        extra: Further keyword arguments of the optimizer.
    """

    class_path: str = "torch.optim.AdamW"
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_fraction: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
