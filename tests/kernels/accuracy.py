"""Worst errors of the fused head against float64, as a Markdown table.

``python -m tests.kernels.accuracy [--backend torch reference] [--dtype bfloat16 ...]``; the backend
``interpret`` needs ``TRITON_INTERPRET=1`` in the environment. A cell holds our error, then that of
the eager path (logits in the inputs' dtype, float32 softmax). Values: absolute, relative to the
largest where that is above 1. Gradients (``dX``, ``dW``): relative to the largest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops import TopK, TopP, linear_cross_entropy
from tests.kernels import oracle
from tests.kernels.cases import (
    Case,
    eager,
    errors,
    full_logits,
    fused,
    make_case,
    run,
    truth,
    upstreams,
)

COLUMNS = ("logprob", "entropy", "TRE-K", "TRE-P", "CE", "dX", "dW")
DTYPES = ("float64", "float32", "bfloat16", "float16")
LOSS = {"label_smoothing": 0.1, "z_loss": 1e-3}
HEADS: list[dict[str, Any]] = [
    {"n": 13, "v": 131, "h": 40, "bias": True},
    {"n": 21, "v": 260, "h": 64, "rank": 5, "bias": True, "temperature": 0.7, "seed": 3},
    {"n": 5, "v": 515, "h": 96, "scale": 2.0, "vocab_limit": 500, "seed": 4},
]


def _fused_losses(case: Case, backend: str) -> dict[str, Tensor]:
    options = {name: value for name, value in case.options.items() if name != "region"}
    loss = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"bias": case.bias, "side": case.side, "reduction": "none", "backend": backend},
        **{**options, **LOSS},
    )
    return {"CE": loss}


def _plain_losses(case: Case) -> dict[str, Tensor]:
    logits = full_logits(case)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    found = oracle.quantities(wide, case.targets, **{**case.options, "region": None})
    return {"CE": oracle.token_losses(found, **LOSS)}


def _head_errors(case: Case, backend: str) -> tuple[dict[str, float], dict[str, float]]:
    """Worst errors of one head by column: ours and the eager path's."""
    worst: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for region, name in ((TopK(8), "TRE-K"), (TopP(0.95), "TRE-P"), (None, "CE")):
        own = case.given(region=region)
        if name == "CE":
            grads = upstreams(own, ("logprob",))
            grads = {"CE": grads["logprob"]}
            wanted = run(_plain_losses, own.fresh(torch.float64), grads)
            paths = [partial(_fused_losses, backend=backend), _plain_losses]
        else:
            grads = upstreams(own)
            wanted = truth(own, grads)
            paths = [partial(fused, backend=backend), eager]
        rename = {"region_entropy": name, "d hidden": "dX", "d weight": "dW"}
        for total, path in zip(worst, paths, strict=True):
            for field, value in errors(run(path, own, grads), wanted).items():
                column = rename.get(field, field)
                total[column] = _worst(total.get(column, 0.0), value)
    return worst


def table_rows(
    backends: Sequence[str] = ("torch", "reference"), dtypes: Sequence[str] = DTYPES
) -> list[tuple[str, str, dict[str, float], dict[str, float]]]:
    """``(back end, dtype, our errors, the eager path's)``, errors by ``COLUMNS``.

    Args:
        backends: As ``linear_logprob_entropy`` takes them.
        dtypes: Names of PyTorch dtypes; float64 is left out where the kernels are Triton's.
    """
    rows = []
    for backend in backends:
        for dtype in dtypes:
            if dtype == "float64" and backend in ("interpret", "triton"):
                continue
            own: dict[str, float] = dict.fromkeys(COLUMNS, 0.0)
            plain = dict(own)
            for head in HEADS:
                case = make_case(**head, dtype=getattr(torch, dtype))
                found = _head_errors(_on_device(case, backend), backend)
                for total, part in zip((own, plain), found, strict=True):
                    total |= {name: _worst(total[name], part[name]) for name in COLUMNS}
            rows.append((backend, dtype, own, plain))
    return rows


def _worst(first: float, second: float) -> float:
    """The larger; NaN is the worst of all, which ``max`` may overlook."""
    return first if math.isnan(first) else second if math.isnan(second) else max(first, second)


def _on_device(case: Case, backend: str) -> Case:
    if backend != "triton":
        return case
    moved = {name: value.cuda() for name, value in case.leaves().items()}
    return Case(targets=case.targets.cuda(), options=case.options, **moved)


def accuracy_table(
    backends: Sequence[str] = ("torch", "reference"), dtypes: Sequence[str] = DTYPES
) -> str:
    """The Markdown table; arguments as ``table_rows`` takes them."""
    lines = [
        "| back end | dtype | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for backend, dtype, own, plain in table_rows(backends, dtypes):
        cells = [f"{own[name]:.1e} / {plain[name]:.1e}" for name in COLUMNS]
        lines.append(f"| {backend} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", default=["torch", "reference"])
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    given = parser.parse_args(argv)
    print(accuracy_table(given.backend, given.dtype))


if __name__ == "__main__":
    main()
