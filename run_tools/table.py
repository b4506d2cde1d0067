"""The closing table: every arm of a run, one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


def row_and_metric(tag: str, metrics: Sequence[str] = ()) -> tuple[str, str]:
    """Row and metric of a tag below ``test/``; a metric may have a slash of its own.

    Args:
        tag: Such as ``test/sampled/score/math``.
        metrics: Known names; of several that fit the longest wins, and without any the last part.

    Example:
        >>> row_and_metric("test/sampled/score/math", ["score", "score/math"])
        ('sampled', 'score/math')
        >>> row_and_metric("test/maj8/accuracy")
        ('maj8', 'accuracy')
    """
    body = tag.removeprefix("test/")
    fitting = [name for name in metrics if f"/{body}".endswith(f"/{name}")]
    metric = max(fitting, key=len) if fitting else body.split("/")[-1]
    return body[: -len(metric)].rstrip("/"), metric


def arm_rows(
    metrics: Mapping[str, Any], columns: Sequence[str], rows: Sequence[str] = ()
) -> list[tuple[str, list[Any]]]:
    """Rows of the closing table.

    Args:
        metrics: Flat metrics, such as ``test/greedy/accuracy`` or ``test/rft/accuracy``.
        columns: Metric names.
        rows: Names or patterns of the rows wanted, in their order (``base``, ``*/maj8``); none,
            or none that fits, means all, in the order of the metrics. The run itself is ``""``.

    Returns:
        ``(arm, values)``; values are None where an arm lacks a metric.
    """
    arms: dict[str, dict[str, Any]] = {}
    for tag, value in metrics.items():
        row, metric = row_and_metric(tag, columns)
        if tag.startswith("test/") and metric in columns:
            arms.setdefault(row, {})[metric] = value
    wanted = [arm for pattern in rows for arm in arms if fnmatchcase(arm, pattern)]
    names = list(dict.fromkeys(wanted)) or list(arms)
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
