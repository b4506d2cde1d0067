"""The closing table: every arm of a run, one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def arm_rows(metrics: Mapping[str, Any], columns: Sequence[str]) -> list[tuple[str, list[Any]]]:
    """Rows of the closing table, in the order of the metrics.

    Args:
        metrics: Flat metrics, such as ``test/greedy/accuracy`` or ``test/rft/accuracy``.
        columns: Metric names.

    Returns:
        ``(arm, values)``; values are None where an arm lacks a metric.
    """
    arms: dict[str, dict[str, Any]] = {}
    for tag, value in metrics.items():
        parts = tag.split("/")
        if parts[0] == "test" and parts[-1] in columns:
            arms.setdefault("/".join(parts[1:-1]), {})[parts[-1]] = value
    # the run itself is named by its inference arms where it has any
    if len(arms) > 1 and any(arms.get("greedy") == arms.get("") for _ in [0]):
        arms.pop("", None)
    rows = [
        (arm or "this run", [values.get(name) for name in columns]) for arm, values in arms.items()
    ]
    return [row for row in rows if any(value is not None for value in row[1])]


def print_table(
    title: str, metrics: Mapping[str, Any], columns: Sequence[str], footer: Sequence[str] = ()
) -> None:
    """Print the closing table and what to do next."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rows = arm_rows(metrics, columns)
    if rows:
        table = Table(title=title)
        table.add_column("arm")
        for name in columns:
            table.add_column(name, justify="right")
        for arm, values in rows:
            cells = ["" if value is None else f"{float(value):.3f}" for value in values]
            table.add_row(arm, *cells)
        console.print(table)
    for line in footer:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
