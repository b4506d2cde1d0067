"""The kernels become machine code for every generation in the tables, without a GPU.

The interpreter accepts much that the compiler does not; and a row block on grid axis y, too much
shared memory or a product that misses the tensor cores would only show on a large problem.
"""

from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

from lightning_modules.ops import TopK, TopP, load_kernels  # noqa: E402
from tests.kernels import triton_cases  # noqa: E402
from tests.kernels.triton_offline import Recorder  # noqa: E402

KERNELS = ("forward_kernel", "fill_kernel", "row_kernel", "nucleus_kernel")
CASES = {
    "lean": triton_cases.Case((300, 1024, 256), torch.bfloat16, bias=False, extras=False),
    "top 2": triton_cases.Case((300, 1000, 256), torch.float16, ("TopK", {"k": 2})),
    "nucleus": triton_cases.Case(
        (3, 1000, 250), torch.bfloat16, ("TopP", {"p": 0.9, "preserve_mass": True}), side=20,
        temperature=0.7,
    ),
    "single": triton_cases.Case((300, 1000, 256), torch.float32),
}  # fmt: skip


def compiled(case, capability, monkeypatch):
    """Everything that forward and fill launch for a case, compiled."""
    backend, tuning = load_kernels("triton_backend"), load_kernels("tuning")
    if backend.IS_INTERPRETED:
        pytest.skip("this process was started with TRITON_INTERPRET=1")
    found = []
    for name in KERNELS:
        recorder = Recorder(getattr(backend, name), capability, found)
        monkeypatch.setattr(backend, name, recorder)
    generation = divmod(capability, 10)
    blocks = asdict(tuning.shipped("forward", 8192, case.dtype, generation)) | {"splits": 3}
    region = asdict(tuning.shipped("region", 8192, case.dtype, generation))
    problem, _ = triton_cases.build(case, "cpu")
    n, v = case.shape[:2]
    row = torch.zeros(n)
    inside = row if case.region is not None and case.region[0] == "TopP" else None
    terms = load_kernels("problem").Coefficients(row, row, row, row, inside, inside, None)
    with tuning.override(forward=blocks, backward=blocks, region=region):
        stats = backend.forward(problem, interpret=False)
        backend.fill(
            problem, stats, terms, 0, n, 0, v, torch.empty(n, v, dtype=case.dtype), interpret=False
        )
    limit = tuning.SHARED_MEMORY[tuning.generation(generation)]
    assert all(kernel.metadata.shared <= limit for kernel in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "name"),
    [(80, "lean"), (80, "single"), (89, "nucleus"), *((90, name) for name in CASES), (100, "lean")],
)
def test_compiles(capability, name, monkeypatch):
    kernels = compiled(CASES[name], capability, monkeypatch)
    expected = 3 if name == "nucleus" else 2
    assert len(kernels) == expected
    assert all(kernel.asm["cubin"] for kernel in kernels)


@pytest.mark.slow
def test_hopper_uses_its_tensor_cores(monkeypatch):
    for kernel in compiled(CASES["lean"], 90, monkeypatch):
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert "atom" not in kernel.asm["ptx"], "atomics make the order of a sum random"


def test_regions_are_those_of_the_public_functions():
    """The cases name regions by their classes; both loaders give the same."""
    assert (TopK, TopP) == (load_kernels("regions").TopK, load_kernels("regions").TopP)
