"""Memory of one GPU by part, from what was counted and metered.

Parts are those at the moment of the peak, so they add up to it. Formulas and how sure they are:
docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from lightning_modules.backbones.sharding import FSDP2, ShardingOptions, decoder_layers
from run_tools.checks import locate
from run_tools.plan_steps import Numbers, is_local, parts_of

GIB = 2**30
#: Rows of the table, in order.
PARTS = {
    "weights": "weights",
    "reference": "frozen copies",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "temporaries": "temporaries",
    "head": "head, inside",
    "kv_cache": "KV cache",
    "gathered": "gathered, buffers",
    "engine": "engine's own",
}


@dataclass(frozen=True)
class Machine:
    """Devices to plan for.

    Args:
        name: Head of its columns.
        gpus: Processes, one device each.
        memory: Bytes of one device.
        is_cuda: Whether kernels of GPUs run there.
        is_timed: Whether seconds are estimated.
    """

    name: str
    gpus: int
    memory: float
    is_cuda: bool = True
    is_timed: bool = True


@dataclass
class Part:
    """Weights of one part of the module, under one owner.

    Args:
        total: Bytes as they are stored.
        numel: Elements.
        trained: Bytes of the trainable ones.
        layers: Decoder layers.
        layer: Elements of the largest layer.
        layer_trained: Its trainable elements.
        root: Elements outside of the layers, gathered from the first forward on.
        root_trained: The trainable ones among them.
        is_frozen: Nothing in it is trained and the optimizer does not know it.
    """

    total: float = 0.0
    numel: int = 0
    trained: float = 0.0
    layers: int = 0
    layer: int = 0
    layer_trained: int = 0
    root: int = 0
    root_trained: int = 0
    is_frozen: bool = False


@dataclass
class Counts:
    """What the module holds.

    Args:
        parameters: Elements, tied ones once, frozen copies left out.
        trainable: Those that are trained.
        head: Those of the output layer.
        is_tied: Whether the head is the embedding.
        reference: Elements of frozen copies.
        parts: Its parts.
        optimizer: Bytes of the optimizer's state.
        step: Bytes that its step takes for a moment.
        optimizer_class: Its class.
    """

    parameters: int
    trainable: int
    head: int
    is_tied: bool
    reference: int
    parts: list[Part]
    optimizer: float = 0.0
    step: float = 0.0
    optimizer_class: str = ""

    def sum(self, name: str, *, frozen: bool | None = None) -> float:
        """Sum of a field over the parts."""
        chosen = [p for p in self.parts if frozen is None or p.is_frozen == frozen]
        return float(sum(getattr(part, name) for part in chosen))


def count(module: Any, stored: torch.dtype | None) -> Counts:
    """Count parameters and bytes of a built module, on any device.

    Args:
        module: The LightningModule.
        stored: Dtype in which the Trainer's precision keeps weights; None keeps their own.
    """
    parts = [_count_part(part, stored) for part in parts_of(module)]
    whole = [part for part in parts if not part.is_frozen]
    own = [p for part in parts_of(module) for p in part.parameters() if p.requires_grad]
    head = getattr(getattr(module, "policy", None), "base", None)
    output = head.get_output_embeddings() if head is not None else None
    inputs = head.get_input_embeddings() if head is not None else None
    is_tied = output is not None and getattr(output, "weight", 0) is getattr(inputs, "weight", 1)
    return Counts(
        parameters=sum(part.numel for part in whole),
        trainable=sum(p.numel() for p in own),
        head=0 if output is None else sum(p.numel() for p in output.parameters()),
        is_tied=is_tied,
        reference=sum(part.numel for part in parts if part.is_frozen),
        parts=parts,
    )


def _count_part(part: nn.Module, stored: torch.dtype | None) -> Part:
    def size(parameter: nn.Parameter) -> int:
        kind = stored if stored is not None and parameter.is_floating_point() else parameter.dtype
        return parameter.numel() * kind.itemsize

    found = list(part.parameters())
    layers = decoder_layers(part)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    trained = [sum(p.numel() for p in x.parameters() if p.requires_grad) for x in layers]
    all_trained = sum(p.numel() for p in found if p.requires_grad)
    return Part(
        total=sum(map(size, found)),
        numel=sum(p.numel() for p in found),
        trained=sum(size(p) for p in found if p.requires_grad),
        layers=len(layers),
        layer=max(sizes, default=0),
        layer_trained=max(trained, default=0),
        root=sum(p.numel() for p in found) - sum(sizes),
        root_trained=all_trained - sum(trained),
        is_frozen=all_trained == 0,
    )


def sharding_of(trainer: Mapping[str, Any]) -> ShardingOptions | None:
    """Options of FSDP2 if the trainer's strategy is one, or a class made from it."""
    strategy = trainer.get("strategy")
    if not isinstance(strategy, Mapping) or "_target_" not in strategy:
        return None
    cls = locate(str(strategy["_target_"]))
    if not (isinstance(cls, type) and issubclass(cls, FSDP2)):
        return None
    known = {item.name for item in fields(ShardingOptions)}
    return ShardingOptions(**{k: v for k, v in strategy.items() if k in known})


@dataclass
class Phases:
    """Bytes by part at the peak of each phase.

    Args:
        rollout: Sampling.
        annotate: Passes without gradient over what was sampled.
        training: Forward, backward and the optimizer's step.
        host: Bytes kept on the host (CPU offload).
        is_whole: Whether sampling has all weights at once.
    """

    rollout: dict[str, float]
    annotate: dict[str, float]
    training: dict[str, float]
    host: float = 0.0
    is_whole: bool = True

    @property
    def by_name(self) -> dict[str, dict[str, float]]:
        """The three phases, in the order in which they happen."""
        return {"rollout": self.rollout, "annotate": self.annotate, "training": self.training}

    @property
    def peak(self) -> float:
        """The largest of the three sums."""
        return max(sum(parts.values()) for parts in self.by_name.values())


@dataclass
class Layout:
    """How a run lays its memory out.

    Args:
        counts: Of the module.
        machine: Where.
        sharding: FSDP2, or None.
        computed: Bytes of one gathered weight.
        engine: Of the run; asked for what it reserves.
        window: Micro-batches an optimizer step.
        state: Weights, frozen copies, gradients and optimizer, bytes on the device.
    """

    counts: Counts
    machine: Machine
    sharding: ShardingOptions | None
    computed: int
    engine: Any
    window: int = 1
    state: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        share = self.machine.gpus if self.sharding is not None else 1
        self.state = {
            "weights": self.counts.sum("total", frozen=False) / share,
            "reference": self.counts.sum("total", frozen=True) / share,
            "gradients": self.counts.sum("trained") / share,
            "optimizer": self.counts.optimizer / share,
        }

    @property
    def is_offloaded(self) -> bool:
        """Whether shards, gradients and optimizer stay on the host."""
        return self.sharding is not None and self.sharding.cpu_offload

    def device(self, **changes: float) -> dict[str, float]:
        """All parts, state included, with ``changes``."""
        state = dict.fromkeys(self.state, 0.0) if self.is_offloaded else dict(self.state)
        return {**dict.fromkeys(PARTS, 0.0), **state, **changes}

    def reserved(self, *, training: bool) -> float:
        """What an engine in this process keeps for itself."""
        share = getattr(self.engine, "gpu_memory_utilization", None)
        if share is None or not is_local(self.engine):
            return 0.0
        if training and getattr(self.engine, "sleep_level", None):
            return 0.0
        cache, weights = getattr(self.engine, "kv_cache_gib", None), self.counts.sum("numel")
        if cache is None and not self.machine.is_cuda:
            cache = 0.5
        if cache is not None:
            return cache * GIB + weights * self.computed
        return float(share) * self.machine.memory

    def gathered(self, phase: str) -> float:
        """Bytes of whole weights, whole gradients and communication buffers.

        Read off ``torch/distributed/fsdp/_fully_shard`` of torch 2.13 and compared with it on a CPU
        (``tests/benchmarks/plan_memory.py``). Roots stay whole from the first forward on. In the
        forward a layer is there three times: whole, the flat buffer it came in, and the one of the
        layer before. In the backward: a whole layer, the flat buffer of the next, its gradients,
        and the buffer in ``reduce_dtype`` of the layer before. The root's gradients come last.

        Args:
            phase: ``decode``, ``decode_whole``, ``annotate``, ``start``, ``forward``, ``early``,
                ``late`` or ``step``.
        """
        options, size, parts = self.sharding, self.computed, self.counts.parts
        if options is None:
            return self.state["gradients"] if self.machine.gpus > 1 else 0.0  # DDP's buckets
        summed = getattr(torch, options.reduce_dtype).itemsize if options.reduce_dtype else size
        roots = self.counts.sum("root") * size
        layer = max(part.layer for part in parts) * size
        frozen_roots = self.counts.sum("root", frozen=True) * size  # nothing reshards them
        if phase == "step":
            return frozen_roots
        if phase == "decode_whole":
            everything = self.counts.sum("numel", frozen=False) * size
            return frozen_roots + max(everything + layer, 2 * (roots - frozen_roots))
        if phase == "start":
            return roots + max(part.root for part in parts) * size + 2 * layer
        keeps_layers = not options.reshard_after_forward and phase not in ("decode", "annotate")
        every = sum(part.layers * part.layer for part in parts if not part.is_frozen) * size
        if phase in ("decode", "annotate", "forward"):
            return roots + (every + 2 * layer if keeps_layers else 3 * layer)
        grads = max(part.layer_trained for part in parts)
        root_grads = max(part.root_trained for part in parts)
        head_grads = 0 if self.counts.is_tied else min(self.counts.head, root_grads)
        early = roots + head_grads * size + grads * size
        early += every if keeps_layers else 2 * layer + grads * summed
        if phase == "early":
            return early
        last = max(roots + root_grads * size, root_grads * (size + summed) + frozen_roots)
        return max(early, last + grads * summed)


def phases(layout: Layout, numbers: Numbers) -> Phases:
    """The peaks of all phases.

    Args:
        layout: Where the state lies.
        numbers: What a micro-batch, a rollout and its annotation were metered to take.
    """
    is_whole = _is_whole(layout)
    own_engine = layout.reserved(training=False)
    sampling = []
    for name in ("prefill", "repeat", "decode"):
        own = getattr(numbers, name).parts | {
            "gathered": layout.gathered("decode_whole" if is_whole else "decode")
        }
        if own_engine:  # it has weights and cache of its own
            own = {"gathered": layout.gathered("step")}
        sampling.append(_with_old_gradients(layout.device(**own, engine=own_engine), layout))
    own = numbers.annotate.parts | {"gathered": layout.gathered("annotate")}
    annotate = _with_old_gradients(layout.device(**own, engine=own_engine), layout)
    training: list[dict[str, float]] = []
    has_all_gradients = layout.window > 1 or layout.sharding is not None or layout.machine.gpus > 1
    if layout.sharding is not None:
        training.append(layout.device(gathered=layout.gathered("start")))
    for name in ("forward", "early", "late"):
        own = dict(getattr(numbers, name).parts)
        fresh = own.pop("gradients")
        own["gathered"] = layout.gathered(name)
        if name != "forward" and not has_all_gradients and not layout.is_offloaded:
            own["gradients"] = fresh
        training.append(layout.device(**own, engine=layout.reserved(training=True)))
    if not layout.is_offloaded:
        share = layout.machine.gpus if layout.sharding is not None else 1
        own = {"temporaries": layout.counts.step / share, "gathered": layout.gathered("step")}
        training.append(layout.device(**own, engine=layout.reserved(training=True)))
    host = sum(layout.state.values()) if layout.is_offloaded else 0.0
    return Phases(_largest(sampling), annotate, _largest(training), host, is_whole)


def _largest(moments: list[dict[str, float]]) -> dict[str, float]:
    return max(moments, key=lambda parts: sum(parts.values()))


def _with_old_gradients(parts: dict[str, float], layout: Layout) -> dict[str, float]:
    """With those of the step before: they stay until the next backward pass."""
    return parts | {"gradients": layout.device()["gradients"]}


def _is_whole(layout: Layout) -> bool:
    """Whether a rollout gathers everything, by the rule of ``sharding.gathered``."""
    options = layout.sharding
    if (
        options is None
        or options.unshard_for_rollout == "always"
        or layout.reserved(training=False)
    ):
        return True
    if options.unshard_for_rollout == "never":
        return False
    held = 0.0 if layout.is_offloaded else sum(layout.state.values())
    free = layout.machine.memory - held
    stored = layout.counts.sum("total", frozen=False)
    return stored < free / 2
