"""No tensor of N x V elements is ever made, and what is kept is small (card 11.7).

Allocations are read from PyTorch's profiler, which sees those inside a custom op as well (a
``TorchDispatchMode`` sees the op as one call).
"""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_modules.ops import (
    TopK,
    TopP,
    linear_cross_entropy,
    load_kernels,
    logprob_entropy_from_logits,
)
from tests.kernels.cases import REGIONS, fused, make_case
from tests.runs import REPO, call, environment

N, V, H = 128, 32768, 8
LOGITS = N * V


def allocations(function):
    """Largest allocation and largest sum of living ones, in bytes, while ``function`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    living = most = 0
    for event in events:
        living += event.nbytes()
        most = max(most, living)
    del result
    return max(event.nbytes() for event in events), most


def head_step(case, **options):
    """Forward and backward of everything."""
    case = case.fresh()
    out = fused(case, **options)
    sum(out[n].sum() for n in ("logprob", "entropy", "region_entropy") if n in out).backward()


def loss_step(case, **options):
    case = case.fresh()
    more = {"label_smoothing": 0.1, "z_loss": 0.1, "return_stats": True, "bias": case.bias}
    loss, _ = linear_cross_entropy(
        case.hidden, case.weight, case.targets, side=case.side, **more, **options
    )
    loss.backward()


@pytest.mark.parametrize(("dtype", "ignored"), [(torch.float32, 20), (torch.bfloat16, 0)])
@pytest.mark.parametrize("region", REGIONS)
def test_no_tensor_as_large_as_the_logits(dtype, region, ignored):
    scale = 0.3 if ignored else 2.0  # flat rows are sorted as a whole
    case = make_case(N, V, H, dtype, region=region, scale=scale, bias=True, rank=2)
    case.targets[:ignored] = -100
    largest, _ = allocations(partial(head_step, case, workspace_mb=1))
    assert largest < LOGITS / 4 * case.hidden.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_makes_none_either(dtype):
    case = make_case(N, V, H, dtype, bias=True, rank=2)
    largest, _ = allocations(partial(loss_step, case, workspace_mb=1))
    assert largest < LOGITS / 4 * case.hidden.element_size()


def test_the_plain_path_does():
    """So that the measure is known to see it."""
    case = make_case(N, V, H)
    largest, most = allocations(partial(head_step, case, backend="reference"))
    assert largest >= LOGITS * 4
    assert most >= 3 * largest


@pytest.mark.parametrize("region", [None, TopP(0.9)])
def test_peak_follows_the_workspace(region):
    """Gradients and copies of the inputs, then what ``workspace_mb`` says, sorting included."""
    case = make_case(N, V, H, region=region)
    inputs = (case.hidden.nbytes + case.weight.nbytes) * 2
    peaks = [
        allocations(partial(head_step, case, workspace_mb=size))[1] - inputs for size in (1, 4)
    ]
    rest = N * 150 + 2**20  # row quantities; blocks of 1 MiB
    for size, peak in zip((1, 4), peaks, strict=True):
        assert peak <= 3 * size * 2**20 + rest + 3 * 2**20, (size, peak / 2**20)
    assert peaks[1] > peaks[0]


@pytest.mark.parametrize("region", REGIONS)
def test_little_is_kept_for_the_backward_pass(region):
    """Inputs, and a few numbers a row; with ``no_grad`` nothing."""
    case = make_case(N, V, H, bias=True, rank=2, region=region).fresh()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            assert not fused(case)["logprob"].requires_grad
            linear_cross_entropy(case.hidden, case.weight, case.targets)
        assert kept == []
        fused(case)
    leaves = {leaf.data_ptr() for leaf in (*case.leaves().values(), case.targets)}
    own = [tensor for tensor in kept if tensor.data_ptr() not in leaves]
    assert len(own) < len(kept)
    assert sum(tensor.nbytes for tensor in own) <= N * (17 * 4 + 8 * 12 + 8)


# ------------------------------------------------------------------------------ existing logits


@pytest.mark.parametrize(
    ("region", "dtype", "ignored"),
    [
        (None, torch.bfloat16, 0),
        (None, torch.float32, 50),
        (TopK(8), torch.bfloat16, 0),
        (TopP(0.9), torch.float32, 50),
    ],
)
def test_no_second_buffer_of_the_logits(monkeypatch, region, dtype, ignored):
    """In place nothing of their size is made at all; otherwise only their gradient is."""
    monkeypatch.setattr(load_kernels("logits_ops"), "_logits_rows", lambda _: 4)
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.zeros(N, dtype=torch.int64)
    targets[:ignored] = -100

    def step(inplace):
        leaf = logits.detach().requires_grad_()
        out = logprob_entropy_from_logits(leaf, targets, region=region, inplace_backward=inplace)
        total = out.logprob.sum() + out.entropy.sum()
        if region is not None:
            total = total + out.region_entropy.sum()
        torch.autograd.grad(total, leaf)

    largest, most = allocations(partial(step, False))
    assert largest == logits.nbytes
    assert most < 2 * logits.nbytes + 2**21
    saved = logits.clone()
    largest, _ = allocations(partial(step, True))
    assert largest < logits.nbytes / 4
    assert not torch.equal(saved, logits)


# ------------------------------------------------------------------------- a measure from outside

PEAK = """
import sys, torch
from tests.kernels.cases import Case, fused
torch.set_num_threads(1)
def make(n, v, h):
    return Case(torch.randn(n, h), torch.randn(v, h) / h**0.5, torch.zeros(n).long()).fresh()
def step(case):
    out = fused(case, sys.argv[1])
    (out["logprob"].sum() + out["entropy"].sum()).backward()
def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
step(make(64, 2048, 8))
case = make(2048, 32768, 512)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = memory("VmRSS")
step(case)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_a_process_is_a_quarter_of_the_plain_path():
    """What the system says, in KiB; logits are 256 MiB, the weight's gradient is 64 MiB."""
    peaks = {}
    for backend in ("torch", "reference"):
        result = call(sys.executable, "-c", PEAK, backend, env=environment(PYTHONPATH=str(REPO)))
        assert result.returncode == 0, result.stderr
        peaks[backend] = int(result.stdout.strip())
    assert peaks["reference"] > 2 * 2**18  # two tensors of N x V float32 at least
    assert peaks["torch"] <= peaks["reference"] / 4, peaks
