"""Problems for the Triton kernels, float64 oracles for them, and the comparison.

Run as a program with ``TRITON_INTERPRET=1`` it checks every case on the CPU and prints JSON: the
interpreter is chosen when the kernels are imported, so it has a process of its own. On a GPU
``test_triton_kernels.py`` calls ``check`` in its own process.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
#: Many tiles and splits for little work.
SMALL = {"block_m": 16, "block_n": 32, "block_k": 16}
PIECES = {
    "forward": SMALL | {"splits": 3, "group": 2},
    "backward": SMALL | {"group": 2},
    "region": {"block_n": 128, "warps": 4},
}


@dataclass
class Case:
    """One problem.

    Args:
        shape: N, V and H.
        dtype: Of all inputs.
        region: Class name and keywords, or None.
        blocks: Overrides of the kernels' blocks.
        temperature: Divides the logits.
        side: Rank of the low-rank term, or 0.
        limit: Columns left out at the end.
        extras: Ask for the mean and the argmax too.
        bias: Whether there is one.
        edit: Changes the inputs in place, a dict by the names of ``Problem``.
        exact: Integer inputs, so that equal logits are equal in every order of summation.
        tolerance: Of values, relative to ``max(1, |value|)``.
        broken: Rows that must be NaN throughout.
        noisy: Whether NumPy may warn of invalid values.
        workspace: Bytes.
    """

    shape: tuple[int, int, int] = (5, 131, 40)
    dtype: torch.dtype = SINGLE
    region: tuple[str, dict[str, Any]] | None = None
    blocks: dict[str, dict[str, int]] = field(default_factory=lambda: PIECES)
    temperature: float = 1.0
    side: int = 0
    limit: int = 0
    extras: bool = True
    bias: bool = True
    edit: Callable[[dict[str, Any]], None] | None = None
    exact: bool = False
    tolerance: float = 2e-5
    broken: tuple[int, ...] = ()
    noisy: bool = False
    workspace: int = 2**20


def top_k(k: int, **options: Any) -> tuple[str, dict[str, Any]]:
    return "TopK", {"k": k} | options


def top_p(p: float, **options: Any) -> tuple[str, dict[str, Any]]:
    return "TopP", {"p": p} | options


# ---------------------------------------------------------------------------------------- inputs


def _offset(value: float) -> Callable[[dict[str, Any]], None]:
    def edit(given: dict[str, Any]) -> None:
        given["bias"] += value

    return edit


def _excluded(first: int, last: int) -> Callable[[dict[str, Any]], None]:
    """Columns ``first:last`` are impossible, except for the targets' own."""

    def edit(given: dict[str, Any]) -> None:
        given["bias"][first:last] = -math.inf

    return edit


def _near_minus_fifty(given: dict[str, Any]) -> None:
    given["weight"] *= 0.02
    given["bias"].fill_(-50)


def _one_hot(given: dict[str, Any]) -> None:
    given["bias"][7] = 1e4


def _uniform(given: dict[str, Any]) -> None:
    given["weight"].zero_()
    given["bias"].fill_(3)


def _late_maxima(given: dict[str, Any]) -> None:
    """Equal logits first, larger ones in later tiles: of the equal ones the highest ids must go."""
    given["weight"].zero_()
    given["bias"].fill_(-1)
    given["bias"][[1, 7, 9, 20]] = 5
    given["bias"][[40, 70, 71]] = 6


def _one_nan(given: dict[str, Any]) -> None:
    given["weight"][70 % len(given["weight"])] = math.nan
    given["targets"].clamp_(max=60)


def _just_rejected(given: dict[str, Any]) -> None:
    """For ``p=0.9`` all candidates are in the nucleus, and the next tokens are close behind."""
    given["weight"].zero_()
    given["bias"].fill_(math.log(0.0058))
    given["bias"][3], given["bias"][5] = math.log(0.0135), math.log(0.8995)


def _spread_evenly(given: dict[str, Any]) -> None:
    """Logits 0, -0.01, -0.02 ...: many candidates, no ties, for every nucleus."""
    given["weight"].zero_()
    given["bias"].copy_(-0.01 * torch.randperm(len(given["bias"]), generator=_generator(1)))


def _row(value: float) -> Callable[[dict[str, Any]], None]:
    """Row 2 has this value where all weights are positive: all its logits are it."""

    def edit(given: dict[str, Any]) -> None:
        given["weight"][:, 0] = given["weight"][:, 0].abs() + 0.25
        given["hidden"][2, 0] = value

    return edit


def _transpose(given: dict[str, Any]) -> None:
    given["hidden"] = given["hidden"].T.contiguous().T
    given["weight"] = given["weight"].T.contiguous().T


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(case: Case, device: str) -> dict[str, Any]:
    """Keyword arguments of ``Problem``, without the region."""
    n, v, h = case.shape
    generator = _generator(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if case.exact:
            return torch.randint(-2, 3, shape, generator=generator).to(case.dtype)
        return (torch.randn(shape, generator=generator) * scale).to(case.dtype)

    given: dict[str, Any] = {
        "hidden": draw(n, h),
        "weight": draw(v, h, scale=3 / h**0.5),
        "targets": torch.randint(0, v - case.limit, (n,), generator=generator),
        "bias": draw(v) if case.bias else None,
        "side_hidden": draw(n, case.side) if case.side else None,
        "side_weight": draw(v, case.side) if case.side else None,
    }
    if case.edit is not None:
        case.edit(given)
    return {name: None if t is None else t.to(device) for name, t in given.items()} | {
        "temperature": case.temperature,
        "vocab_limit": v - case.limit,
        "with_mean": case.extras,
        "with_argmax": case.extras,
        "workspace": case.workspace,
    }


# ---------------------------------------------------------------------------------------- oracle


def scaled_logits(given: dict[str, Any]) -> Tensor:
    """``(N, V')`` in float64."""
    wide = {k: v.double() for k, v in given.items() if isinstance(v, Tensor)}
    z = wide["hidden"] @ wide["weight"].T
    if "side_hidden" in wide:
        z = z + wide["side_hidden"] @ wide["side_weight"].T
    if "bias" in wide:
        z = z + wide["bias"]
    return z[:, : given["vocab_limit"]] / given["temperature"]


def region_mask(z: Tensor, name: str, options: dict[str, Any]) -> Tensor:
    """Members of the region of every row, from a stable sort."""
    order = z.sort(dim=1, descending=True, stable=True).indices
    p = z.softmax(1).gather(1, order)
    rank = torch.arange(z.shape[1], device=z.device).expand_as(z)
    if name == "TopK":
        kept = rank < options["k"]
    else:
        kept = (p.cumsum(1) - p < options["p"]) & (rank < (options.get("max_size") or z.shape[1]))
    mask = torch.zeros_like(kept).scatter(1, order, kept)
    if options.get("ties") == "include":
        mask |= z >= torch.where(mask, z, math.inf).amin(1, keepdim=True)
    return mask


def oracle(case: Case, z: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Fields of ``RowStats`` and, with a dot, of ``RegionStats``, in float64."""
    d = z - z.amax(1, keepdim=True)
    lp, p = z.log_softmax(1), z.softmax(1)
    found = {
        "row_max": z.amax(1),
        "log_sum": d.logsumexp(1),
        "target": d.gather(1, targets[:, None])[:, 0],
        "entropy": -torch.where(p > 0, p * lp, 0.0).sum(1),
    }
    if case.extras:
        found |= {"mean": d.mean(1), "argmax": z.argmax(1)}
    if case.region is not None:
        name, options = case.region
        mask = region_mask(z, name, options)
        log_q = torch.where(mask, d, -math.inf).log_softmax(1)
        q, log_q = log_q.exp(), torch.where(mask & (log_q > -1e300), log_q, 0.0)
        entropy = -(q * log_q).sum(1)
        tilt = (q * q * (log_q + entropy[:, None])).sum(1) / (q * q).sum(1)
        found |= {
            "region.mask": mask,
            "region.log_sum": torch.where(mask, d, -math.inf).logsumexp(1),
            "region.entropy": found["log_sum"] if options.get("k") == 1 else entropy,
            "region.size": mask.sum(1),
            "region.tilt": tilt if options.get("preserve_mass") else torch.zeros_like(tilt),
        }
    found["dead"] = found["row_max"] == -math.inf
    return found


def gradient(z: Tensor, targets: Tensor, mask: Tensor | None, terms: dict[str, Any]) -> Tensor:
    """dZ as ``Coefficients`` defines it, without members."""
    given = {k: None if t is None else t.double()[:, None] for k, t in terms.items()}
    lp, p = z.log_softmax(1), z.softmax(1)
    lp = torch.where(p > 0, lp, 0.0)
    tilted = 0.0 if given["tilted"] is None else given["tilted"]
    result = p * (given["flat"] + tilted * lp)
    result.scatter_add_(1, targets[:, None], given["at_target"])
    if given["everywhere"] is not None:
        result += given["everywhere"]
    if given["region_flat"] is not None:
        result += torch.where(mask, p * (given["region_flat"] + given["region_tilted"] * lp), 0.0)
    return result


# ------------------------------------------------------------------------------------ comparison


def kernels(name: str) -> Any:
    from lightning_modules.ops import load_kernels

    return load_kernels(name)


def build(case: Case, device: str) -> tuple[Any, dict[str, Any]]:
    """The ``Problem`` of a case and its inputs."""
    given = inputs(case, device)
    region = None
    if case.region is not None:
        region = getattr(kernels("regions"), case.region[0])(**case.region[1])
    return kernels("problem").Problem(**given, region=region), given


def close(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance * max(1, |wanted|)``, with the same infinities and NaN."""
    assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
    found, wanted = found.double(), wanted.double()
    odd = ~wanted.isfinite()
    torch.testing.assert_close(
        found[odd], wanted[odd], equal_nan=True, msg=lambda text: f"{name}: {text}"
    )
    wrong = (found - wanted).abs() / wanted.abs().clamp(min=1)
    wrong = torch.where(odd, 0.0, wrong)
    worst = wrong.max().item() if wrong.numel() else 0.0
    assert worst <= tolerance, f"{name} is off by {worst:.2e}, at most {tolerance:.0e} is right"


def check_region(
    case: Case, stats: Any, wanted: dict[str, Tensor], d: Tensor, rows: Tensor
) -> None:
    """``RegionStats`` of the sound rows; ``d`` relative logits in float64."""
    own, mask = stats.region, wanted["region.mask"]
    columns = torch.arange(d.shape[1], device=d.device)
    if case.region[0] == "TopK":
        members = torch.zeros_like(mask).scatter(1, own.ids.clamp(0, d.shape[1] - 1), True)
        close("values", own.values[rows], d.gather(1, own.ids)[rows], case.tolerance)
    else:
        members = d > own.threshold[:, None]
        members |= (d == own.threshold[:, None]) & (columns <= own.tie_column[:, None])
    assert torch.equal(members[rows], mask[rows]), "other members than the sort's"
    for name in ("log_sum", "entropy", "size", "tilt"):
        close(name, getattr(own, name)[rows], wanted[f"region.{name}"][rows], 2 * case.tolerance)


def check(case: Case, device: str, *, interpret: bool) -> None:
    """Forward and gradient of a case against the oracle; raises what is wrong."""
    with kernels("tuning").override(**case.blocks):
        problem, given = build(case, device)
        stats = kernels("triton_backend").forward(problem, interpret=interpret)
        z, n = scaled_logits(given), case.shape[0]
        wanted = oracle(case, z, given["targets"])
        broken = torch.zeros(n, dtype=torch.bool, device=device)
        broken[list(case.broken)] = True
        rows = ~broken
        for name in ("row_max", "log_sum", "target", "entropy", "mean", "argmax"):
            value = getattr(stats, name)
            if name not in wanted:
                assert value.shape == (0,), f"{name} was not asked for"
                continue
            close(name, value[rows], wanted[name][rows], case.tolerance)
            if name not in ("row_max", "argmax"):
                assert value[broken].isnan().all(), f"{name} hides a NaN"
        dead = torch.where(wanted["dead"], -math.inf, math.nan).float()
        torch.testing.assert_close(stats.row_max[broken], dead[broken], equal_nan=True)
        assert (stats.target[rows] <= 0).all()
        if case.region is not None:
            d = z - z.amax(1, keepdim=True)
            check_region(case, stats, wanted, d, rows)
            assert stats.region.log_sum[broken].isnan().all()
        with warnings.catch_warnings():
            if case.broken:  # -inf minus the maximum -inf is the NaN that the row must be
                warnings.simplefilter("ignore")
            check_gradient(case, problem, stats, z, wanted.get("region.mask"), rows, interpret)


def check_gradient(
    case: Case, problem: Any, stats: Any, z: Tensor, mask: Any, rows: Tensor, interpret: bool
) -> None:
    """``fill``: every term, few terms, a part of the rows and columns, and 16-bit output."""
    n, v = z.shape
    names = ("flat", "tilted", "at_target", "everywhere", "region_flat", "region_tilted")
    drawn = torch.randn((len(names), n), generator=_generator(2)).to(z.device)
    full = dict(zip(names, drawn, strict=True))
    if case.region is None or case.region[0] != "TopP":
        full |= {"region_flat": None, "region_tilted": None}
    few = full | {"tilted": None, "everywhere": None}
    part = (n // 3, max(n // 3 + 1, n - 1), v // 4, v - v // 8)
    for terms, (start, stop, v0, v1), kind, tolerance in (
        (full, (0, n, 0, v), SINGLE, 2 * case.tolerance),
        (few, part, SINGLE, 2 * case.tolerance),
        (full, part, HALF, 2 * case.tolerance + 2**-10),
        (full, part, BRAIN, 2 * case.tolerance + 2**-7),  # the interpreter cuts, a GPU rounds
    ):
        made = kernels("problem").Coefficients(**terms, members=None)
        out = torch.full((stop - start, v1 - v0), 7.0, dtype=kind, device=z.device)
        kernels("triton_backend").fill(
            problem, stats, made, start, stop, v0, v1, out, interpret=interpret
        )
        wanted = gradient(z, problem.targets, mask, terms)[start:stop, v0:v1]
        sound = rows[start:stop]
        close("dZ", out[sound], wanted[sound], tolerance)
        assert out[~sound].isnan().all(), "dZ hides a NaN"


# ------------------------------------------------------------------------------------- program


def main() -> None:
    """Check all cases with the interpreter; print a JSON object of texts, empty where right."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.kernels.triton_table import CASES, EXTRA

    torch.set_num_threads(1)
    results = {}
    for name, case in (CASES | EXTRA).items():
        began = time.perf_counter()
        results[name] = ""
        try:
            with warnings.catch_warnings():
                if not (isinstance(case, Case) and case.noisy):
                    warnings.filterwarnings("error", message=".*invalid value.*")
                if isinstance(case, Case):
                    check(case, "cpu", interpret=True)
                else:
                    case()
        except Exception:
            results[name] = traceback.format_exc(limit=-4)
        print(f"{name}: {time.perf_counter() - began:.2f} s", file=sys.stderr)
    print(json.dumps(results))
