"""Small heads, the ways to run one, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops import TopK, TopP, linear_logprob_entropy, load_kernels
from tests.kernels import oracle

LEAVES = ("hidden", "weight", "bias", "side_hidden", "side_weight")
VALUES = ("logprob", "entropy", "region_entropy")
REGIONS = (None, TopK(8), TopP(0.9))


@dataclass
class Case:
    """Inputs of one head.

    Args:
        hidden: ``(..., H)``.
        weight: ``(V, H)``.
        targets: ``(...)``.
        bias: ``(V,)`` or None.
        side_hidden: ``(..., r)`` or None.
        side_weight: ``(V, r)`` or None.
        options: temperature, region, ignore_index and vocab_limit, where not the default.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    side_hidden: Tensor | None = None
    side_weight: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def side(self) -> tuple[Tensor, Tensor] | None:
        """As the public functions take it."""
        if self.side_hidden is None or self.side_weight is None:
            return None
        return self.side_hidden, self.side_weight

    def leaves(self) -> dict[str, Tensor]:
        """The floating-point inputs that there are, by name."""
        found = {name: getattr(self, name) for name in LEAVES}
        return {name: value for name, value in found.items() if value is not None}

    def fresh(self, dtype: torch.dtype | None = None) -> Case:
        """The same inputs as new leaves that want gradients, in another dtype if one is given."""
        copies = {
            name: value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
            for name, value in self.leaves().items()
        }
        return replace(self, **copies)

    def given(self, **options: Any) -> Case:
        """The same inputs with other options."""
        return replace(self, options={**self.options, **options})


def make_case(
    n: int,
    v: int,
    h: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    scale: float = 1.0,
    bias: bool = False,
    rank: int = 0,
    shape: tuple[int, ...] | None = None,
    **options: Any,
) -> Case:
    """A random head whose logits have about the standard deviation ``2 * scale``.

    Args:
        n: Rows.
        v: Vocabulary.
        h: Width.
        dtype: Of the inputs.
        seed: Of the random numbers.
        scale: Of the logits.
        bias: Whether there is one.
        rank: Of the side term; 0 is none.
        shape: Leading dimensions in place of ``(n,)``.
        options: See ``Case``.
    """
    generator = torch.Generator().manual_seed(seed)
    lead = (n,) if shape is None else shape

    def normal(*size: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * factor).to(dtype)

    limit = options.get("vocab_limit") or v
    return Case(
        hidden=normal(*lead, h),
        weight=normal(v, h, factor=2 * scale / h**0.5),
        targets=torch.randint(limit, lead, generator=generator),
        bias=normal(v) if bias else None,
        side_hidden=normal(*lead, rank) if rank else None,
        side_weight=normal(v, rank, factor=0.3) if rank else None,
        options=options,
    )


def fused(case: Case, backend: str = "torch", **more: Any) -> dict[str, Tensor]:
    """Fields of ``linear_logprob_entropy``, without those that are None."""
    out = linear_logprob_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"bias": case.bias, "side": case.side, **case.options, "backend": backend, **more},
    )
    return {name: value for name, value in out._asdict().items() if value is not None}


def full_logits(case: Case) -> Tensor:
    """Logits in the inputs' dtype, as a plain head gives them."""
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    if case.side_hidden is not None and case.side_weight is not None:
        logits = logits + case.side_hidden @ case.side_weight.T
    return logits


def exact(case: Case) -> dict[str, Tensor]:
    """The oracle; give it a float64 case."""
    return oracle.quantities(full_logits(case), case.targets, **case.options)


def eager(case: Case) -> dict[str, Tensor]:
    """What one would write without a fused head: logits in the inputs' dtype, float32 softmax."""
    logits = full_logits(case)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return oracle.quantities(wide, case.targets, **case.options)


def upstreams(case: Case, names: tuple[str, ...] = VALUES, seed: int = 1) -> dict[str, Tensor]:
    """Random gradients of the outputs; about one of five is zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        if name == "region_entropy" and case.options.get("region") is None:
            continue
        value = torch.randn(case.targets.shape, generator=generator, dtype=torch.float64)
        is_zero = torch.rand(case.targets.shape, generator=generator) < 0.2
        found[name] = value.masked_fill(is_zero, 0.0)
    return found


def run(
    compute: Callable[[Case], Mapping[str, Tensor]], case: Case, grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values, and the gradients of the leaves as ``d hidden`` and so on, all detached.

    Args:
        compute: ``fused``, ``exact``, ``eager`` or alike.
        case: Its tensors are copied to new leaves.
        grads: Upstream gradients by the names of the outputs.
    """
    case = case.fresh()
    outputs = compute(case)
    leaves = case.leaves()
    parts = [(outputs[name] * grad.to(outputs[name].dtype)).sum() for name, grad in grads.items()]
    found = {name: value.detach() for name, value in outputs.items()}
    if grads:
        given = torch.autograd.grad(sum(parts), list(leaves.values()), materialize_grads=True)
        found |= {f"d {name}": value for name, value in zip(leaves, given, strict=True)}
    return found


def truth(case: Case, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``run`` of the oracle on the same numbers in float64."""
    return run(exact, case.fresh(torch.float64), grads)


def error(found: Tensor, wanted: Tensor, *, relative: bool = False) -> float:
    """Largest difference, over the largest wanted value if that is above 1 or ``relative``."""
    if wanted.numel() == 0:
        assert found.shape == wanted.shape
        return 0.0
    size = wanted.abs().max().double().item()
    worst = (found.double() - wanted.double()).abs().max().item()
    return worst / size if size > 1.0 or (relative and size > 0.0) else worst


def errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """``error`` of every entry of ``found``; gradients relative to their largest value."""
    return {
        name: error(value, wanted[name], relative=name.startswith("d "))
        for name, value in found.items()
    }


def assert_close(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float
) -> None:
    """Every entry of ``found`` is within ``tolerance``; NaN is not."""
    for name, worst in errors(found, wanted).items():
        assert found[name].shape == wanted[name].shape, name
        assert worst <= tolerance, f"{name} is off by {worst:.2e}, allowed is {tolerance:.1e}"


def from_logits(logits: Tensor, targets: Tensor | None = None, **options: Any) -> Case:
    """A head that gives exactly these logits ``(N, V)``: its weight is the identity."""
    n, v = logits.shape
    targets = torch.zeros(n, dtype=torch.int64) if targets is None else targets
    return Case(logits, torch.eye(v, dtype=logits.dtype), targets, options=options)


def op_arguments(case: Case, **more: Any) -> tuple[Any, ...]:
    """Arguments of the custom op ``litpost::linear_head`` for a head of two dimensions."""
    options = {"temperature": 1.0, "ignore_index": -100, "region": None} | case.options | more
    return (
        *(case.hidden, case.weight, case.targets, case.bias, case.side_hidden, case.side_weight),
        *(options["temperature"], options["ignore_index"]),
        options.get("vocab_limit") or case.weight.shape[0],
        load_kernels("regions").pack_region(options["region"]),
        options.get("entropy_grad", True),
        options.get("with_mean", False),
        options.get("with_argmax", False),
        options.get("workspace", 2**20),
        *("torch", "", 0),
    )


def op_outputs(case: Case, **more: Any) -> dict[str, Tensor]:
    """All outputs of the custom op by name, those that only its backward pass reads included."""
    outputs = load_kernels("ops").linear_head(*op_arguments(case, **more))
    return dict(zip(load_kernels("fields").FIELDS, outputs, strict=True))
