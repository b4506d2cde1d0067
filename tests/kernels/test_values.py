"""Values and gradients of the fused head against the float64 oracle (card 11.1, 11.2, 11.8)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_modules.ops import TopK, TopP, load_kernels
from tests.kernels import accuracy
from tests.kernels.cases import (
    REGIONS,
    VALUES,
    assert_close,
    eager,
    errors,
    full_logits,
    fused,
    make_case,
    run,
    truth,
    upstreams,
)

BACKENDS = ("torch", "reference")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
LOW = (torch.bfloat16, torch.float16)
OPTIONS = [
    {},
    {"bias": True, "temperature": 0.7},
    {"bias": True, "rank": 5, "temperature": 1.5, "vocab_limit": 117},
]


@pytest.fixture
def tiny_workspace(monkeypatch):
    """Chunks, blocks and slices of a few rows and columns: a function that sets their sizes."""

    def shrink(forward_bytes: int, width: int, rows: int) -> None:
        monkeypatch.setattr(load_kernels("api"), "workspace_bytes", lambda *_: forward_bytes)
        monkeypatch.setattr(load_kernels("backward"), "slices", lambda *_: (width, rows))

    return shrink


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bias", "everything"])
def test_values_and_gradients(backend, dtype, region, options):
    case = make_case(13, 131, 40, dtype, region=region, **options)
    grads = upstreams(case)
    for some in [grads, *({name: grad} for name, grad in grads.items())]:
        found = run(partial(fused, backend=backend), case, some)
        wanted = truth(case, some)
        assert found["logprob"].dtype == dtype
        assert_close(found, wanted, TOLERANCE[dtype])
        if region is not None:
            assert torch.equal(found["region_size"].long(), wanted["region_size"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bias", "everything"])
def test_low_precision_is_as_good_as_eager(backend, dtype, region, options):
    case = make_case(13, 131, 40, dtype, region=region, **options)
    grads = upstreams(case)
    wanted = truth(case, grads)
    found = run(partial(fused, backend=backend), case, grads)
    own, plain = errors(found, wanted), errors(run(eager, case, grads), wanted)
    assert all(found[name].dtype == torch.float32 for name in ("logprob", "entropy", "lse"))
    assert found["d hidden"].dtype == found["d weight"].dtype == dtype
    # a region of rounded logits may have other members, so eager says nothing about it
    for name in own.keys() - {"region_size", "region_mass"}:
        assert own[name] <= 1.5 * plain[name] + 1e-3, (name, own[name], plain[name])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("region", REGIONS)
def test_low_precision_inputs_are_computed_in_float32(dtype, region):
    """The inputs are rounded, nothing after them is; gradients are rounded once, at the end."""
    case = make_case(13, 131, 40, dtype, bias=True, rank=5, region=region)
    grads = upstreams(case)
    worst = errors(run(fused, case, grads), truth(case, grads))
    last_digit = torch.finfo(dtype).eps / 2
    for name, value in worst.items():
        assert value <= (1.01 * last_digit if name.startswith("d ") else 2e-5), (name, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_another_dtype(backend):
    """A float32 bias beside bfloat16 weights is allowed; its gradient is float32."""
    case = make_case(13, 131, 40, torch.bfloat16, bias=True)
    case.bias = case.bias.float()
    grads = upstreams(case)
    found = run(partial(fused, backend=backend), case, grads)
    assert found["d bias"].dtype == torch.float32
    assert_close(found, truth(case, grads), 0.02)


@pytest.mark.parametrize("region", [None, TopK(1), TopK(4), TopP(0.9), TopP(0.9, scale="none")])
def test_gradcheck(region):
    """Numerical derivatives; a region stays the same where its edge is far from every logit."""
    case = make_case(4, 12, 10, torch.float64, bias=True, rank=3, temperature=0.8, region=region)
    case = case.fresh()

    def outputs(*leaves):
        own = dict(zip(case.leaves(), leaves, strict=True))
        found = fused(type(case)(targets=case.targets, options=case.options, **own))
        return tuple(found[name] for name in VALUES if name in found)

    z = (full_logits(case).detach() / 0.8).sort(-1, descending=True).values
    assert z.diff(dim=-1).abs().min() > 1e-3  # far above the step of 1e-6
    assert (z.softmax(-1).cumsum(-1) - 0.9).abs().min() > 1e-4
    assert torch.autograd.gradcheck(outputs, tuple(case.leaves().values()))


# ---------------------------------------------------------------------------------- ignored rows

IGNORED = {
    "none": [],
    "first": [0],
    "last": [12],
    "some": [0, 3, 4, 12],
    "all": list(range(13)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED.keys())
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignored_rows_leave_no_trace(backend, region, ignored, ignore_index):
    case = make_case(13, 131, 40, rank=3, bias=True, region=region, ignore_index=ignore_index)
    case.targets[case.targets == ignore_index] = 8
    case.targets[ignored] = ignore_index
    grads = upstreams(case)
    wanted = truth(case, grads)
    case.hidden[ignored] = torch.nan
    case.side_hidden[ignored] = torch.inf
    found = run(partial(fused, backend=backend), case, grads)
    assert_close(found, wanted, 2e-5)
    for name in ("logprob", "entropy", "lse", *(["region_entropy"] if region else [])):
        assert torch.equal(found[name][ignored], torch.zeros(len(ignored))), name
    assert not found["d hidden"][ignored].any()
    assert not found["d side_hidden"][ignored].any()
    if len(ignored) == 13:
        assert not found["d weight"].any()
        assert not found["d bias"].any()


def test_zero_upstream_gives_exact_zeros():
    case = make_case(9, 131, 40, bias=True, region=TopP(0.9))
    grads = upstreams(case)
    for grad in grads.values():
        grad[[2, 5]] = 0.0
    found = run(fused, case, grads)
    assert not found["d hidden"][[2, 5]].any()
    assert found["d hidden"].any(dim=1).sum() == 7


# ---------------------------------------------------------------------- repeatability and chunks


@pytest.mark.parametrize("region", REGIONS)
def test_two_runs_are_bitwise_equal(region):
    case = make_case(300, 1500, 16, torch.bfloat16, bias=True, region=region)
    runs = [run(partial(fused, workspace_mb=1), case, upstreams(case)) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("sizes", [(4, 128, 4), (4 * 131 * 5, 7, 13), (4 * 131 * 40, 1, 1)])
def test_chunks_do_not_matter(tiny_workspace, dtype, region, sizes):
    """Forward chunks of rows, slices of the vocabulary, several blocks of rows in a slice."""
    case = make_case(13, 131, 40, dtype, bias=True, rank=3, region=region)
    grads = upstreams(case)
    whole = run(fused, case, grads)
    tiny_workspace(*sizes)
    cut = run(fused, case, grads)
    # 3 steps of float32 at the size of the largest logit (about 8), as products of other shapes
    # round otherwise on other CPUs; one rounding of gradients
    step = {name: 3 * 8 * torch.finfo(torch.float32).eps for name in whole}
    if dtype == torch.bfloat16:
        step |= {name: torch.finfo(dtype).eps for name in whole if name.startswith("d ")}
    for name, worst in errors(cut, whole).items():
        assert worst <= step[name], (name, worst)


@pytest.mark.parametrize("region", REGIONS)
def test_real_workspaces_cut_in_several_ways(region):
    """1 MiB: 4 chunks forward, 3 slices and 2 blocks backward, without touching the code."""
    case = make_case(300, 2500, 16, bias=True, region=region)
    slices = load_kernels("backward").slices
    make_problem = load_kernels("fields").make_problem
    problem = make_problem(
        *(case.hidden, case.weight, case.targets, None, None, None, 1.0, 2500, "", False, False),
        2**20,
    )
    assert slices(problem, 4) == (1024, 256)
    grads = upstreams(case)
    small = run(partial(fused, workspace_mb=1), case, grads)
    assert_close(small, truth(case, grads), 2e-5)


def test_table_has_every_column(capsys):
    """The table of this repository's documentation; its numbers are asserted above."""
    accuracy.main(["--backend", "torch", "--dtype", "float64", "float32"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].split("|")[3:-1] == [f" {name} " for name in accuracy.COLUMNS]
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["float64", "float32"]
    for line, bound in zip(lines[2:], (1e-10, 2e-5), strict=True):
        own = [float(cell.split("/")[0]) for cell in line.split("|")[3:-1]]
        assert all(value <= bound for value in own)  # NaN is not
