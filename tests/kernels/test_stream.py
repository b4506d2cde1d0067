"""Rows put together from slices of the vocabulary (``torch_stream``), for the largest vocabularies.

PyTorch's back end takes this way where few whole rows fit the workspace; here it always does.
"""

from __future__ import annotations

import pytest
import torch

from lightning_modules.ops import TopK, TopP, linear_cross_entropy, load_kernels
from tests.kernels import oracle
from tests.kernels.cases import (
    Case,
    assert_close,
    errors,
    from_logits,
    full_logits,
    fused,
    make_case,
    op_outputs,
    run,
    truth,
    upstreams,
)

WIDTHS = (1, 7, 50, 130, 131)
REGIONS = (None, TopK(1), TopK(8), TopK(60), TopK(131), TopK(8, preserve_mass=True))


@pytest.fixture
def streamed(monkeypatch):
    """A function that sets the width of a slice; everything is then streamed."""
    stream, plain = load_kernels("torch_stream"), load_kernels("torch_backend")

    def always(width):
        monkeypatch.setattr(stream, "WIDTH", width)
        monkeypatch.setattr(plain, "forward", stream.forward)

    return always


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("region", REGIONS)
def test_values_and_gradients(streamed, dtype, width, region):
    case = make_case(13, 131, 40, dtype, bias=True, rank=3, temperature=0.8, region=region)
    case.targets[[0, 7]] = -100
    grads = upstreams(case)
    streamed(width)
    worst = errors(run(fused, case, grads), truth(case, grads))
    bounds = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5}
    for name, value in worst.items():
        low = dtype == torch.bfloat16 and name.startswith("d ")
        assert value <= (torch.finfo(dtype).eps if low else bounds[dtype]), (name, value)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [1, 3, 8, 60])
def test_ties_over_the_borders_of_slices(streamed, width, k):
    """Among equals the lowest id wins, also of another slice."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(20, 131, generator=generator).mul(2).round().div(2)
    z[1] = 1.5
    streamed(width)
    out = op_outputs(from_logits(z, region=TopK(k)), with_argmax=True)
    inside = torch.zeros(z.shape, dtype=torch.bool).scatter_(1, out["region_ids"], True)
    assert torch.equal(inside, oracle.mask(z, TopK(k)))
    assert out["argmax"].tolist() == [row.index(max(row)) for row in z.tolist()]


@pytest.mark.parametrize("width", [7, 50, 131])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}])
def test_loss_and_stats(streamed, width, options):
    """The mean over slices of different widths and the most probable token."""
    case = make_case(23, 140, 40, torch.float64, bias=True, vocab_limit=131)
    logits = full_logits(case)
    case.targets[:12] = logits[:12, :131].argmax(1)
    streamed(width)
    loss, stats = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"bias": case.bias, "vocab_limit": 131, "return_stats": True, "reduction": "none"},
        **options,
    )
    wanted = oracle.quantities(logits, case.targets, vocab_limit=131)
    assert torch.allclose(loss, oracle.token_losses(wanted, **options), atol=1e-12)
    assert torch.allclose(stats.entropy, wanted["entropy"], atol=1e-12)
    assert torch.equal(stats.accuracy, (wanted["argmax"] == case.targets).double())


@pytest.mark.parametrize("region", [None, TopK(1), TopK(8), TopK(100)])
@pytest.mark.parametrize("gone", [slice(0, 50), slice(50, 100), slice(100, 131), slice(0, 100)])
def test_slices_without_any_token(streamed, region, gone):
    case = make_case(9, 131, 8, bias=True, region=region)
    case.bias[gone] = -torch.inf
    allowed = case.bias.isfinite().nonzero()[:, 0]
    case.targets = allowed[case.targets % len(allowed)]
    grads = upstreams(case)
    streamed(50)
    assert_close(run(fused, case, grads), truth(case, grads), 2e-5)
    case.targets[3] = range(131)[gone][0]
    found = fused(case)
    assert found["logprob"].isneginf().tolist() == [row == 3 for row in range(9)]
    assert found["entropy"].isfinite().all()


@pytest.mark.parametrize("region", [None, TopK(1), TopK(8)])
@pytest.mark.parametrize("bad", ["infinite", "nothing"])
def test_rows_that_have_no_value(streamed, region, bad):
    """An infinite logit in two slices, or -inf in all: NaN in this row's values, and only there."""
    weight = torch.randn(131, 3)
    case = Case(1.2 * torch.eye(3), weight, torch.arange(3), options={"region": region})
    if bad == "infinite":
        weight[60:, 1] = 3e38  # an infinite logit from slice 1 on, so NaN after its maximum
    else:
        weight[:, 1] = -3e38  # 1.2 times that is -inf in float32
    streamed(50)
    found = fused(case.given(region=region))
    for name in ("logprob", "entropy", *(["region_entropy"] if region else [])):
        assert found[name].isnan().tolist() == [False, True, False], name


@pytest.mark.parametrize("offset", [1e4, -1e4, -120.0])
def test_offsets_cost_no_digits(streamed, offset):
    logits = (torch.randn(6, 131) * 2 * 2**8).round() / 2**8
    case = from_logits(logits, torch.arange(6) * 20, region=TopK(8))
    case.bias = torch.zeros(131)
    grads = upstreams(case)
    wanted = truth(case, grads)
    case.bias += offset
    streamed(20)
    found = run(fused, case, grads)
    assert (found.pop("lse") - offset - wanted["lse"]).abs().max() <= 5e-4
    assert_close(found, wanted, 2e-6)


def test_which_calls_are_streamed(monkeypatch):
    """Only those with few rows in the workspace, and none that looks for a nucleus."""
    stream, seen = load_kernels("torch_stream"), []
    forward = stream.forward
    monkeypatch.setattr(stream, "forward", lambda problem: seen.append(1) or forward(problem))
    for region, n, v, wanted in (
        *((None, 300, 5000, 1), (TopK(2), 300, 5000, 1), (TopP(0.9), 300, 5000, 0)),
        *((None, 300, 500, 0), (None, 4, 5000, 0), (None, 0, 5000, 0)),
    ):
        case = make_case(n, v, 8, region=region)
        grads = upstreams(case)
        wanted_values = run(fused, case, grads)  # with 64 MiB
        seen.clear()
        found = run(lambda case: fused(case, workspace_mb=1), case, grads)
        assert len(seen) == wanted, (region, n, v)
        assert_close(found, wanted_values, 1e-5)
