"""The cases of ``triton_cases.py``, and those that compare two runs. Run as a program: all."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.kernels import triton_cases as t
from tests.kernels.triton_cases import BRAIN, HALF, PIECES, SINGLE, Case, kernels, top_k, top_p

LARGE: dict[str, dict[str, int]] = {}
TINY_BUFFER = PIECES | {"region": {"block_n": 128, "warps": 4, "capacity": 4}}
ONE_BLOCK = {"region": {"block_n": 1024}}

CASES = {
    # sizes and types
    "plain": Case(blocks=LARGE),
    "plain pieces": Case((37, 131, 40)),
    "one row": Case((1, 17, 8)),
    "wide": Case((5, 1000, 33), blocks={k: v | {"block_n": 128} for k, v in PIECES.items()}),
    "ragged": Case((37, 17, 33)),
    "bfloat16": Case((37, 131, 33), dtype=BRAIN),
    "float16": Case((37, 131, 33), dtype=HALF),
    "lean": Case(extras=False, bias=False),
    "transposed": Case(edit=t._transpose),
    "more splits than tiles": Case(blocks=PIECES | {"forward": t.SMALL | {"splits": 9}}),
    # what the logits are made of
    "cold": Case(temperature=0.1, tolerance=1e-4),
    "hot": Case(temperature=10.0),
    "side": Case(side=3),
    "side of 40": Case(side=40, dtype=BRAIN, temperature=0.7),
    "limit": Case((5, 150, 40), limit=19, side=2),
    # numbers that go wrong
    "tail near -50": Case((5, 131, 8), edit=t._near_minus_fifty),
    "tail near -50, one tile": Case((5, 131, 8), edit=t._near_minus_fifty, blocks=LARGE),
    "offset 1e4": Case(edit=t._offset(1e4), tolerance=2e-3),
    "offset -1e4": Case(edit=t._offset(-1e4), tolerance=2e-3),
    "some impossible": Case(edit=t._excluded(3, 9)),
    "tile impossible": Case(edit=t._excluded(32, 64)),
    "split impossible": Case(edit=t._excluded(64, 128)),
    "first split impossible": Case(edit=t._excluded(0, 70)),
    "nearly all impossible": Case(edit=t._excluded(0, 129), region=top_k(4)),
    "all impossible": Case(edit=t._excluded(0, 131), broken=(0, 1, 2, 3, 4)),
    "row impossible": Case(edit=t._row(-math.inf), broken=(2,)),
    "row +inf": Case(edit=t._row(math.inf), broken=(2,), noisy=True),
    "row NaN": Case(edit=t._row(math.nan), broken=(2,), noisy=True),
    "one NaN": Case(edit=t._one_nan, broken=(0, 1, 2, 3, 4), noisy=True),
    "one hot": Case(edit=t._one_hot, tolerance=2e-3),
    "uniform": Case(edit=t._uniform),
    "ties": Case((37, 131, 8), exact=True),
    # TopK
    "top 1": Case(region=top_k(1)),
    "top 2": Case(region=top_k(2, preserve_mass=True)),
    "top 2 bfloat16": Case((37, 131, 40), dtype=BRAIN, region=top_k(2)),
    "top 8": Case(region=top_k(8)),
    "top 8 one tile": Case(region=top_k(8, preserve_mass=True), blocks=LARGE),
    "top 64": Case(region=top_k(64)),
    "top 2 ties": Case((37, 131, 8), exact=True, region=top_k(2)),
    "top 8 ties": Case((37, 131, 8), exact=True, region=top_k(8)),
    "top 3 uniform": Case(edit=t._uniform, region=top_k(3)),
    "top 4 late": Case(
        edit=t._late_maxima, region=top_k(4), blocks=PIECES | {"forward": t.SMALL | {"splits": 1}}
    ),
    "top 5 late": Case(
        edit=t._late_maxima, region=top_k(5), blocks=PIECES | {"forward": t.SMALL | {"splits": 1}}
    ),
    "top 8 of 17": Case((5, 17, 8), region=top_k(8)),
    "top 64 ties": Case(exact=True, region=top_k(64)),
    "top 5 row NaN": Case(edit=t._row(math.nan), broken=(2,), noisy=True, region=top_k(5)),
    # TopP
    "nucleus .5": Case((3, 131, 40), region=top_p(0.5)),
    "nucleus .9": Case((3, 131, 40), region=top_p(0.9, preserve_mass=True)),
    "nucleus .99": Case((3, 131, 40), region=top_p(0.99), dtype=BRAIN, temperature=0.7, side=3),
    "nucleus wide": Case((3, 1000, 33), region=top_p(0.9), blocks=ONE_BLOCK),
    "nucleus in chunks": Case((3, 131, 40), region=top_p(0.9), workspace=2200),
    "nucleus overflow": Case((3, 131, 40), region=top_p(0.99), blocks=TINY_BUFFER),
    "nucleus flat": Case((2, 131, 8), edit=t._spread_evenly, region=top_p(0.9)),
    "nucleus flat overflow": Case(
        (2, 131, 8), edit=t._spread_evenly, region=top_p(0.9), blocks=TINY_BUFFER
    ),
    "nucleus max 2": Case((3, 131, 40), region=top_p(0.99, max_size=2)),
    "nucleus max 1": Case((3, 131, 40), region=top_p(0.99, max_size=1)),
    "nucleus max 100": Case((3, 131, 40), region=top_p(0.9, max_size=100, preserve_mass=True)),
    "nucleus ties": Case((3, 131, 40), exact=True, region=top_p(0.9), temperature=4.0),
    "nucleus ties include": Case(
        (3, 131, 40),
        exact=True,
        region=top_p(0.9, ties="include", preserve_mass=True),
        temperature=4.0,
    ),
    "nucleus ties overflow": Case(
        (3, 131, 40),
        exact=True,
        region=top_p(0.5, preserve_mass=True),
        temperature=4.0,
        blocks=TINY_BUFFER,
    ),
    "nucleus ties max": Case(
        (3, 131, 40), exact=True, region=top_p(0.99, max_size=7), temperature=4.0
    ),
    "nucleus ties max include": Case(
        (3, 131, 40), exact=True, region=top_p(0.99, max_size=7, ties="include"), temperature=4.0
    ),
    "nucleus uniform": Case((2, 131, 8), edit=t._uniform, region=top_p(0.5)),
    "nucleus uniform include": Case(
        (2, 131, 8), edit=t._uniform, region=top_p(0.5, ties="include")
    ),
    "nucleus one hot": Case((3, 131, 40), edit=t._one_hot, region=top_p(0.99), tolerance=2e-3),
    "nucleus near -50": Case((3, 131, 8), edit=t._near_minus_fifty, region=top_p(0.9)),
    "nucleus offset": Case((3, 131, 40), edit=t._offset(1e4), region=top_p(0.9), tolerance=2e-3),
    "nucleus impossible": Case((3, 131, 40), edit=t._excluded(0, 70), region=top_p(0.99)),
    "nucleus row impossible": Case(
        (3, 131, 40), edit=t._row(-math.inf), broken=(2,), region=top_p(0.9)
    ),
    "nucleus row +inf": Case(
        (3, 131, 40), edit=t._row(math.inf), broken=(2,), noisy=True, region=top_p(0.9)
    ),
    "nucleus row NaN": Case(
        (3, 131, 40), edit=t._row(math.nan), broken=(2,), noisy=True, region=top_p(0.9)
    ),
    "nucleus one NaN": Case(
        (3, 131, 40), edit=t._one_nan, broken=(0, 1, 2), noisy=True, region=top_p(0.9)
    ),
    "nucleus just rejected": Case((2, 17, 8), edit=t._just_rejected, region=top_p(0.9)),
    "nucleus limit": Case((3, 150, 40), limit=19, region=top_p(0.9), extras=False),
}


# ------------------------------------------------------------------------- two runs, or no rows


def _stats(case: Case, **blocks: dict[str, int]) -> Any:
    with kernels("tuning").override(**(case.blocks | blocks)):
        problem, _ = t.build(case, "cpu")
        return kernels("triton_backend").forward(problem, interpret=True)


def _tensors(stats: Any) -> dict[str, torch.Tensor]:
    own = {k: v for k, v in vars(stats).items() if k != "region"}
    region = {} if stats.region is None else vars(stats.region)
    return own | {f"region.{name}": value for name, value in region.items()}


def splits_agree() -> None:
    """1 against 7 splits: the same maximum, members and target, sums within 2 ulp."""
    for case in (Case((37, 260, 33), region=top_k(4)), Case(edit=t._offset(1e4))):
        few, many = (
            _tensors(_stats(case, forward=t.SMALL | {"splits": splits})) for splits in (1, 7)
        )
        for name, value in few.items():
            if name in ("log_sum", "entropy", "mean", "region.log_sum", "region.entropy"):
                eps = torch.finfo(SINGLE).eps
                largest = torch.maximum(value.abs(), few["log_sum"]).clamp(min=1)
                assert ((value - many[name]).abs() <= 2 * eps * largest).all(), name
            else:
                torch.testing.assert_close(value, many[name], rtol=2.4e-7, atol=1e-6, msg=name)


def runs_agree() -> None:
    """Two runs are equal bit by bit."""
    for region in (None, top_k(4), top_p(0.9)):
        case = Case(region=region)
        first, second = _tensors(_stats(case)), _tensors(_stats(case))
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def backends_agree() -> None:
    """The PyTorch back end finds the same regions, ties and thresholds included."""
    for region in (
        *(top_k(4), top_p(0.9), top_p(0.7, ties="include"), top_p(0.99, max_size=9)),
        *(top_p(0.5, preserve_mass=True), top_p(0.9, max_size=7, ties="include")),
    ):
        for exact in (False, True):
            case = Case(region=region, exact=exact, temperature=4.0, blocks=ONE_BLOCK)
            ours = _tensors(_stats(case))
            problem, _ = t.build(case, "cpu")
            theirs = _tensors(kernels("torch_backend").forward(problem))
            for name, value in theirs.items():
                assert ours[name].dtype == value.dtype, name
                t.close(name, ours[name], value, 1e-5)


def no_rows() -> None:
    """Nothing in, nothing out, with the shapes and types of something."""
    for region in (None, top_k(2), top_p(0.9)):
        case = Case((0, 17, 8), region=region)
        empty, one = _tensors(_stats(case)), _tensors(_stats(Case((1, 17, 8), region=region)))
        for name, value in empty.items():
            assert value.shape[0] == 0 and value.dtype == one[name].dtype, name
            assert value.shape[1:] == one[name].shape[1:] or not one[name].numel(), name
        problem, _ = t.build(case, "cpu")
        none = torch.empty(0)
        terms = kernels("problem").Coefficients(none, None, none, None, None, None, None)
        stats = kernels("triton_backend").forward(problem, interpret=True)
        kernels("triton_backend").fill(
            problem, stats, terms, 0, 0, 0, 17, torch.empty(0, 17), interpret=True
        )


def refused() -> None:
    """What the kernels cannot do is said."""
    backend = kernels("triton_backend")
    problem, _ = t.build(Case((2, 17, 8)), "cpu")
    stats = backend.forward(problem, interpret=True)
    one = torch.ones(2)
    terms = kernels("problem").Coefficients(one, None, one, None, None, None, None)
    double, _ = t.build(Case((2, 17, 8), dtype=torch.float64), "cpu")
    for error, text, call in (
        (RuntimeError, "TRITON_INTERPRET", lambda: backend.forward(problem, interpret=False)),
        (TypeError, "float64", lambda: backend.forward(double, interpret=True)),
        (ValueError, "vocab_limit", lambda: _fill(backend, problem, stats, terms, 18, 18)),
        (ValueError, "contiguous", lambda: _fill(backend, problem, stats, terms, 17, 16)),
    ):
        try:
            call()
        except error as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError(f"no {error.__name__} about {text}")


def _fill(backend: Any, problem: Any, stats: Any, terms: Any, v1: int, width: int) -> None:
    backend.fill(problem, stats, terms, 0, 2, 0, v1, torch.empty(2, width), interpret=True)


EXTRA = {
    "splits agree": splits_agree,
    "runs agree": runs_agree,
    "back ends agree": backends_agree,
    "no rows": no_rows,
    "refused": refused,
}

if __name__ == "__main__":
    t.main()
