"""Exact gradients of a loss over a large batch, in the memory of a chunk (GradCache).

A contrastive loss couples all rows of a batch, so their graphs must live together, unless (arXiv
2101.06983): pass 1 encodes chunk by chunk without graphs, the loss of all vectors gives its
gradient by each vector, pass 2 encodes again and goes on backward from those gradients. The price
is a second forward. Here the graphs of as many chunks as a budget allows are kept from pass 1 and
need none [our choice]; with all of them kept it is an ordinary step.

Dropout is replayed: a chunk's second encoding starts from the random state of its first, and the
states afterwards are those after pass 1, whatever was kept. The states of the CPU and of the
current CUDA device are known here; other devices, Python's and numpy's generators are not, and
layers that change by a forward (batch norm) see a chunk twice. ``CachedStep.drift`` shows either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

MIB = 2**20


class CachedStep(NamedTuple):
    """What a step did.

    Args:
        loss: 0-d. Detached; with ``defer_last`` its backward is the step's last one.
        embeddings: Vectors of each chunk from pass 1, detached.
        kept: Chunks whose graph was kept.
        recomputed: Chunks encoded twice.
        graph_bytes: Memory of the kept graphs as measured; 0 if nothing was measured.
        drift: 0-d, largest change of an entry between first and second encoding; 0 is exact. For
            the chunk that ``defer_last`` leaves it is included.
    """

    loss: Tensor
    embeddings: list[Tensor]
    kept: int
    recomputed: int
    graph_bytes: int
    drift: Tensor


def cached_step(
    encode: Callable[[Any], Tensor],
    chunks: Sequence[Any],
    loss_fn: Callable[[list[Tensor]], Tensor],
    backward: Callable[[Tensor], Any] = Tensor.backward,
    *,
    keep: int | None = None,
    cache_budget_mb: float | None = None,
    parameters: Iterable[Tensor] = (),
    loss_parameters: Sequence[Tensor] = (),
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    defer_last: bool = False,
) -> CachedStep:
    """Add the gradient of ``loss_fn(all vectors)`` to the parameters, a chunk at a time.

    Kept chunks go backward first and together, then each other chunk is encoded again and goes
    backward. The last of these backwards (and the forward with a graph just before it) stands
    outside ``no_sync``, all others inside: so gradients are exchanged once, by DDP's own wrapper as
    ``encode`` (``no_sync=ddp.no_sync``) as well as under Lightning's manual optimization. That
    last chunk must use every parameter, or DDP needs ``find_unused_parameters``.

    Under Lightning's automatic optimization return ``loss`` of ``defer_last=True`` from
    ``training_step``, and give a ``backward`` that divides as Lightning will:
    ``lambda x: (x / self.trainer.accumulate_grad_batches).backward()`` (with ``16-mixed`` its
    scaler's ``scale`` as well). Lightning clears the gradients *after* ``training_step`` and would
    lose these: let ``optimizer_zero_grad`` do nothing and clear them first thing in the window's
    first ``training_step``. DDP exchanges nothing inside one, so ``no_sync`` is not needed there.
    Under FSDP every encoding is a collective: give all ranks the same number of chunks and
    ``keep``, not a budget.

    Args:
        encode: Chunk -> vectors ``(n, d)``, or any shape.
        chunks: What ``encode`` takes, in order; queries and passages may be chunks of their own.
        loss_fn: Vectors of each chunk -> 0-d loss. It may gather them from other ranks.
        backward: Goes backward from a 0-d tensor. Whatever it multiplies by is applied once.
        keep: Graphs kept, from the first chunk on; None leaves it to the budget.
        cache_budget_mb: MiB for kept graphs, measured while encoding; a chunk's need is foreseen
            from those before it by the number of entries of its tensors, and one that needs more
            is recomputed after all, except the last (then the budget is exceeded by less than a
            chunk). None (with ``keep=None``) keeps none.
        parameters: Tensors not to be counted as a graph's memory: frozen ones (trainable ones are
            found by themselves).
        loss_parameters: Trainable tensors that ``loss_fn`` uses, such as a learnt temperature.
        no_sync: Makes the context in which gradients are not exchanged.
        defer_last: Leave the last backward to the caller, through ``CachedStep.loss``.

    Raises:
        ValueError: No chunks, ``keep`` and a budget at once or out of range, a loss that is no 0-d
            tensor, or one that uses trainable tensors that ``loss_parameters`` does not name.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> data = torch.randn(4, 2)
        >>> done = cached_step(layer, data.split(2), lambda z: torch.cat(z).square().sum(), keep=1)
        >>> done.kept, done.recomputed
        (1, 1)
    """
    _check(chunks, keep, cache_budget_mb)
    budget = None if cache_budget_mb is None else cache_budget_mb * MIB
    cache = _Cache(encode, chunks, keep or 0, budget, parameters, no_sync)
    cache.first_pass()
    leaves = [x.detach().requires_grad_() for x in cache.vectors]
    with torch.enable_grad():
        loss = loss_fn(leaves)
    _check_loss(loss, [*leaves, *loss_parameters])
    wanted = [*leaves, *loss_parameters]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    gradients, rest = list(found[: len(leaves)]), list(found[len(leaves) :])
    # Half-precision weights that autocast cached without a graph must not serve in pass 2. (torch
    # 2.13 caches none without gradients; this costs nothing where that is so.)
    torch.clear_autocast_cache()

    drift = loss.detach().new_zeros(())
    pending: Tensor | None = None  # what is to go backward next; one at a time has a graph
    if cache.kept:
        parts = [_dot(cache.graphs.pop(), gradients[i]) for i in reversed(range(cache.kept))]
        pending = torch.stack(parts).sum()
        del parts
    after = _random_states()
    for number in range(cache.kept, len(chunks)):
        if pending is not None:
            with no_sync():
                backward(pending)
            pending = None
        with nullcontext() if number == len(chunks) - 1 else no_sync():
            vectors = cache.again(number)
        drift = torch.maximum(drift, _gap(vectors, cache.vectors[number]).to(drift))
        pending = _dot(vectors, gradients[number])
        del vectors
    _set_random_states(after)
    assert pending is not None
    for tensor, gradient in zip(loss_parameters, rest, strict=True):
        pending = pending + _dot(tensor, gradient).to(pending.device)
    if defer_last:
        loss = pending - pending.detach() + loss.detach()
    else:
        backward(pending)
        loss = loss.detach()
    recomputed = len(chunks) - cache.kept
    return CachedStep(loss, cache.vectors, cache.kept, recomputed, cache.spent, drift)


class GraphMeter:
    """Measures the memory that a graph holds: what autograd saves while the context is open.

    Storages count once, however many views of them are saved; parameters do not count.

    Args:
        parameters: Tensors not to be counted besides the trainable leaves of the graph.

    Example:
        >>> meter, layer = GraphMeter(), torch.nn.Linear(8, 8)
        >>> with meter.watch():
        ...     y = layer(torch.zeros(4, 8)).exp()
        >>> meter.bytes_of(y)  # the input and the output, 4 x 8 floats each
        256
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._known = {_storage(x)[0] for x in parameters}
        self._saved: dict[int, int] = {}  # address of a storage -> bytes

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note every tensor that autograd saves inside."""
        self._saved = {}

        def note(tensor: Tensor) -> Tensor:
            place, size = _storage(tensor)
            self._saved[place] = size
            return tensor.detach()  # the tensor itself would hold its own graph in a cycle

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield

    def bytes_of(self, output: Tensor, inputs: Any = None) -> int:
        """Bytes that were saved by the last ``watch`` for the graph of ``output``.

        Args:
            output: Whose graph it is: its trainable leaves are not counted.
            inputs: Tensors in plain containers that live anyway, and are not counted either.
        """
        known = self._known | {_storage(x)[0] for x in _tensors(inputs)}
        known |= {_storage(leaf)[0] for leaf in _leaves(output)}
        return sum(size for place, size in self._saved.items() if place not in known)

    def hold(self) -> None:
        """Count what the last ``watch`` saw no second time: its graph stays alive."""
        self._known |= self._saved.keys()


class _Cache:
    """Pass 1 and the second encodings of ``cached_step``."""

    def __init__(
        self,
        encode: Callable[[Any], Tensor],
        chunks: Sequence[Any],
        keep: int,
        budget: float | None,
        parameters: Iterable[Tensor],
        no_sync: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.encode, self.chunks, self.no_sync = encode, chunks, no_sync
        self.keep, self.budget = keep, budget
        self.meter = None if budget is None else GraphMeter(parameters)
        self.vectors: list[Tensor] = []
        self.graphs: list[Tensor] = []  # vectors with their graphs, of the first chunks
        self.kept = 0
        self.spent = 0
        self._states: list[_RandomStates] = []
        self._bytes_per_entry = 0.0

    def first_pass(self) -> None:
        """Encode every chunk once; from the first that does not fit on, without graphs."""
        is_open = True
        for number, chunk in enumerate(self.chunks):
            last = number == len(self.chunks) - 1
            self._states.append(_random_states())
            is_open = is_open and self._fits(number)
            if is_open:
                with nullcontext() if last else self.no_sync():
                    vectors = self._with_graph(chunk)
                is_open = self._is_kept(vectors, chunk, last)
            else:
                with torch.no_grad():
                    vectors = self.encode(chunk)
            if is_open:
                self.graphs.append(vectors)
                self.kept += 1
            self.vectors.append(vectors.detach())
            del vectors

    def again(self, number: int) -> Tensor:
        """Encode a chunk with a graph, from the random states of its first encoding."""
        _set_random_states(self._states[number])
        with torch.enable_grad():
            return self.encode(self.chunks[number])

    def _fits(self, number: int) -> bool:
        """Whether the next chunk's graph is foreseen to fit."""
        if self.budget is None:
            return number < self.keep
        foreseen = self._bytes_per_entry * _entries(self.chunks[number])
        return self.spent + foreseen <= self.budget and self.budget > 0

    def _with_graph(self, chunk: Any) -> Tensor:
        with torch.enable_grad(), self.meter.watch() if self.meter else nullcontext():
            return self.encode(chunk)

    def _is_kept(self, vectors: Tensor, chunk: Any, last: bool) -> bool:
        """Whether the graph is kept now that its size is known."""
        if self.meter is None or self.budget is None:
            return True
        size = self.meter.bytes_of(vectors, chunk)
        self._bytes_per_entry = max(self._bytes_per_entry, size / max(_entries(chunk), 1))
        if self.spent + size > self.budget and not last:
            return False
        self.spent += size
        self.meter.hold()
        return True


def _check(chunks: Sequence[Any], keep: int | None, budget: float | None) -> None:
    """Refuse options that contradict each other."""
    if not len(chunks):
        raise ValueError("there is no chunk to encode")
    if keep is not None and budget is not None:
        raise ValueError(f"keep={keep} and cache_budget_mb={budget} exclude each other")
    if keep is not None and keep < 0:
        raise ValueError(f"keep={keep} must be at least 0")
    if budget is not None and not budget >= 0:
        raise ValueError(f"cache_budget_mb={budget} must be at least 0")


def _check_loss(loss: Tensor, known: Sequence[Tensor]) -> None:
    """Refuse a loss whose gradient would be lost in part."""
    if loss.dim():
        raise ValueError(f"loss_fn must give a 0-d tensor, got shape {tuple(loss.shape)}")
    places = {id(x) for x in known}
    if lost := [x for x in _leaves(loss) if id(x) not in places]:
        raise ValueError(
            f"loss_fn uses {len(lost)} trainable tensor(s) besides the vectors, the first of shape "
            f"{tuple(lost[0].shape)}: name them in loss_parameters"
        )


def _leaves(output: Tensor) -> list[Tensor]:
    """Leaves with a gradient in the graph of ``output``."""
    found, seen, stack = [], set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only nodes that accumulate into a leaf
        if isinstance(variable, Tensor):
            found.append(variable)
        stack.extend(following for following, _ in node.next_functions)
    return found


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _entries(chunk: Any) -> int:
    """Entries of a chunk's tensors; 1 for a chunk without any."""
    return sum(x.numel() for x in _tensors(chunk)) or 1


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of what holds a tensor's entries (the local part of a sharded one)."""
    storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _dot(vectors: Tensor, gradient: Tensor) -> Tensor:
    """Scalar whose gradient by ``vectors`` is ``gradient``."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    return (vectors.to(wide) * gradient.to(wide)).sum()


def _gap(one: Tensor, other: Tensor) -> Tensor:
    """Largest absolute difference; 0 for empty tensors."""
    gaps = (one.detach() - other).abs()
    return gaps.max() if gaps.numel() else gaps.sum()


_RandomStates: TypeAlias = "tuple[Tensor, Tensor | None]"


def _random_states() -> _RandomStates:
    """States of the CPU's generator and of the current CUDA device's."""
    uses_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if uses_cuda else None


def _set_random_states(states: _RandomStates) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
