"""The closing table: every arm of a run, one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


def arm_rows(
    metrics: Mapping[str, Any], columns: Sequence[str], rows: Sequence[str] = ()
) -> list[tuple[str, list[Any]]]:
    """Rows of the closing table.

    Args:
        metrics: Flat metrics, such as ``test/greedy/accuracy`` or ``test/rft/accuracy``.
        columns: Metric names.
        rows: Names or patterns of the rows wanted, in their order (``base``, ``*/maj8``); none
            means all, in the order of the metrics. The run itself is ``""``.

    Returns:
        ``(arm, values)``; values are None where an arm lacks a metric.
    """
    arms: dict[str, dict[str, Any]] = {}
    for tag, value in metrics.items():
        parts = tag.split("/")
        if parts[0] == "test" and parts[-1] in columns:
            arms.setdefault("/".join(parts[1:-1]), {})[parts[-1]] = value
    wanted = [arm for pattern in rows for arm in arms if fnmatchcase(arm, pattern)]
    names = list(dict.fromkeys(wanted)) if rows else list(arms)
    return [(name or "this run", [arms[name].get(column) for column in columns]) for name in names]


def print_table(
    title: str,
    metrics: Mapping[str, Any],
    columns: Sequence[str],
    rows: Sequence[str] = (),
    footer: Sequence[str] = (),
) -> None:
    """Print the closing table and what to do next; see ``arm_rows``."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    found = arm_rows(metrics, columns, rows)
    if found:
        table = Table(title=title, box=box.SIMPLE_HEAD)
        table.add_column("arm", no_wrap=True)
        for name in columns:
            words = name.split("_")
            table.add_column(" ".join(words), justify="right", min_width=max(map(len, words)))
        for arm, values in found:
            cells = ["" if value is None else f"{float(value):.3f}" for value in values]
            table.add_row(arm, *cells)
        console.print(table)
    for line in footer:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
