"""Claims about sizes: two metrics against a size on twin axes, and one metric against another.

A plot that is not ``twin`` has a point for each run, and the page gets the rank correlations over
these runs, alone and with the cross-entropy held fixed (compressor card, sections 2.1 and 7).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.functional.paired_tests import (
    partial_spearman,
    spearman,
    spearman_p_value,
)
from run_tools.claim_figure import COLOURS, figure_file, name_arms
from run_tools.claim_page import Table
from run_tools.claim_scatter_options import Scatter

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""``arm -> seed -> flat metrics``."""

NO_VALUE = "-"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass
class Section:
    """What the page gets.

    Args:
        images: Files that were drawn.
        table: Correlations over runs; no row where no plot has points.
        notes: Plots and arms that lack values.
    """

    images: list[Path] = field(default_factory=list)
    table: Table = field(default_factory=lambda: Table([]))
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Images and table; empty where there is neither."""
        parts = ["## Metrics against each other"] if self.images else []
        parts += [f"![{image.stem.replace('_', ' ')}]({image.name})" for image in self.images]
        if self.table.body:
            parts += ["### Correlations over runs", self.table.markdown()]
            parts.append(
                "Spearman's rank correlation over runs (n of them) with its two-sided permutation "
                "p-value, and the partial one with the control's ranks taken off both. Runs of one "
                "arm are alike, so p-values over several arms describe and do not test."
            )
        return "\n\n".join(parts)


@dataclass(frozen=True)
class _Point:
    """A run in a plot."""

    arm: str
    seed: int
    x: float
    y: float
    control: float | None


def draw_scatters(
    plots: Sequence[Mapping[str, Any]], arms: Runs, claim: str, folder: Path
) -> Section:
    """Draw the plots of a claim and correlate what they show.

    Args:
        plots: Checked by ``scatter_problems``.
        arms: ``arm -> seed -> flat metrics``.
        claim: Its name.
        folder: Of the images, ``<claim>_<name>.png``.

    Returns:
        Images, correlations and notes; the same runs give the same bytes.

    Raises:
        ValueError: An arm whose name lacks the number that ``x`` asks for, or a logarithmic axis
            with a value of 0 or less.
    """
    head = ["plot", "x", "y", "runs of", "Spearman", "p", "partial", "control", "n"]
    section = Section(table=Table(head, left=4))
    for plot in plots:
        _add(section, Scatter(**plot), arms, claim, folder)
    return section


def _add(section: Section, plot: Scatter, arms: Runs, claim: str, folder: Path) -> None:
    groups = _groups(plot, arms)
    points = {
        y: {title: _points(plot, y, arms, own) for title, own in groups.items()} for y in plot.y
    }
    section.notes += _missing(plot, arms, groups, points)
    if not any(found for panels in points.values() for found in panels.values()):
        return
    _check_log(plot, points)
    image = folder / f"{claim}_{plot.name}.png"
    draw = _draw_twin if plot.twin else _draw_points
    draw(image, f"{claim}: {plot.name}", plot, points)
    section.images.append(image)
    if not plot.twin:
        section.table.body += _correlations(plot, points)


# --- values ---------------------------------------------------------------------------------------


def number_of(arm: str, word: str = "") -> float:
    """The number in an arm's name.

    Args:
        arm: Its name.
        word: That stands right before the number, at the start of the name or behind no letter;
            empty takes the first number.

    Raises:
        ValueError: There is none.

    Example:
        >>> number_of("w16_s700"), number_of("w16_s700", "s")
        (16.0, 700.0)
    """
    start = rf"(?<![A-Za-z]){re.escape(word)}" if word else ""
    found = re.search(rf"{start}(\d+(?:\.\d+)?)", arm)
    if found is None:
        behind = f" behind {word!r}" if word else ""
        raise ValueError(f"scatter.x: the arm {arm!r} has no number{behind} in its name")
    return float(found[1])


def _groups(plot: Scatter, arms: Runs) -> dict[str, list[str]]:
    if plot.group is None:
        return {"all": sorted(arms)}
    return {title: [arm for arm in own if arm in arms] for title, own in plot.group.items()}


def _points(plot: Scatter, y: str, arms: Runs, own: Sequence[str]) -> list[_Point]:
    found = []
    for arm in own:
        for seed, run in sorted(arms[arm].items()):
            across, up = _x_of(plot.x, arm, run), _value(run, y)
            if across is not None and up is not None:
                found.append(_Point(arm, seed, across, up, _value(run, plot.control)))
    return found


def _x_of(x: str, arm: str, run: Mapping[str, Any]) -> float | None:
    word, _, behind = x.partition(":")
    return number_of(arm, behind) if word == "arm" else _value(run, x)


def _value(run: Mapping[str, Any], tag: str) -> float | None:
    value = run.get(tag)
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(run[tag]) if is_number else None


def _missing(
    plot: Scatter,
    arms: Runs,
    groups: Mapping[str, Sequence[str]],
    points: Mapping[str, Mapping[str, Sequence[_Point]]],
) -> list[str]:
    """A note where runs lack values, with how many of how many."""
    runs = sum(len(arms[arm]) for own in groups.values() for arm in own)
    notes = []
    for y, panels in points.items():
        there = sum(len(found) for found in panels.values())
        if there < runs or not runs:
            notes.append(f"{plot.name}: {y} against {plot.x} is in {there} of {runs} runs")
    return notes


def _check_log(plot: Scatter, points: Mapping[str, Mapping[str, Sequence[_Point]]]) -> None:
    every = [point for panels in points.values() for found in panels.values() for point in found]
    low = min(every, key=lambda point: point.x)
    if plot.log_x and low.x <= 0:
        raise ValueError(
            f"scatter {plot.name!r}: log_x=true needs x above 0, but {plot.x} is {low.x:g} in arm "
            f"{low.arm}"
        )


def _correlations(
    plot: Scatter, points: Mapping[str, Mapping[str, Sequence[_Point]]]
) -> list[list[str]]:
    """One row for each metric and group, and one for all groups together."""
    rows = []
    for y, panels in points.items():
        pooled = list(dict.fromkeys(point for found in panels.values() for point in found))
        shown = dict(panels) if len(panels) == 1 else {**panels, "all groups": pooled}
        rows += [
            [plot.name, plot.x, y, title, *_correlation(plot, y, found)]
            for title, found in shown.items()
        ]
    return rows


def _correlation(plot: Scatter, y: str, found: Sequence[_Point]) -> list[str]:
    across, up = [point.x for point in found], [point.y for point in found]
    if len(found) < 3:
        return [NO_VALUE, NO_VALUE, NO_VALUE, plot.control, str(len(found))]
    held = [point.control for point in found if point.control is not None]
    partial = math.nan
    if len(held) == len(found) > 3 and plot.control not in (plot.x, y):
        partial = partial_spearman(across, up, held)
    p_value = spearman_p_value(across, up, seed=f"{plot.name}/{plot.x}/{y}")
    numbers = [f"{value:+.3f}" for value in (spearman(across, up), partial)]
    first, second = (NO_VALUE if "nan" in number else number for number in numbers)
    p_text = NO_VALUE if math.isnan(p_value) else f"{p_value:.4f}"
    return [first, p_text, second, plot.control, str(len(found))]


# --- figures --------------------------------------------------------------------------------------


def _draw_points(
    path: Path, title: str, plot: Scatter, points: Mapping[str, Mapping[str, Sequence[_Point]]]
) -> None:
    """A panel for each metric, a point for each run."""
    by_group = plot.group is not None if plot.label_by is None else plot.label_by == "group"
    with figure_file(path, title, (6.4, 0.9 + 3.2 * len(plot.y)), dpi=110) as figure:
        panels: Any = figure.subplots(len(plot.y), 1, sharex=True, squeeze=False)
        for panel, (y, groups) in zip(panels[:, 0], points.items(), strict=True):
            for index, (label, found) in enumerate(_labelled(groups, by_group).items()):
                panel.scatter(
                    [point.x for point in found],
                    [point.y for point in found],
                    s=26,
                    label=label,
                    color=_colour(index),
                    marker=MARKERS[index // (len(COLOURS) - 1) % len(MARKERS)],
                    edgecolors="white",
                    linewidths=0.5,
                )
            _dress(panel, plot, y)
        panels[-1, 0].set_xlabel(plot.x)
        name_arms(figure, panels[0, 0])


def _labelled(
    groups: Mapping[str, Sequence[_Point]], by_group: bool
) -> Mapping[str, Sequence[_Point]]:
    if by_group:
        return groups
    by_arm: dict[str, list[_Point]] = {}
    for found in groups.values():
        for point in found:
            by_arm.setdefault(point.arm, []).append(point)
    return by_arm


def _draw_twin(
    path: Path, title: str, plot: Scatter, points: Mapping[str, Mapping[str, Sequence[_Point]]]
) -> None:
    """Left axis solid, right axis dashed; one colour a group."""
    with figure_file(path, title, (6.8, 4.4), dpi=110) as figure:
        left: Any = figure.subplots()
        sides = (left, left.twinx())
        styles = (("-", "o"), ("--", "s"))
        for side, (line, marker), (y, groups) in zip(sides, styles, points.items(), strict=True):
            for index, (label, found) in enumerate(groups.items()):
                across, means, errors = _line(found)
                side.errorbar(across, means, yerr=errors, label=label, color=_colour(index),
                              linestyle=line, marker=marker, markersize=4, linewidth=1.4,
                              capsize=2, elinewidth=0.9)  # fmt: skip
            _dress(side, plot, f"{y} ({'solid' if line == '-' else 'dashed'})")
        left.set_xlabel(plot.x)
        sides[1].grid(visible=False)
        sides[1].spines["right"].set_visible(True)
        name_arms(figure, left)


def _line(found: Sequence[_Point]) -> tuple[list[float], list[float], list[float]]:
    """Mean x, mean and standard error of y of every arm, by x."""
    arms = dict.fromkeys(point.arm for point in found)
    rows = []
    for arm in arms:
        own = [point for point in found if point.arm == arm]
        ys = [point.y for point in own]
        error = statistics.stdev(ys) / math.sqrt(len(ys)) if len(ys) > 1 else 0.0
        rows.append((statistics.fmean(point.x for point in own), statistics.fmean(ys), error))
    rows.sort()
    across, means, errors = ([row[i] for row in rows] for i in range(3))
    return across, means, errors


def _dress(panel: Any, plot: Scatter, label: str) -> None:
    panel.set_ylabel(label, fontsize=8)
    if plot.log_x:
        panel.set_xscale("log")
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _colour(index: int) -> str:
    return COLOURS[1:][index % (len(COLOURS) - 1)]
