"""The ops inside PyTorch: schemas, ``torch.compile``, autocast, frozen inputs (card 11.9)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.ops import (
    TopK,
    TopP,
    linear_cross_entropy,
    linear_logprob_entropy,
    load_kernels,
    logprob_entropy_from_logits,
)
from tests.kernels.cases import (
    REGIONS,
    Case,
    assert_close,
    fused,
    make_case,
    op_arguments,
    run,
    truth,
    upstreams,
)

# ------------------------------------------------------------------------------------------ schemas

OPTIONS = [
    {},
    {"region": TopK(3), "bias": True},
    {"region": TopK(1), "rank": 2, "temperature": 0.5},
    {"region": TopP(0.8), "bias": True, "rank": 2, "vocab_limit": 15},
    {"region": TopP(0.8), "dtype": torch.bfloat16},
    {"dtype": torch.float64},
]
#: Options and ignored rows: none, some, and all with every kind of input there is.
CASES = [*((options, rows) for options in OPTIONS for rows in ([], [0, 4])), (OPTIONS[3], range(6))]


def dynamic_case(options, ignored):
    case = make_case(6, 17, 8, **options).fresh()
    case.targets[list(ignored)] = -100
    return case


NEEDS = ([True] * 5, [True, False, True, False, True], [False, True, False, False, False])


@pytest.mark.parametrize(("options", "ignored"), CASES)
def test_opcheck_of_the_head(options, ignored):
    case = dynamic_case(options, ignored)
    arguments = op_arguments(
        case, with_mean=bool(ignored), with_argmax=len(ignored) == 2, entropy_grad=not ignored
    )
    torch.library.opcheck(torch.ops.litpost.linear_head.default, arguments)


@pytest.mark.parametrize(("options", "ignored"), CASES)
def test_opcheck_of_its_backward(options, ignored):
    """Gradients have the layout of their inputs, so transposed ones are tried too."""
    case = dynamic_case(options, ignored)
    if len(ignored) != 6:
        case.hidden = case.hidden.detach().T.contiguous().T
        case.weight = case.weight.detach().T.contiguous().T
    with torch.no_grad():
        arguments = op_arguments(case)
        outputs = load_kernels("ops").linear_head(*arguments)
        grads = [torch.randn_like(value) for value in outputs[:5]]
        inputs = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in arguments[:6])
        needs = NEEDS[(len(ignored) + len(options)) % 3]
        torch.library.opcheck(
            torch.ops.litpost.linear_head_backward.default,
            (*inputs, outputs, grads, needs, *arguments[6:12], *arguments[13:]),
        )


@pytest.mark.parametrize(
    ("ignored", "dtype", "region"),
    [
        ([], torch.bfloat16, TopK(3)),
        ([], torch.float64, None),
        ([0, 4], torch.float32, TopP(0.8)),
        ([0, 4], torch.bfloat16, None),
        (list(range(6)), torch.float32, TopK(3)),
    ],
)
def test_opcheck_of_existing_logits(ignored, dtype, region):
    logits = torch.randn(6, 17).to(dtype).requires_grad_()
    targets = torch.arange(6)
    targets[ignored] = -100
    options = (0.7, -100, load_kernels("regions").pack_region(region), True)
    torch.library.opcheck(torch.ops.litpost.logits_head.default, (logits, targets, *options))
    with torch.no_grad():
        outputs = load_kernels("logits_ops").logits_head(logits, targets, *options)
        grads = [torch.randn_like(value) for value in outputs[:5]]
        torch.library.opcheck(
            torch.ops.litpost.logits_head_backward.default,
            (logits.detach(), targets, outputs, grads, *options),
        )


# ------------------------------------------------------------------------------------ torch.compile


def everything(case):
    """One step through all three functions."""
    out = linear_logprob_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"bias": case.bias, "side": case.side, "region": TopP(0.9), "temperature": 0.8},
    )
    loss, stats = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"label_smoothing": 0.1, "z_loss": 0.01, "return_stats": True},
        token_weights=case.hidden[:, 0].detach().abs(),
    )
    existing = logprob_entropy_from_logits(case.hidden @ case.weight.T, case.targets)
    total = (out.logprob + out.entropy * 2 + out.region_entropy).sum() + loss
    return total + existing.entropy.sum(), stats.nll


def gradients(function, case):
    case = case.fresh()
    total, nll = function(case)
    total.backward()
    return [total.detach(), nll, *(leaf.grad for leaf in case.leaves().values())]


@pytest.fixture
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend, counter=None):
    """``everything`` as a compiled function of tensors; ``counter`` counts graphs."""

    def flat(hidden, weight, targets, bias, side_hidden, side_weight):
        return everything(Case(hidden, weight, targets, bias, side_hidden, side_weight))

    function = torch.compile(flat, fullgraph=True, backend=counter or backend)
    return lambda case: function(
        *(case.hidden, case.weight, case.targets, case.bias, case.side_hidden, case.side_weight)
    )


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_equals_eager(clean_dynamo, backend):
    """Forward and backward in one graph each."""
    case = make_case(9, 131, 24, bias=True, rank=3)
    case.targets[[1, 7]] = -100
    found, wanted = gradients(compiled(backend), case), gradients(everything, case)
    for own, plain in zip(found, wanted, strict=True):
        assert torch.allclose(own, plain, rtol=1e-5, atol=1e-6)


def test_other_numbers_of_rows_do_not_compile_again(clean_dynamo):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(None, counter)
    first = make_case(9, 131, 24, bias=True, rank=3)
    for name in ("hidden", "targets", "side_hidden"):
        torch._dynamo.maybe_mark_dynamic(getattr(first, name), 0)
    for n in (9, 14, 31, 50):
        case = make_case(n, 131, 24, bias=True, rank=3, seed=n)
        for name in ("hidden", "targets", "side_hidden"):
            torch._dynamo.maybe_mark_dynamic(getattr(case, name), 0)
        case.targets[:3] = -100
        total, nll = function(case)
        wanted, wanted_nll = everything(case)
        assert torch.allclose(total, wanted, rtol=1e-5)
        assert torch.allclose(nll, wanted_nll, atol=1e-6)
    assert counter.frame_count == 1


# ----------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast(backend, dtype, mixed):
    """As if the inputs had been cast, and gradients come in the inputs' own dtypes."""
    case = make_case(9, 131, 24, rank=3, bias=True, region=TopK(4))
    low = make_case(9, 131, 24, dtype, rank=3, bias=True, region=TopK(4))
    if mixed:
        case.hidden, case.side_hidden = low.hidden, low.side_hidden
    low.bias = case.bias
    grads = upstreams(case)

    def under_autocast(case):
        with torch.autocast("cpu", dtype=dtype):
            return fused(case, backend)

    found = run(under_autocast, case, grads)
    assert found["logprob"].dtype == torch.float32
    for name, leaf in case.leaves().items():
        assert found[f"d {name}"].dtype == leaf.dtype, name
    if backend == "torch":
        wanted = run(fused, low, grads)
        for name in ("logprob", "entropy", "region_entropy", "d hidden", "d weight", "d bias"):
            assert torch.equal(found[name].float(), wanted[name].float()), name
    rough = {name: value for name, value in found.items() if name != "region_size"}
    assert_close(rough, truth(case, grads), 0.15 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_off_inside_or_backward_inside(backend):
    case = make_case(9, 131, 24, region=TopP(0.9))
    grads = upstreams(case)
    plain = run(partial(fused, backend=backend), case, grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            off = run(partial(fused, backend=backend), case, grads)
        inside = run(partial(fused, backend=backend), case, grads)
    assert all(torch.equal(off[name], plain[name]) for name in plain)
    assert not torch.equal(inside["logprob"], plain["logprob"])
    assert (inside["d weight"] - plain["d weight"]).abs().max() < 0.1


# ---------------------------------------------------------------------------------- frozen inputs


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "side_hidden", "side_weight"])
def test_one_gradient_alone(region, wanted):
    """The others are None, and this one is what it is with all of them."""
    case = make_case(9, 131, 24, bias=True, rank=3, region=region)
    grads = upstreams(case)
    together = run(fused, case, grads)
    own = case.fresh()
    for name, leaf in own.leaves().items():
        leaf.requires_grad_(name == wanted)
    out = fused(own)
    sum((out[name] * grad).sum() for name, grad in grads.items()).backward()
    for name, leaf in own.leaves().items():
        if name == wanted:
            assert torch.equal(leaf.grad, together[f"d {name}"])
        else:
            assert leaf.grad is None


class Products(TorchDispatchMode):
    """Multiplications of all matrix products, in place ones included."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        if name in ("aten.mm", "aten.addmm_", "aten.addmm"):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert not {"matmul", "bmm", "mm"} & set(name.split("."))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "products"), [((), 3), (("weight",), 2), (("hidden",), 2), (("hidden", "weight"), 1)]
)
@pytest.mark.parametrize("slices", [(300, 64), (64, 16)])
def test_frozen_inputs_skip_their_product(monkeypatch, slices, frozen, products):
    """One product recomputes the logits, one more is for each gradient; NHV operations each."""
    monkeypatch.setattr(load_kernels("backward"), "slices", lambda *_: slices)
    backward = load_kernels("ops").linear_head_backward._init_fn
    arguments = op_arguments(make_case(64, 300, 16, bias=True))
    outputs = load_kernels("ops").linear_head(*arguments)
    grads = [torch.ones_like(value) for value in outputs[:5]]
    needs = ["hidden" not in frozen, "weight" not in frozen, True, False, False]
    with Products() as mode:
        backward(*arguments[:6], outputs, grads, needs, *arguments[6:12], *arguments[13:])
    assert mode.count == products * 64 * 16 * 300


@pytest.mark.parametrize("name", ["logprob", "entropy", "region_entropy"])
def test_nothing_flows_where_it_is_not_wanted(name):
    case = make_case(9, 131, 24, region=TopP(0.9)).fresh()
    out = fused(case, entropy_grad=False)
    assert not out["entropy"].requires_grad
    assert not out["lse"].requires_grad
    assert not out["region_mass"].requires_grad
    assert not out["region_size"].requires_grad
    if name != "entropy":
        mixed = torch.autograd.grad((out[name] + out["entropy"]).sum(), case.hidden)[0]
        plain = torch.autograd.grad(fused(case)[name].sum(), case.hidden)[0]
        assert torch.equal(mixed, plain)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_flags_and_fields(backend):
    case = make_case(5, 131, 24)
    out = linear_logprob_entropy(
        case.hidden, case.weight, case.targets, with_entropy=False, backend=backend
    )
    assert out.entropy is None
    assert (out.region_entropy, out.region_size, out.region_mass) == (None, None, None)
    assert out.lse is not None
    assert out._fields == (
        *("logprob", "entropy", "region_entropy", "lse", "region_size", "region_mass"),
    )
    assert fused(case.given(region=TopK(3)), backend)["region_size"].dtype == torch.int32


# ---------------------------------------------------------------------------------- several passes


@pytest.mark.parametrize("region", REGIONS)
def test_backward_twice_gives_the_same(region):
    case = make_case(9, 131, 24, bias=True, rank=3, region=region).fresh()
    out = fused(case)
    total = sum(out[name].sum() for name in ("logprob", "entropy", "region_entropy") if name in out)
    leaves = list(case.leaves().values())
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(total, leaves)


def test_two_heads_of_one_weight_add_up():
    case = make_case(9, 131, 24, region=TopP(0.9)).fresh()
    other = make_case(5, 131, 24, seed=3, region=TopK(3)).fresh()
    other.weight = case.weight
    parts = [
        torch.autograd.grad(fused(c)["region_entropy"].sum(), case.weight)[0] for c in (case, other)
    ]
    both = fused(case)["region_entropy"].sum() + fused(other)["region_entropy"].sum()
    both.backward()
    assert torch.allclose(case.weight.grad, parts[0] + parts[1], atol=1e-6)


@pytest.mark.parametrize("function", ["head", "loss", "logits", "in place"])
def test_second_derivative_is_refused(function):
    case = make_case(5, 17, 8).fresh()
    if function == "head":
        value = fused(case)["entropy"].sum()
    elif function == "loss":
        value = linear_cross_entropy(case.hidden, case.weight, case.targets)
    else:
        logits = case.hidden @ case.weight.T
        value = logprob_entropy_from_logits(
            logits, case.targets, inplace_backward=function == "in place"
        ).entropy.sum()
    with pytest.raises(RuntimeError, match="backward through|no second derivative"):
        grad = torch.autograd.grad(value, case.hidden, create_graph=True)[0]
        grad.square().sum().backward()
