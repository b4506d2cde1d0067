"""Trust regions against sorted rows: members, sizes, ties, scales, gradients (card 11.6)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from lightning_modules.ops import TopK, TopP, load_kernels, logprob_entropy_from_logits
from tests.kernels import oracle
from tests.kernels.cases import (
    assert_close,
    from_logits,
    fused,
    make_case,
    op_outputs,
    run,
    truth,
    upstreams,
)

BACKENDS = ("torch", "reference")
PS = (0.5, 0.9, 0.95, 0.99, 0.999)
ONLY = ("region_entropy",)


def normal(n, v, *, scale=2.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, v, generator=generator, dtype=torch.float64) * scale).to(dtype)


def rounded(n, v, **options):
    """Few different logits, so that nearly every region is cut among equal ones; also -0.0."""
    z = normal(n, v, scale=1.0, **options).mul(2).round().div(2)
    z[0, ::2] *= -1.0
    return z


LOGITS = {
    "peaked": lambda n, v: normal(n, v, scale=4.0),
    "usual": lambda n, v: normal(n, v),
    "flat": lambda n, v: normal(n, v, scale=0.1),
    "ties": rounded,
}


def found_mask(z, region):
    """Mask of the region as the forward pass hands it to the backward pass."""
    out = op_outputs(from_logits(z, region=region))
    if isinstance(region, TopK):
        return torch.zeros(z.shape, dtype=torch.bool).scatter_(1, out["region_ids"], True)
    return by_threshold(z - out["row_max"][:, None], out)


def by_threshold(d, out):
    """Members by the rule of ``RegionStats.threshold``."""
    ids = torch.arange(d.shape[1])
    theta, last = out["region_threshold"][:, None], out["region_tie_column"][:, None]
    return (d > theta) | ((d == theta) & (ids <= last))


def check_region(z, region, backends=BACKENDS):
    inside = oracle.mask(z, region)
    assert torch.equal(found_mask(z, region), inside)
    case = from_logits(z, region=region)
    grads = upstreams(case, ONLY)
    wanted = truth(case, grads)
    assert torch.equal(wanted["region_size"], inside.sum(1))
    for backend in backends:
        found = run(partial(fused, backend=backend), case, grads)
        assert torch.equal(found["region_size"].long(), wanted["region_size"])
        assert_close(found, wanted, 2e-5)
    return wanted


# ---------------------------------------------------------------------------- against sorted rows


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("ties", ["index", "include"])
@pytest.mark.parametrize("p", PS)
def test_nucleus(kind, ties, p):
    check_region(LOGITS[kind](12, 150), TopP(p, ties=ties))


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("k", [1, 2, 8, 64, 65, 149, 150])
@pytest.mark.parametrize("v", [64, 150])
def test_top_k(kind, k, v):
    check_region(LOGITS[kind](12, v), TopK(min(k, v)))


@pytest.mark.parametrize("region", [TopK(6), TopP(0.87), TopP(0.87, ties="include")])
@pytest.mark.parametrize("tried", [1, 4, 40])
def test_ties_in_every_slice(monkeypatch, region, tried):
    """Equal logits far apart, in slices and blocks of their own; both ways to find a nucleus."""
    monkeypatch.setattr(load_kernels("torch_backend"), "NUCLEUS_TRY", tried)
    monkeypatch.setattr(load_kernels("backward"), "slices", lambda *_: (7, 5))
    z = rounded(24, 70)
    z[1] = 1.0
    z[2] = z[2, torch.arange(70) % 10]
    check_region(z, region, ("torch",))


def test_ties_of_a_real_product():
    """Small integers: the product is exact, so rows of the weight that are equal always tie."""
    case = make_case(40, 30, 16, region=TopP(0.8), temperature=8.0)
    case.hidden, case.weight = case.hidden.round(), case.weight.mul(4).round().repeat(6, 1)
    grads = upstreams(case)
    assert_close(run(fused, case, grads), truth(case, grads), 2e-5)
    out = op_outputs(case)
    assert (out["region_tie_column"] >= 0).float().mean() > 0.5


@pytest.mark.parametrize("ties", ["index", "include"])
@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0])
def test_nucleus_beyond_the_first_try(ties, scale):
    """More members than are looked at first: a full sort of those rows, others stay as they are."""
    least = load_kernels("torch_backend").NUCLEUS_TRY
    z = normal(24, 2000, scale=scale)
    z[::3] = normal(8, 2000, scale=6.0)
    z[1] = 0.25
    wanted = check_region(z, TopP(0.95, ties=ties), ("torch",))
    assert (wanted["region_size"] > least).any()
    assert (wanted["region_size"] < least).any()


def test_tie_over_the_edge_of_the_first_try(monkeypatch):
    """The last value looked at goes on among those not looked at."""
    monkeypatch.setattr(load_kernels("torch_backend"), "NUCLEUS_TRY", 8)
    z = torch.full((3, 40), -1.0)
    z[:, 30:35] = 2.0
    z[0, :3] = z[1, 37:] = 1.5  # with the five above: 8 values
    z[2, :6] = 1.5  # 11
    for p in (0.5, 0.6, 0.7, 0.8):
        for ties in ("index", "include"):
            check_region(z, TopP(p, ties=ties), ("torch",))


@pytest.mark.parametrize("p", PS)
def test_every_member_is_likely_enough(p):
    """Lemma of the card: no member of a nucleus has less than ``(1 - p) / V``."""
    for seed, scale in enumerate((0.05, 0.5, 1.0, 2.0, 4.0, 8.0)):
        z = normal(20, 301, scale=scale, seed=seed, dtype=torch.float64)
        z[10:] = z[10:].round()
        inside = found_mask(z, TopP(p))
        likely = oracle.softmax(z)
        assert likely[inside].min() >= (1 - p) / 301 * (1 - 1e-12)
        assert ((likely * inside).sum(1) >= p - 1e-12).all()
        smallest = likely.masked_fill(~inside, 1.0).amin(1)
        assert ((likely * inside).sum(1) - smallest < p).all()  # and none could be left out


# ------------------------------------------------------------------------------- the other options


def published(logits, p):
    """TRE-P as the reference code has it: the 256 most probable, the mass before below p."""
    probs = logits.double().softmax(-1)
    top = probs.topk(256, dim=-1).values
    kept = top.cumsum(-1) - top < p
    q = torch.where(kept, top, 0.0)
    q = q / q.sum(-1, keepdim=True)
    entropy = -(q * torch.where(kept, q, 1.0).log()).sum(-1)
    size = kept.sum(-1)
    factor = math.log(logits.shape[-1]) / size.clamp(min=2).double().log()
    return torch.where(size > 1, entropy * factor, 0.0), size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 9.0])
def test_max_size_is_the_published_cut(backend, scale):
    z = normal(16, 1000, scale=scale).requires_grad_()
    entropy, size = published(z, 0.99)
    found = fused(from_logits(z, region=TopP(0.99, max_size=256)), backend)
    assert torch.equal(found["region_size"].long(), size)
    assert torch.allclose(found["region_entropy"].double(), entropy, atol=2e-5)
    assert (size == 256).any() or scale > 1.0
    weights = torch.arange(1.0, 17.0)
    wanted = torch.autograd.grad((entropy * weights).sum(), z)[0]
    own = torch.autograd.grad((found["region_entropy"] * weights).sum(), z)[0]
    assert torch.allclose(own, wanted, atol=1e-5)


@pytest.mark.parametrize("region", [TopP(0.99, max_size=5), TopP(0.99, max_size=5, ties="include")])
def test_max_size_among_ties(region):
    check_region(rounded(20, 90), region)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["log_vocab", "none"])
@pytest.mark.parametrize("preserve_mass", [False, True])
def test_one_token_alone_has_no_entropy(backend, scale, preserve_mass):
    z = normal(6, 50)
    z[:, 3] = 20.0
    region = TopP(0.9, scale=scale, preserve_mass=preserve_mass)
    case = from_logits(z, region=region)
    found = run(partial(fused, backend=backend), case, upstreams(case, ONLY))
    assert found["region_size"].tolist() == [1] * 6
    assert not found["region_entropy"].any()
    assert not found["d hidden"].any()
    assert not found["d weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LOGITS)
def test_k_1_is_min_entropy(backend, kind):
    """Of the full softmax, unscaled; the gradient is ``p - [j is the lowest argmax]``."""
    z = LOGITS[kind](8, 70).requires_grad_()
    found = fused(from_logits(z, region=TopK(1)), backend)
    assert torch.allclose(found["region_entropy"], z.logsumexp(-1) - z.amax(-1), atol=1e-6)
    grad = torch.autograd.grad(found["region_entropy"].sum(), z)[0]
    wanted = z.softmax(-1)
    wanted[torch.arange(8), [row.index(max(row)) for row in z.tolist()]] -= 1
    assert torch.allclose(grad, wanted, atol=1e-6)
    assert found["region_size"].tolist() == [1] * 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [None, 90])
def test_scales(backend, limit):
    """``none`` is the entropy itself; ``log_vocab`` counts the allowed tokens."""
    case = make_case(9, 100, 8, bias=True, vocab_limit=limit)
    for of in (TopK, TopP):
        value = 8 if of is TopK else 0.9
        plain = fused(case.given(region=of(value, scale="none")), backend)
        scaled = fused(case.given(region=of(value)), backend)
        size = scaled["region_size"].double().clamp(min=2)
        factor = math.log(limit or 100) / size.log()
        wanted = plain["region_entropy"].double() * factor
        assert torch.allclose(scaled["region_entropy"].double(), wanted, rtol=1e-6)
        assert plain["region_entropy"].max() > 0.1
    everything = fused(case.given(region=TopK(limit or 100)), backend)
    assert torch.allclose(everything["region_entropy"], everything["entropy"], atol=1e-6)
    assert torch.allclose(everything["region_mass"], torch.tensor(1.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["usual", "flat", "ties"])
@pytest.mark.parametrize("region", [TopK(8), TopP(0.9), TopP(0.9, ties="include")])
def test_preserve_mass(backend, kind, region):
    """A step along the gradient leaves ``sum_S e^z`` as it is; without the option it does not."""
    z = LOGITS[kind](10, 80).double()
    inside = oracle.mask(z, region)
    q = oracle.softmax(z.masked_fill(~inside, -math.inf))
    along = {}
    for preserve in (False, True):
        options = {f: getattr(region, f) for f in region.__dataclass_fields__}
        own = type(region)(**{**options, "preserve_mass": preserve})
        case = from_logits(z, region=own)
        grads = upstreams(case, ONLY)
        found = run(partial(fused, backend=backend), case, grads)
        assert_close(found, truth(case, grads), 1e-10)
        along[preserve] = (q * found["d hidden"]).sum(1).abs().max()
    assert along[True] < 1e-14
    assert along[False] > 1e-5


@pytest.mark.parametrize("region", [TopK(5, preserve_mass=True), TopP(0.9, preserve_mass=True)])
def test_preserve_mass_beside_other_outputs(region):
    """Only the region's part is projected, not that of the log-prob and the entropy."""
    case = make_case(9, 131, 24, bias=True, rank=3, temperature=0.7, region=region)
    grads = upstreams(case)
    for backend in BACKENDS:
        assert_close(run(partial(fused, backend=backend), case, grads), truth(case, grads), 2e-5)


def test_no_gradient_outside_the_region():
    z = normal(8, 200)
    for region in (TopK(5), TopP(0.7)):
        leaf = z.clone().requires_grad_()
        out = logprob_entropy_from_logits(leaf, torch.zeros(8, dtype=torch.int64), region=region)
        out.region_entropy.sum().backward()
        outside = ~oracle.mask(z, region)
        assert not leaf.grad[outside].any()
        assert leaf.grad[~outside].any()


# --------------------------------------------------------------------------------- stored threshold


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
def test_noise_of_a_recomputed_logit_flips_nothing(scale):
    """Relative noise of 6e-7: the threshold lies half-way to the next logit."""
    z = normal(100, 1000, scale=scale, seed=3)
    for p in (0.5, 0.9, 0.99):
        out = op_outputs(from_logits(z, region=TopP(p)))
        d = z - out["row_max"][:, None]
        inside = by_threshold(d, out)
        assert torch.equal(inside.sum(1), out["region_size"].long())
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            noise = 1 + 6e-7 * (2 * torch.rand(z.shape, generator=generator) - 1)
            again = by_threshold((z * noise) - out["row_max"][:, None], out)
            assert torch.equal(again, inside)


def test_slices_of_another_width_find_the_same_region():
    """Products over 128 columns at a time add up in another order than one product does."""
    case = make_case(129, 2500, 96, region=TopP(0.9))
    out = op_outputs(case)
    whole = case.hidden @ case.weight.T - out["row_max"][:, None]
    parts = [case.hidden @ part.T for part in case.weight.split(128)]
    cut = torch.cat(parts, 1) - out["row_max"][:, None]
    flipped = by_threshold(whole, out) ^ by_threshold(cut, out)
    assert torch.equal(by_threshold(whole, out).sum(1), out["region_size"].long())
    mass = (whole.softmax(-1) * flipped).sum(1)
    assert mass.max() <= 1e-4
    assert flipped.sum() <= 1e-6 * flipped.numel()
