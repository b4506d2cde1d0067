"""Claims: the metrics of every arm and seed as a table and a figure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Cell:
    """Mean and standard error of one metric of one arm over seeds."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}" if self.count > 1 else f"{self.mean:.3f}"


def cell(values: Sequence[float]) -> Cell:
    """Mean, standard error of the mean (0 for one value) and number."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Cell(statistics.fmean(values), error, len(values))


def read_arms(claim: str, output_dir: str | Path) -> dict[str, dict[int, dict[str, Any]]]:
    """``arm -> seed -> metrics`` of all finished runs below ``output_dir/claim``.

    Raises:
        ValueError: There are none; names the command that makes them.
    """
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(Path(output_dir, claim).glob("*/*/metrics.json")):
        metrics = json.loads(path.read_text())
        arms.setdefault(path.parent.parent.name, {})[int(metrics["seed"])] = metrics
    if not arms:
        raise ValueError(
            f"report.claim={claim}: no finished runs below {Path(output_dir, claim)}; run "
            f"python train.py -m '+claim/{claim}=glob(*)' 'seed=range(0,5)' hydra/launcher=joblib"
        )
    return arms
