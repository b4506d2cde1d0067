"""What ``bench.py`` measures: this folder's operation and others that do the same work.

Other packages are looked for when they are first wanted; the reason why one cannot run is told.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .api import linear_logprob_entropy
from .bench_inputs import Inputs
from .regions import Region, TopK, TopP

#: Columns that TRL's function takes at once where it does not say.
TRL_CHUNK = 8192


class Unavailable(Exception):
    """A provider cannot run here; the text says why."""


class Outputs(NamedTuple):
    """What a provider computed.

    Args:
        logprob: ``(N,)``, or None where only a sum exists.
        entropy: ``(N,)`` or None.
        region_entropy: ``(N,)`` or None.
        total: Sum of ``-logprob``, where only a sum exists.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    region_entropy: Tensor | None = None
    total: Tensor | None = None


Run = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Provider:
    """One way to compute the head.

    Args:
        name: For ``--providers``.
        computes: What the numbers of its row are for.
        build: Finds what it needs and returns the function that is timed.
        build_values: As ``build`` for log-probs by row, where the timed function gives a sum.
        is_ours: Whether it is this folder's operation.
        needs_cuda: Whether it runs on CUDA only.
        has_entropy_gradient: Whether gradients flow through its entropy.
        is_sum: Whether it gives ``-sum(logprob)``: then every row has the same upstream gradient.
        region: Trust region, or None.
        trains_weight: Whether the weight gets a gradient.
        is_lora: Whether a low-rank side term is trained instead.
    """

    name: str
    computes: str
    build: Callable[[], Run]
    build_values: Callable[[], Run] | None = None
    is_ours: bool = False
    needs_cuda: bool = False
    has_entropy_gradient: bool = False
    is_sum: bool = False
    region: Region | None = None
    trains_weight: bool = True
    is_lora: bool = False

    @property
    def num_products(self) -> int:
        """Products of N x H x V that the floor counts, 2 FLOP each, recomputation included."""
        return 4 if self.trains_weight else 3


def find(module: str, attribute: str) -> Any:
    """Something of another package.

    Raises:
        Unavailable: The package is missing, cannot be imported or has no such name.
    """
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # packages for CUDA raise all kinds of errors elsewhere
        raise Unavailable(f"{module} cannot be imported: {first_line(error)}") from error
    if not hasattr(found, attribute):
        version = getattr(importlib.import_module(package), "__version__", "of unknown version")
        raise Unavailable(f"{package} {version} has no {module}.{attribute}")
    return getattr(found, attribute)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def apply_by_name(function: Any, **values: Any) -> Callable[..., Any]:
    """``function.apply``, which takes no keywords, by the names that its ``forward`` has.

    Names change their order between releases of a package. Unknown ones keep their defaults, or
    get None.

    Args:
        function: A ``torch.autograd.Function``.
        **values: By name, where the function has it.
    """
    names = list(inspect.signature(function.forward).parameters.values())[1:]  # without ctx

    def call(**tensors: Tensor) -> Any:
        given = values | tensors
        default = [None if p.default is p.empty else p.default for p in names]
        return function.apply(*(given.get(p.name, d) for p, d in zip(names, default, strict=True)))

    return call


# ---------------------------------------------------------------------------------- plain PyTorch


def _plain(inputs: Inputs) -> Outputs:
    logprobs = functional.linear(inputs.hidden, inputs.weight).float().log_softmax(-1)
    chosen = logprobs.gather(-1, inputs.targets[:, None])[:, 0]
    return Outputs(chosen, -(logprobs.exp() * logprobs).sum(-1))


def _eager() -> Run:
    return _plain


def _eager_nll() -> Run:
    def run(inputs: Inputs) -> Outputs:
        logits = functional.linear(inputs.hidden, inputs.weight).float()
        return Outputs(-functional.cross_entropy(logits, inputs.targets, reduction="none"))

    return run


def _compile() -> Run:
    torch._dynamo.reset()  # one graph for each size, and no limit on their number
    compiled = torch.compile(
        lambda hidden, weight, targets: _plain(Inputs(hidden, weight, targets))[:2], dynamic=False
    )

    def run(inputs: Inputs) -> Outputs:
        return Outputs(*compiled(inputs.hidden, inputs.weight, inputs.targets))

    return run


def _torch_chunked(reduction: str) -> Run:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy with options")
    options = torch.nn.LinearCrossEntropyOptions()
    operation = functional.linear_cross_entropy

    def run(inputs: Inputs) -> Outputs:
        given = (inputs.hidden, inputs.weight, inputs.targets)
        found = operation(*given, reduction=reduction, options=options)
        return Outputs(total=found) if reduction == "sum" else Outputs(-found)

    return run


# --------------------------------------------------------------------------------- other packages


def _liger(reduction: str) -> Run:
    function = find(
        "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
    )
    call = apply_by_name(function, reduction=reduction, accum_dtype=torch.float32)

    def run(inputs: Inputs) -> Outputs:
        found = call(_input=inputs.hidden, weight=inputs.weight, target=inputs.targets)
        found = found[0] if isinstance(found, tuple) else found
        return Outputs(total=found) if reduction == "sum" else Outputs(-found)

    return run


def _liger_scaled() -> Run:
    function = find("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")

    def run(inputs: Inputs) -> Outputs:
        given = (inputs.hidden, inputs.weight, inputs.targets)
        nll, entropy = function.apply(*given, 1.0, -100, 1, True)
        return Outputs(-nll, entropy)

    return run


def _cce(kind: str) -> Run:
    operation = find("cut_cross_entropy", "linear_cross_entropy")

    def run(inputs: Inputs) -> Outputs:
        given = (inputs.hidden, inputs.weight, inputs.targets)
        return Outputs(-operation(*given, reduction="none", impl=kind))

    return run


def _verl() -> Run:
    function = find("verl.utils.kernel.linear_cross_entropy", "LinearCrossEntropy")
    call = apply_by_name(function, temperature=1.0, reduction="none")

    def run(inputs: Inputs) -> Outputs:
        found = call(hidden=inputs.hidden, weight=inputs.weight, labels=inputs.targets)
        return Outputs(found[0], found[1])

    return run


def _trl() -> Run:
    module, name = "trl.trainer.utils", "_ChunkedLogProbFunction"
    try:
        function = find(module, name)
    except Unavailable:
        module = "trl.experimental.async_grpo.chunk_lm_head"
        function = find(module, name)
    chunk = getattr(importlib.import_module(module), "_CHUNKED_LOGPROB_CHUNK_SIZE", TRL_CHUNK)
    call = apply_by_name(
        function, temperature=1.0, chunk_size=chunk, logit_scale=1.0, outputs=("entropy",)
    )

    def run(inputs: Inputs) -> Outputs:
        hidden = inputs.hidden
        found = call(
            last_hidden=hidden, hidden=hidden, weight=inputs.weight, targets=inputs.targets
        )
        return Outputs(found[0], found[1])

    return run


# ------------------------------------------------------------------------------------------- ours


def _ours(*, with_entropy: bool = True, region: Region | None = None, lora: bool = False) -> Run:
    def run(inputs: Inputs) -> Outputs:
        side = inputs.side() if lora else None
        found = linear_logprob_entropy(
            *(inputs.hidden, inputs.weight, inputs.targets),
            region=region,
            side=side,
            with_entropy=with_entropy,
        )
        return Outputs(found.logprob, found.entropy, found.region_entropy)

    return run


def _our_provider(name: str, computes: str, **options: Any) -> Provider:
    build = {key: options.pop(key) for key in ("with_entropy", "lora") if key in options}
    region = options.get("region")
    return Provider(
        name,
        computes,
        lambda: _ours(region=region, **build),
        is_ours=True,
        has_entropy_gradient=build.get("with_entropy", True),
        is_lora=build.get("lora", False),
        **options,
    )


_BOTH = "log-prob, entropy"
_SUM = "sum of log-probs"
PROVIDERS = (
    Provider("eager", _BOTH, _eager, has_entropy_gradient=True),
    Provider("eager_nll", "log-prob", _eager_nll),
    Provider("compile", _BOTH, _compile, has_entropy_gradient=True),
    Provider(
        *("torch_chunked", _SUM, lambda: _torch_chunked("sum")),
        build_values=lambda: _torch_chunked("none"),
        is_sum=True,
    ),
    Provider(
        *("liger", f"{_SUM}, float32 sums", lambda: _liger("sum")),
        build_values=lambda: _liger("none"),
        is_sum=True,
        needs_cuda=True,
    ),
    Provider("liger_scaled", _BOTH, _liger_scaled, has_entropy_gradient=True),
    Provider("cce", "log-prob, small gradients skipped", lambda: _cce("cce"), needs_cuda=True),
    Provider("cce_exact", "log-prob", lambda: _cce("cce_exact"), needs_cuda=True),
    Provider("verl", _BOTH, _verl, needs_cuda=True, has_entropy_gradient=True),
    Provider("trl", _BOTH, _trl, has_entropy_gradient=True),  # old releases drop that gradient
    _our_provider("ours", _BOTH),
    _our_provider("ours_nll", "log-prob", with_entropy=False),
    _our_provider("ours_topk", f"{_BOTH}, TRE-K 2", region=TopK(2)),
    _our_provider("ours_topp", f"{_BOTH}, TRE-P 0.99", region=TopP(0.99)),
    _our_provider("ours_frozen", f"{_BOTH}, weight frozen", trains_weight=False),
    _our_provider("ours_lora", f"{_BOTH}, LoRA r=16", lora=True, trains_weight=False),
)
