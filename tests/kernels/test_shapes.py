"""Sizes, layouts of memory and extreme logits (card 11.3, 11.4)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_modules.ops import TopK, TopP, linear_cross_entropy, load_kernels
from tests.kernels import oracle
from tests.kernels.cases import (
    REGIONS,
    Case,
    assert_close,
    from_logits,
    full_logits,
    fused,
    make_case,
    run,
    truth,
    upstreams,
)

BACKENDS = ("torch", "reference")
INFINITE = torch.tensor(-math.inf)


def check(case, tolerance=2e-5, **options):
    grads = upstreams(case)
    found = run(partial(fused, **options), case, grads)
    assert_close(found, truth(case, grads), tolerance)
    return found


@pytest.mark.parametrize("h", [8, 33, 40, 96])
@pytest.mark.parametrize("v", [2, 17, 100, 131, 1000])
@pytest.mark.parametrize("n", [0, 1, 5, 127, 128, 129])
def test_sizes(n, v, h):
    """Alternating regions; 1 MiB cuts the larger ones."""
    region = (None, TopK(2), TopP(0.9))[(n + v + h) % 3]
    found = check(make_case(n, v, h, region=region, seed=n + v + h), workspace_mb=1)
    assert found["d hidden"].shape == (n, h)
    assert found["d weight"].shape == (v, h)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", REGIONS)
def test_no_rows(backend, region):
    case = make_case(0, 17, 8, bias=True, rank=3, region=region)
    found = run(partial(fused, backend=backend), case, upstreams(case))
    assert found["logprob"].shape == found["entropy"].shape == (0,)
    assert found["d hidden"].shape == (0, 8)
    for name in ("weight", "bias", "side_weight"):
        assert torch.equal(found[f"d {name}"], torch.zeros_like(getattr(case, name)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 4), (3, 0, 2)])
def test_leading_dimensions(backend, region, shape):
    case = make_case(0, 131, 33, bias=True, rank=3, shape=shape, region=region)
    found = check(case, backend=backend)
    assert all(value.shape == shape for name, value in found.items() if name[:2] != "d ")


LAYOUTS = {
    "transposed": lambda hidden: hidden.T.contiguous().T,
    "sliced columns": lambda hidden: torch.cat([hidden, hidden + 1], 1)[:, : hidden.shape[1]],
    "sliced rows": lambda hidden: hidden.repeat_interleave(2, 0)[::2],
    "expanded": lambda hidden: hidden[:1].expand_as(hidden),
    "batch first of batch last": lambda hidden: hidden.view(4, 3, -1).transpose(0, 1),
}


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_hidden(backend, layout, ignored):
    plain = make_case(12, 131, 40, region=TopP(0.9))
    hidden = layout(plain.hidden)
    assert not hidden.is_contiguous()
    targets = plain.targets.view(hidden.shape[:-1])
    if ignored:
        targets.view(-1)[::5] = -100

    def strided(case, backend=backend):
        return fused(replace(case, hidden=layout(case.hidden)), backend)

    case = replace(plain, targets=targets)
    grads = upstreams(case)

    def contiguous(case):
        wide = replace(case, hidden=layout(case.hidden).contiguous())
        logits = wide.hidden @ wide.weight.T
        return oracle.quantities(logits, wide.targets, **wide.options)

    wanted = run(contiguous, case.fresh(torch.float64), grads)
    assert_close(run(strided, case, grads), wanted, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_weight(backend):
    case = make_case(12, 131, 40, region=TopK(3), bias=True)
    case.weight = case.weight.T.contiguous().T
    case.bias = case.bias.repeat_interleave(3)[::3]
    assert not case.weight.is_contiguous()
    found = check(case, backend=backend)
    if backend == "torch":
        assert found["d weight"].stride() == case.weight.stride()


@pytest.mark.parametrize("v", [17, 131, 1025, 2500])
@pytest.mark.parametrize("region", REGIONS)
def test_all_logits_near_minus_fifty(v, region):
    """A tail that counts as logit 0, or a running maximum that starts at 0, would win by e^50."""
    case = make_case(9, v, 33, bias=True, scale=0.3, region=region)
    case.bias -= 50.0
    check(case, workspace_mb=1)


# --------------------------------------------------------------------------------- extreme logits


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("region", REGIONS)
def test_offsets_cost_no_digits(offset, region):
    """The same logits, moved: exact in float32 since they are multiples of 2^-10."""
    logits = (torch.randn(6, 131) * 2 * 2**8).round() / 2**8
    case = from_logits(logits, torch.arange(6) * 20, region=region)
    case.bias = torch.zeros(131)
    grads = upstreams(case)
    wanted = truth(case, grads)
    case.bias += offset
    found = run(fused, case, grads)
    found["lse"] -= offset
    lse = found.pop("lse") - wanted["lse"]
    assert lse.abs().max() <= 5e-4  # half a step of float32 at 1e4
    assert_close(found, wanted, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("height", [100.0, 1e4, -1e4])
def test_one_logit_alone(backend, region, height):
    """One-hot rows (entropy 0, or log(V-1) if the one is impossible); targets on and beside it."""
    logits = torch.zeros(4, 131)
    logits[:, 7] = height
    case = from_logits(logits, torch.tensor([7, 0, 130, 7]), region=region)
    found = check(case, backend=backend)
    wanted = 0.0 if height > 0 else math.log(130)
    assert torch.allclose(found["entropy"], torch.tensor(wanted), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", [2, 131, 1500])
def test_uniform_rows(backend, v):
    case = from_logits(torch.full((3, v), -3.25), region=TopP(0.4507))
    found = check(case, backend=backend, workspace_mb=1)
    assert torch.allclose(found["entropy"], torch.tensor(math.log(v)))
    assert torch.allclose(found["logprob"], torch.tensor(-math.log(v)))
    assert found["region_size"].tolist() == [math.ceil(v * 0.4507)] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", [*REGIONS, TopP(0.999), TopK(131)])
def test_impossible_tokens(backend, region):
    """-inf columns: no NaN, no gradient to them; also members of a TopK region that is larger."""
    case = make_case(7, 131, 40, bias=True, region=region)
    case.targets %= 50
    case.bias[60:] = INFINITE
    found = check(case, backend=backend)
    assert not found["d weight"][60:].any()
    assert not found["d bias"][60:].any()


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("gone", [slice(0, 1024), slice(1024, 2048), slice(2048, 2500)])
def test_whole_slice_impossible(region, gone):
    case = make_case(300, 2500, 8, bias=True, region=region)
    case.bias[gone] = INFINITE
    kept = torch.ones(2500, dtype=torch.bool)
    kept[gone] = False
    case.targets = kept.nonzero()[:, 0][case.targets % kept.sum()]
    check(case, workspace_mb=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_target(backend):
    """Its log-prob is -inf; everything else stays finite, as in PyTorch."""
    case = make_case(3, 17, 8, bias=True, region=TopP(0.9))
    case.targets[1] = 5
    case.bias[5] = INFINITE
    found = run(partial(fused, backend=backend), case, upstreams(case))
    plain = torch.nn.functional.linear(case.hidden, case.weight, case.bias).log_softmax(-1)
    assert torch.allclose(found["logprob"], plain.gather(1, case.targets[:, None])[:, 0])
    assert found["logprob"][1] == INFINITE
    assert all(found[name].isfinite().all() for name in found if name != "logprob")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_temperatures(backend, region, temperature):
    check(make_case(9, 131, 40, bias=True, region=region, temperature=temperature), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", [None, TopK(1), TopK(8), TopP(0.9), TopP(0.9, ties="include")])
def test_nan_stays_in_its_row(backend, region):
    """A NaN row gives NaN in all values and gradients of that row, and only there."""
    case = make_case(5, 131, 40, region=region)
    grads = {name: value + 1 for name, value in upstreams(case).items()}
    clean = run(partial(fused, backend=backend), case, grads)
    case.hidden[2, 3] = torch.nan
    found = run(partial(fused, backend=backend), case, grads)
    others = [0, 1, 3, 4]
    for name in ("logprob", "entropy", "lse", *(["region_entropy"] if region else []), "d hidden"):
        assert found[name][2].isnan().all(), name
        assert torch.equal(found[name][others], clean[name][others]), name
    assert found["d weight"].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", [None, TopK(1), TopK(8), TopP(0.9)])
def test_row_without_any_token_is_nan(backend, region):
    """All logits -inf: NaN, as ``torch.log_softmax`` gives."""
    weight = torch.randn(131, 3)
    weight[:, 1] = -3e38  # 1.2 times that is -inf in float32, 0 times that is 0
    case = Case(1.2 * torch.eye(3), weight, torch.arange(3), options={"region": region})
    logits = full_logits(case)
    assert (logits[1] == INFINITE).all()
    assert logits[[0, 2]].isfinite().all()
    assert logits.log_softmax(-1)[1].isnan().all()
    found = fused(case, backend)
    for name in ("logprob", "entropy", *(["region_entropy"] if region else [])):
        assert found[name].isnan().tolist() == [False, True, False], name


def test_limits_and_ragged_slices(monkeypatch):
    """Slices that end inside ``vocab_limit`` and rows of the weight beyond it."""
    monkeypatch.setattr(load_kernels("backward"), "slices", lambda *_: (16, 4))
    for limit in (1, 15, 16, 17, 33):
        case = make_case(9, 40, 8, bias=True, rank=2, vocab_limit=limit, region=TopP(0.7))
        found = check(case)
        assert not found["d weight"][limit:].any()
        assert not found["d bias"][limit:].any()
        assert not found["d side_weight"][limit:].any()
        loss = linear_cross_entropy(
            *(case.hidden, case.weight, case.targets),
            **{"bias": case.bias, "side": case.side, "vocab_limit": limit},
            label_smoothing=0.2,
        )
        logits = case.hidden @ case.weight.T + case.bias + case.side[0] @ case.side[1].T
        wanted = torch.nn.functional.cross_entropy(
            logits[:, :limit], case.targets, label_smoothing=0.2
        )
        assert torch.allclose(loss, wanted, atol=1e-5)
