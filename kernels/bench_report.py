"""The table of ``bench.py`` and the lines around it."""

from __future__ import annotations

import importlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

Row = dict[str, Any]
PARTS = ("forward", "backward", "both")
SHARES = ("both_of_floor", "both_of_product")
COLUMNS = (
    *("provider", "computes", "input", "entropy_nats", "rows", "hidden", "vocabulary", "dtype"),
    *("device", "status"),
    *(f"{part}_ms_{point}" for part in PARTS for point in ("median", "p10", "p90")),
    *("peak_mib", "forward_of_floor", "both_of_floor", "forward_of_product", "both_of_product"),
    *("logprob_error", "entropy_error", "hidden_grad_error"),
)


def header(args: Any) -> list[str]:
    """Lines about the machine and the packages."""
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    device, driver = platform.processor() or platform.machine(), ""
    if args.device == "cuda":
        device, driver = torch.cuda.get_device_name(), f"; driver {_driver()}"
    return [
        f"- device: {device}{driver}; torch {torch.__version__}; triton {triton}; "
        f"{torch.get_num_threads()} threads",
        f"- {args.warmup} warm-up and {args.repeats} timed runs of each provider in turn, "
        + ("CUDA events, cache flushed" if args.device == "cuda" else f"{args.clock} time"),
        "- loss: log-probs times a random gradient, plus entropies times another where there are "
        "any; providers of a sum have the gradient 1 everywhere",
        "- peak: most memory beyond the inputs in forward and backward, gradients included",
        "- of floor: 8NHV FLOP (6NHV with a frozen weight) at 800 TFLOP/s over the time; of "
        "product: at the rate of torch.mm of the same size, measured in the same run",
        "- errors against float64 on up to 256 rows: largest of the log-probs and entropies in "
        "nats, relative norm of the hidden states' gradient",
    ]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.splitlines()[0].strip() if found.strip() else "unknown"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown of one size and kind of input, and one line for each provider without numbers."""
    first = rows[0]
    lines = [
        "",
        f"### N={first['rows']}, H={first['hidden']}, V={first['vocabulary']}, {first['dtype']}, "
        f"{first['input']} input of {first['entropy_nats']:.2f} nats, torch.mm "
        f"{first['product_tflops']:.3g} TFLOP/s",
        "",
        "| provider | computes | forward ms | backward ms | both ms (10 %, 90 %) | peak MiB "
        "| of floor | of product | log-prob error | entropy error | gradient error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "ok":
            continue
        times = [f"{row[f'{part}_ms_median']:.2f}" for part in PARTS]
        times[2] += f" ({row['both_ms_p10']:.2f}, {row['both_ms_p90']:.2f})"
        shares = [
            f"{row[c]:.2f}" if c in row else "-" for c in ("both_of_floor", "both_of_product")
        ]
        errors = [f"{row[c]:.1e}" if c in row else "-" for c in COLUMNS[-3:]]
        cells = [row["provider"], row["computes"], *times, f"{row['peak_mib']:.1f}"]
        lines.append(f"| {' | '.join([*cells, *shares, *errors])} |")
    lines.append("")
    lines += [f"- {r['provider']}: {r['status']}" for r in rows if r["status"] != "ok"]
    return lines


def closing(rows: Sequence[Row]) -> str:
    """How ours compares with the plain head, or nothing where one is missing."""
    fine = {row["provider"]: row for row in rows if row["status"] == "ok"}
    if not {"ours", "eager"} <= set(fine):
        return ""
    own, plain = fine["ours"], fine["eager"]
    first = rows[0]
    return (
        f"N={first['rows']} H={first['hidden']} V={first['vocabulary']} {first['input']}: memory "
        f"{own['peak_mib'] / plain['peak_mib']:.2f} of eager, time "
        f"{own['both_ms_median'] / plain['both_ms_median']:.2f} of eager"
    )
