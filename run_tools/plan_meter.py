"""A model without memory, and a meter of the memory that it would take.

Weights become fake tensors (shape, dtype, no data); what a step makes of them is fake too, while
token ids and masks stay real, so that code that looks at them runs as ever. The meter sees every
operation, notes when each storage comes and goes, and counts floating-point operations. What it
cannot see is inside the fused head, a single operation: ``head_bytes`` asks the kernels instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_modules.ops import load_kernels
from lightning_modules.options import KernelOptions

#: Kinds of memory that are looked for inside a step.
KINDS = ("activations", "temporaries", "head", "gradients", "kv_cache")


@dataclass(eq=False)
class Block:
    """One storage.

    Args:
        size: Bytes.
        kind: One of ``KINDS``.
    """

    size: int
    kind: str = "temporaries"


@dataclass
class Peak:
    """Most memory at once in a stretch of the log, by kind.

    Args:
        parts: Kind -> bytes at that moment.
    """

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


class Meter(TorchDispatchMode):
    """Logs storages that operations make and drop, and counts FLOPs and operations.

    Args:
        kernel: Options of the fused head.
        is_cuda: Whether the head would run on a GPU.

    Example:
        >>> with Meter() as meter:
        ...     kept = torch.empty(1024)
        >>> meter.peak().total
        4096.0
    """

    def __init__(self, kernel: KernelOptions | None = None, is_cuda: bool = False) -> None:
        super().__init__()
        self.kernel, self.is_cuda = kernel or KernelOptions(), is_cuda
        self.events: list[tuple[Block, int]] = []  # (block, +1 made, -1 dropped, 0 both at once)
        self.flops = 0.0
        self.num_ops = 0
        self._blocks: dict[int, Block] = {}
        self._known: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these: weights, batches, gradients that are there already."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def mark(self) -> int:
        """A place in the log."""
        return len(self.events)

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Say what kind of memory these tensors take."""
        for tensor in tensors:
            block = None if tensor is None else self._blocks.get(tensor.untyped_storage()._cdata)
            if block is not None:
                block.kind = kind

    def label_living(self, kind: str) -> None:
        """Say it of all that is there now and has no other label."""
        for block in self._blocks.values():
            if block.kind == "temporaries":
                block.kind = kind

    def peak(self, start: int = 0, stop: int | None = None, without: str = "") -> Peak:
        """The largest sum of living storages between two marks.

        Args:
            start: First mark.
            stop: Second mark; None for the end of the log.
            without: A kind that is not counted.
        """
        living = dict.fromkeys(KINDS, 0.0)
        best, most = Peak(), -1.0
        stop = len(self.events) if stop is None else stop
        for number, (block, change) in enumerate(self.events[:stop]):
            if block.kind == without:
                continue
            if change >= 0:
                living[block.kind] += block.size
            if number >= start and (total := sum(living.values())) > most:
                best, most = Peak(dict(living)), total
            if change <= 0:
                living[block.kind] -= block.size
        return best

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        result = _without_data(func, args)
        if result is None:
            result = func(*args, **kwargs)
        self.num_ops += not func.is_view
        self._count(func, args, kwargs, result)
        packet = str(func).rsplit(".", 1)[0]
        is_head = packet.startswith("litpost.linear_head")
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, "head" if is_head else "temporaries")
        if is_head:
            needs = args[8] if packet.endswith("_backward") else None
            size = head_bytes(args[0], args[1], self.kernel, self.is_cuda, needs)
            self.events.append((Block(int(size), "head"), 0))
        return result

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks or key in self._known:
            return
        block = Block(storage.nbytes(), kind)
        self._blocks[key] = block
        self.events.append((block, 1))
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self.events.append((block, -1))

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        name = str(packet)
        if "scaled_dot_product_flash_attention_for_cpu" in name:
            is_backward = name.endswith("_backward")
            query, key = (args[1], args[2]) if is_backward else (args[0], args[1])
            is_causal = args[7] if is_backward else (args[4] if len(args) > 4 else False)
            size = 4.0 * query.numel() * key.shape[-2] * (0.5 if is_causal else 1.0)
            self.flops += size * (2.5 if is_backward else 1.0)
        elif name.startswith("litpost.linear_head"):
            product = 2.0 * args[0].shape[0] * args[1].numel()
            needs = args[8] if name.endswith("_backward") else []
            self.flops += product * (1 + sum(needs[:2]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)


def _without_data(func: Any, args: tuple[Any, ...]) -> Any:
    """A stand-in where an operation asks for values that a fake tensor does not have."""
    fakes = [value for value in tree_leaves(args) if isinstance(value, FakeTensor)]
    if not fakes:
        return None
    packet = func._overloadpacket
    if packet in (torch.ops.aten._local_scalar_dense, torch.ops.aten.item):
        return True if fakes[0].dtype == torch.bool else 1
    if packet in (torch.ops.aten.equal, torch.ops.aten.is_nonzero):
        return True
    if packet is torch.ops.aten.nonzero:  # as if every element were one
        grid = [torch.arange(size) for size in fakes[0].shape]
        return torch.cartesian_prod(*grid).reshape(-1, len(grid))
    return None


def head_bytes(
    hidden: Tensor,
    weight: Tensor,
    kernel: KernelOptions,
    is_cuda: bool,
    needs: list[bool] | None = None,
) -> float:
    """Memory inside the fused head that is gone when it returns (bytes).

    Sizes come from ``kernels/backward.py`` and ``kernels/torch_backend.py`` themselves; what is
    multiplied with them is read off their code [derived].

    Args:
        hidden: ``(N, H)``.
        weight: ``(V, H)``.
        kernel: Options of the head.
        is_cuda: Whether it would run on a GPU.
        needs: None for the forward; for the backward whether hidden and weight want gradients.
    """
    rows, width = hidden.shape[0], hidden.shape[1]
    if rows == 0:
        return 0.0
    dispatch, backward = load_kernels("dispatch"), load_kernels("backward")
    torch_backend = load_kernels("torch_backend")
    like: Any = SimpleNamespace(
        is_cuda=is_cuda, dtype=hidden.dtype, shape=hidden.shape, element_size=hidden.element_size
    )
    problem: Any = SimpleNamespace(
        hidden=like,
        num_rows=rows,
        vocab_limit=weight.shape[0],
        workspace=dispatch.workspace_bytes(kernel.workspace_mb, like),
        dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
    )
    exact, own = problem.dtype.itemsize, hidden.element_size()
    is_triton = is_cuda and kernel.backend in ("auto", "triton") and width % 8 == 0
    is_converted = exact != own  # float32 sums beside bfloat16 inputs
    if needs is None:
        if is_triton:
            return 16.0 * rows  # statistics of the rows
        block = torch_backend.block_rows(
            problem, problem.vocab_limit, problem.workspace // (exact * problem.vocab_limit)
        )
        logits = float(block * problem.vocab_limit * exact)
        inside = min(logits, _cached(problem.vocab_limit, block, exact, is_cuda))
        return logits + 2 * inside  # exp and its product with the logits
    working = own if is_cuda else exact
    columns, block = backward.slices(problem, working)
    space = float(block * columns * working)
    inside = 0.0 if is_triton else min(space, _cached(columns, block, working, is_cuda))
    size = space + inside
    if needs[0] and is_converted:  # the sum over slices of the vocabulary, in float32
        size += rows * width * exact
        if not is_cuda:
            size += columns * width * exact + block * columns * exact
    if needs[1] and (is_converted or block < rows):
        size += columns * width * exact
    return size


def _cached(columns: int, rows: int, size: int, is_cuda: bool) -> float:
    """Bytes of a block that elementwise work copies."""
    block = SimpleNamespace(is_cuda=is_cuda, shape=(rows, columns), element_size=lambda: size)
    return float(load_kernels("torch_backend").cache_rows(columns, block) * columns * size)


def take_data_away(module: nn.Module, dtype: torch.dtype | None = None) -> FakeTensorMode:
    """Replace all weights and buffers of a module by fake ones on the CPU, in place.

    Args:
        module: Its tensors may be on any device, ``meta`` included; tied ones stay tied.
        dtype: Of floating-point weights; None keeps their own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def fake(tensor: Tensor, kind: torch.dtype) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=kind, device="cpu")

    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                is_float = parameter.is_floating_point()
                kind = dtype if dtype is not None and is_float else parameter.dtype
                new = nn.Parameter(fake(parameter, kind), requires_grad=parameter.requires_grad)
                made[id(parameter)] = (new, parameter)  # the old one keeps its id meanwhile
            part._parameters[name] = made[id(parameter)][0]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = fake(buffer, buffer.dtype)
    return mode
