"""One test named after every trap that other fused heads fell into (card, section 15).

==========================================================  =====================================
trap                                                        test
==========================================================  =====================================
entropy returned, its gradient dropped in backward          test_entropy_gradient_dropped
running sums of dW and dX in bfloat16                       test_bfloat16_running_sums
a running maximum that starts at 0                          test_running_maximum_starting_at_zero
vocabulary tail not masked                                  test_unmasked_tail
outputs of ignored rows not initialised                     test_uninitialised_outputs
H has to be a multiple of 128                               test_width_not_a_multiple_of_128
equal vocabulary shards assumed                             test_vocab_shards.py
token weights applied after the sum over tokens             test_token_weights_after_the_sum
two fused heads patched at once                             test_head.py
adapters bypassed by reading the weight                     test_head_lora.py
DTensor weight                                              test_bad_input.py::test_sharded_tensors
autotuning kernels that change their inputs                 test_autotune_over_mutating_kernels
one block for 64k columns                                   test_one_block_for_a_wide_row
grid dimension overflow at 65536 rows                       test_grid_overflow_at_many_rows
==========================================================  =====================================

The Triton kernels have the same traps in test_triton_*.py; here PyTorch's back ends go through them
and the kernels' source is read.
"""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_modules.ops import TopK, TopP, linear_cross_entropy, load_kernels
from tests.kernels.cases import (
    REGIONS,
    Case,
    assert_close,
    exact,
    fused,
    make_case,
    op_outputs,
    run,
    truth,
    upstreams,
)

BACKENDS = ("torch", "reference")
REPO = Path(__file__).resolve().parents[2]
TRITON = sorted((REPO / "kernels").glob("triton_*.py"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["entropy", "region_entropy"])
def test_entropy_gradient_dropped(backend, name):
    """Alone, so that the log-prob's gradient cannot hide that it is missing; for every leaf."""
    case = make_case(9, 131, 24, bias=True, rank=3, region=TopP(0.9))
    grads = {name: upstreams(case)[name]}
    found, wanted = run(partial(fused, backend=backend), case, grads), truth(case, grads)
    for leaf in case.leaves():
        assert wanted[f"d {leaf}"].abs().max() > 1e-2
    assert_close(found, wanted, 2e-5)


def test_bfloat16_running_sums(monkeypatch):
    """64 partial sums, over slices or blocks, are rounded once at the end, as a single sum is.

    The z-loss makes all terms positive, but those of the target: the worst case of a running sum.
    """
    case = make_case(512, 512, 8, torch.bfloat16, bias=True, rank=2)
    for leaf in case.leaves().values():
        leaf.abs_()
    case.targets[:] = 3

    def ours(case):
        return {
            "loss": linear_cross_entropy(
                *(case.hidden, case.weight, case.targets),
                **{"bias": case.bias, "side": case.side, "backend": "torch"},
                **{"z_loss": 10.0, "reduction": "sum"},
            )
        }

    def defined(case):
        found = exact(case)
        return {"loss": (10.0 * found["lse"] ** 2 - found["logprob"]).sum()}

    grads = {"loss": torch.tensor(1.0)}
    wanted = run(defined, case.fresh(torch.float64), grads)
    monkeypatch.setattr(load_kernels("backward"), "slices", lambda *_: (8, 8))
    found = run(ours, case, grads)
    half_a_step = torch.finfo(torch.bfloat16).eps / 2
    for name in case.leaves():
        own, right = found[f"d {name}"].double(), wanted[f"d {name}"]
        allowed = half_a_step * right.abs() + 1e-5 * right.abs().max()
        assert ((own - right).abs() <= allowed).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", [*REGIONS, TopK(1)])
@pytest.mark.parametrize("level", [-120.0, -5000.0])
def test_running_maximum_starting_at_zero(backend, region, level):
    """``exp(-120)`` is 0 in float32: a maximum of 0 gives ``log 0``."""
    case = make_case(7, 1100, 8, torch.float64, bias=True, region=region)
    case.bias += level
    grads = upstreams(case)
    assert_close(run(partial(fused, backend=backend), case, grads), truth(case, grads), 1e-10)
    single = case.fresh(torch.float32)
    with torch.no_grad():
        out = fused(single, backend)
    assert all(value.isfinite().all() for value in out.values())
    assert (out["lse"] < level / 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("v", [127, 129, 1023, 1025])
def test_unmasked_tail(monkeypatch, backend, region, v):
    """Columns past the last and past ``vocab_limit`` count nothing, though these would win."""
    monkeypatch.setattr(load_kernels("backward"), "slices", lambda *_: (128, 4))
    case = make_case(7, v, 8, bias=True, scale=0.3, region=region)
    case.bias -= 60.0
    grads = upstreams(case)
    wanted = run(partial(fused, backend=backend), case, grads)
    assert_close(wanted, truth(case, grads), 2e-5)
    more = Case(
        case.hidden,
        torch.cat([case.weight, torch.full((50, 8), 9.0)]),
        case.targets,
        torch.cat([case.bias, torch.full((50,), 1e4)]),
        options={**case.options, "vocab_limit": v},
    )
    found = run(partial(fused, backend=backend), more, grads)
    assert not found["d weight"][v:].any()
    assert not found["d bias"][v:].any()
    found["d weight"], found["d bias"] = found["d weight"][:v], found["d bias"][:v]
    assert_close(found, wanted, 1e-6)


@pytest.fixture
def poisoned_memory():
    """Memory that nobody has written holds NaN, or the largest integer."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    assert fill
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("region", [*REGIONS, TopP(0.9, preserve_mass=True)])
@pytest.mark.parametrize("ignored", [[], [0, 5, 8], list(range(9))], ids=["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_outputs(poisoned_memory, monkeypatch, region, ignored, dtype):
    monkeypatch.setattr(load_kernels("backward"), "slices", lambda *_: (50, 4))
    case = make_case(9, 131, 24, dtype, bias=True, rank=3, region=region, vocab_limit=120)
    case.targets[ignored] = -100
    found = run(fused, case, upstreams(case))
    for name, value in found.items():
        assert value.isfinite().all(), name
        if name[:2] != "d ":
            assert not value[ignored].any(), name
    outputs = op_outputs(case, with_mean=True, with_argmax=True)
    for name, value in outputs.items():
        assert value.double().isfinite().all(), name
        if value.numel():
            assert not value[ignored].any(), name
            assert value.abs().max() < 2**31 - 1, name
    loss, stats = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"label_smoothing": 0.1, "z_loss": 0.1, "return_stats": True, "backend": "torch"},
    )
    assert loss.isfinite()
    assert all(value.isfinite().all() for value in stats)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("h", [1, 7, 96, 129, 200])
def test_width_not_a_multiple_of_128(backend, h):
    case = make_case(9, 131, h, bias=True, region=TopK(3))
    grads = upstreams(case)
    assert_close(run(partial(fused, backend=backend), case, grads), truth(case, grads), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_token_weights_after_the_sum(backend, reduction):
    """Each token's gradient is scaled by its own weight; one of weight 0 moves nothing."""
    case = make_case(9, 131, 24, torch.float64).fresh()
    weights = torch.arange(9.0, dtype=torch.float64)
    loss = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"token_weights": weights, "reduction": reduction, "backend": backend},
    )
    found = torch.autograd.grad(loss.sum(), case.hidden)[0]
    plain = exact(case)["logprob"]
    each = -torch.autograd.grad(plain.sum(), case.hidden)[0]
    divided = weights.sum() if reduction == "mean" else 1.0
    assert torch.allclose(found, each * weights[:, None] / divided, atol=1e-12)
    assert not found[0].any()


def pointers(function, name):
    """The first operand of every ``tl.<name>`` in a kernel: what is read or written."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(f"tl.{name}"):
            pointer = node.args[0]
            while isinstance(pointer, ast.BinOp):
                pointer = pointer.left
            found.add(ast.unparse(pointer))
    return found


def kernels(path):
    """Functions of a file that Triton compiles."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.name)
def test_autotune_over_mutating_kernels(path):
    """A kernel reads nothing that it writes and adds nothing up in memory, so it may run again."""
    assert "triton.autotune" not in path.read_text(encoding="utf-8")
    for kernel in kernels(path):
        assert not pointers(kernel, "atomic"), kernel.name
        assert not pointers(kernel, "load") & pointers(kernel, "store"), kernel.name


def test_kernels_write_at_all():
    """So that the test above is known to see the kernels."""
    written = set().union(*(pointers(k, "store") for path in TRITON for k in kernels(path)))
    assert len(written) >= 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("region", REGIONS)
def test_one_block_for_a_wide_row(backend, region):
    """In float64: sums over so many columns cancel."""
    case = make_case(2, 70_000, 4, torch.float64, bias=True, region=region)
    case.targets[1] = 69_999
    grads = upstreams(case)
    assert_close(run(partial(fused, backend=backend), case, grads), truth(case, grads), 1e-10)


def test_grid_overflow_at_many_rows():
    """More rows than the second dimension of a CUDA grid has; the kernels use the first alone."""
    n = 66_000
    case = make_case(n, 5, 3, torch.float64, region=TopK(2))
    grads = upstreams(case)
    found = run(fused, case, grads)
    assert_close(found, truth(case, grads), 1e-10)
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets, backend="torch")
    wanted = torch.nn.functional.cross_entropy(case.hidden @ case.weight.T, case.targets)
    assert torch.allclose(loss, wanted, rtol=1e-12)
    for path in TRITON:
        source = path.read_text(encoding="utf-8")
        assert "program_id(1)" not in source
        assert "program_id(2)" not in source
