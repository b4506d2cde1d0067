"""``logprob_entropy_from_logits``: the same quantities where the logits exist already."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_modules.ops import TopK, TopP, load_kernels, logprob_entropy_from_logits
from tests.kernels import oracle
from tests.kernels.cases import VALUES, errors, run, upstreams

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
REGIONS = (None, TopK(1), TopK(8, preserve_mass=True), TopP(0.9), TopP(0.9, preserve_mass=True))


class Given:
    """Logits and targets, with the methods of ``cases.Case`` that ``run`` needs."""

    def __init__(self, logits, targets, **options):
        self.logits, self.targets, self.options = logits, targets, options

    def leaves(self):
        return {"logits": self.logits}

    def fresh(self, dtype=None):
        own = self.logits.detach().to(dtype or self.logits.dtype, copy=True).requires_grad_()
        return Given(own, self.targets, **self.options)


def given(n=13, v=131, dtype=torch.float32, *, ignored=(), shape=None, **options):
    generator = torch.Generator().manual_seed(2)
    shape = (n,) if shape is None else shape
    logits = 2 * torch.randn(*shape, v, generator=generator, dtype=torch.float64)
    targets = torch.randint(v, shape, generator=generator)
    if ignored:
        targets[list(ignored)] = options.get("ignore_index", -100)
    return Given(logits.to(dtype), targets, **options)


def ours(case, **more):
    out = logprob_entropy_from_logits(case.logits, case.targets, **case.options, **more)
    return {name: value for name, value in out._asdict().items() if value is not None}


def ours_in_place(case, **more):
    """On logits that are no leaf, as a head gives them."""
    return ours(Given(case.logits * 1.0, case.targets, **case.options), inplace_backward=True)


def wanted_of(case, grads):
    def compute(case):
        return oracle.quantities(case.logits, case.targets, **case.options)

    return run(compute, case.fresh(torch.float64), grads)


def check(case, tolerance, compute=ours):
    grads = upstreams(case)
    found = run(compute, case, grads)
    wanted = wanted_of(case, grads)
    for name, worst in errors(found, wanted).items():
        assert found[name].shape == wanted[name].shape, name
        last_digit = torch.finfo(case.logits.dtype).eps if name == "d logits" else 0.0
        assert worst <= max(tolerance, last_digit), (name, worst)
    return found


@pytest.mark.parametrize("compute", [ours, ours_in_place])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(compute, dtype, region, temperature):
    case = given(dtype=dtype, ignored=[0, 4, 12], region=region, temperature=temperature)
    found = check(case, TOLERANCE.get(dtype, 2e-5), compute)
    assert found["logprob"].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert found["d logits"].dtype == dtype


@pytest.mark.parametrize("compute", [ours, ours_in_place])
@pytest.mark.parametrize("name", VALUES)
def test_one_output_alone(compute, name):
    case = given(dtype=torch.float64, region=TopP(0.9))
    grads = {name: upstreams(case)[name]}
    found, wanted = run(compute, case, grads), wanted_of(case, grads)
    assert errors(found, wanted)["d logits"] <= 1e-10


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("region", REGIONS)
def test_blocks_of_rows(monkeypatch, rows, region):
    monkeypatch.setattr(load_kernels("logits_ops"), "_logits_rows", lambda _: rows)
    check(given(dtype=torch.float64, ignored=[3], region=region), 1e-10)


@pytest.mark.parametrize("compute", [ours, ours_in_place])
@pytest.mark.parametrize("region", [None, TopK(3), TopP(0.9)])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0)])
def test_shapes(compute, region, shape):
    found = check(given(shape=shape, region=region), 2e-5, compute)
    assert found["logprob"].shape == shape


@pytest.mark.parametrize("compute", [ours, ours_in_place])
def test_all_rows_ignored(compute):
    case = given(ignored=range(13), region=TopP(0.9), ignore_index=5)
    case.logits[:] = torch.nan
    found = run(compute, case, upstreams(case))
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("ignored", [[], [0], [12], [1, 2, 7]])
def test_ignored_rows_leave_no_trace(ignored):
    case = given(ignored=ignored, region=TopP(0.9))
    grads = upstreams(case)
    wanted = wanted_of(case, grads)
    case.logits[ignored] = torch.nan
    found = run(ours, case, grads)
    assert max(errors(found, wanted).values()) <= 2e-5
    assert not found["d logits"][ignored].any()
    assert not any(found[name][ignored].any() for name in ("logprob", "entropy", "region_mass"))


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_logits_that_are_not_contiguous(layout):
    case = given(region=TopK(3))
    grads = upstreams(case)

    def strided(case):
        if layout == "transposed":
            logits = case.logits.T.contiguous().T
        else:
            logits = torch.cat([case.logits, case.logits], 1)[:, :131]
        assert not logits.is_contiguous()
        return ours(Given(logits, case.targets, **case.options))

    assert max(errors(run(strided, case, grads), wanted_of(case, grads)).values()) <= 2e-5


def test_flags():
    case = given(dtype=torch.float64)
    case.logits.requires_grad_()
    assert ours(case, with_entropy=False).keys() == {"logprob", "lse"}
    out = ours(case, entropy_grad=False)
    assert not out["entropy"].requires_grad
    assert not out["lse"].requires_grad
    assert torch.equal(out["entropy"], ours(case)["entropy"])


# ----------------------------------------------------------------------------- in-place gradients


def test_in_place_gradient_takes_the_place_of_the_logits():
    leaf = given().logits.requires_grad_()
    logits = leaf * 2
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    before = logits.detach().clone()
    out = logprob_entropy_from_logits(logits, given().targets, inplace_backward=True)
    assert torch.equal(logits, before)  # the forward pass leaves them
    out.logprob.sum().backward()
    assert seen == [logits.data_ptr()]
    assert not torch.equal(logits, before)
    wanted = torch.autograd.grad(before.requires_grad_().log_softmax(-1)[:, 0].sum(), before)[0]
    own = logprob_entropy_from_logits(
        before, torch.zeros(13, dtype=torch.int64), inplace_backward=False
    )
    assert torch.allclose(torch.autograd.grad(own.logprob.sum(), before)[0], wanted, atol=1e-6)


def test_in_place_twice_is_refused():
    logits = given().logits.requires_grad_() * 2
    out = logprob_entropy_from_logits(logits, given().targets, inplace_backward=True)
    out.logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="use inplace_backward=False"):
        out.entropy.sum().backward()


def test_plain_twice_gives_the_same():
    leaf = given().logits.requires_grad_()
    out = logprob_entropy_from_logits(leaf, given().targets, region=TopP(0.9))
    total = out.logprob.sum() + out.region_entropy.sum()
    once = torch.autograd.grad(total, leaf, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(total, leaf)[0], once)


def test_gradcheck():
    case = given(5, 12, torch.float64, ignored=[2], temperature=0.7, region=TopP(0.9))

    def outputs(logits):
        found = ours(Given(logits, case.targets, **case.options))
        return tuple(found[name] for name in VALUES)

    sorted_logits = (case.logits / 0.7).sort(-1, descending=True).values
    assert sorted_logits.diff(dim=-1).abs().min() > 1e-3
    assert (sorted_logits.softmax(-1).cumsum(-1) - 0.9).abs().min() > 1e-4
    assert torch.autograd.gradcheck(outputs, (case.logits.requires_grad_(),))


def test_extreme_logits():
    """Offsets, impossible tokens, NaN rows and rows without any token."""
    for region in REGIONS:
        case = given(dtype=torch.float64, region=region)
        case.logits[0] += 1e4
        case.logits[1] -= 1e4
        case.logits[2, 5:] = -torch.inf
        case.logits[3] = 0.0
        case.targets[2] = 1
        check(case, 1e-10)
        case.logits[4, 7] = torch.nan
        case.logits[5] = -torch.inf
        found = run(ours, case, upstreams(case))
        for name in ("logprob", "entropy", *(["region_entropy"] if region else [])):
            bad = found[name].isnan()
            assert bad.nonzero()[:, 0].tolist() == [4, 5], name


def test_same_as_from_the_head():
    """Bit for bit where the head's logits are these: an identity weight."""
    from tests.kernels.cases import from_logits, fused

    case = given(region=TopP(0.9), temperature=0.9)
    head = from_logits(case.logits, case.targets, **case.options)
    grads = upstreams(case)
    own, other = run(ours, case, grads), run(partial(fused), head, grads)
    for name in ("logprob", "entropy", "region_entropy", "region_size", "lse"):
        assert torch.equal(own[name], other[name]), name
    assert torch.allclose(own["d logits"], other["d hidden"], atol=1e-6)
