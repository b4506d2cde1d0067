"""Values and gradients of the Triton kernels against float64, case by case.

On a CPU one process with the interpreter checks all cases, and each test reads the result of its
own; on a GPU the tests run in this process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_table import CASES, EXTRA

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What is wrong with every case, by its name; empty where nothing is."""
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_table.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *EXTRA])
def test_interpreted(name, interpreted):
    assert not interpreted[name], interpreted[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    triton_cases.check(CASES[name], "cuda", interpret=False)


def test_the_interpreter_must_be_chosen_before_the_import():
    backend = triton_cases.kernels("triton_backend")
    if backend.IS_INTERPRETED:
        pytest.skip("this process was started with TRITON_INTERPRET=1")
    problem, _ = triton_cases.build(CASES["plain"], "cpu")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 in the environment before"):
        backend.forward(problem, interpret=True)
