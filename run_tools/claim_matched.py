"""Arms compared where a second curve has come equally far: the key ``matched`` of ``report.json``.

A list of plots, each an object with the fields of ``Matched``:

    {"name": "equal_loss", "x": "val/pc/ce", "y": "val/cf/fact_fidelity",
     "levels": [0.3, 0.1, 0.03]}

Arms that learn at different speeds are at different losses after equally many steps; what differs
at equal steps may be gone at equal loss (compressor's card, section 8).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run_tools.checks import nearest
from run_tools.claim_curves import Points, read_curves
from run_tools.claim_figure import COLOURS, figure_file, name_arms
from run_tools.claim_page import Table
from run_tools.claim_scatter_options import key_problems

Text = Callable[[list[float]], str]


@dataclass(frozen=True)
class Matched:
    """One comparison.

    Args:
        name: Of the file, ``<claim>_<name>.png``.
        x: Tag of the curve that falls, such as ``val/pc/ce``.
        y: Tag that is compared.
        levels: Values of ``x``, above 0.
        arms: Which; None for all.
    """

    name: str
    x: str
    y: str
    levels: list[float]
    arms: list[str] | None = None


@dataclass
class MatchedSection:
    """Tables and images of all comparisons of a claim.

    Args:
        parts: Markdown, in order.
        images: Files.
        notes: What is missing.
    """

    parts: list[str] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The section; empty for none."""
        return "\n\n".join(["## At equal levels", *self.parts]) if self.parts else ""


def matched_problems(values: Any, arms: Sequence[str]) -> list[str]:
    """What is wrong with the key ``matched``, one message each.

    Args:
        values: As it stands in the file.
        arms: Names that may be used.

    Example:
        >>> matched_problems([{"name": "a", "x": "l", "y": "f", "levels": [0]}], [])
        ['matched[0].levels=[0] must be a list of numbers above 0']
    """
    if not isinstance(values, list):
        return [f"matched={values!r} must be a list of objects"]
    problems = []
    for index, value in enumerate(values):
        problems += _problems(f"matched[{index}]", value, arms)
    return problems


def _problems(key: str, value: Any, arms: Sequence[str]) -> list[str]:
    if not isinstance(value, dict):
        return [f"{key}={value!r} must be an object"]
    problems = key_problems(key, value, Matched, texts=("name", "x", "y"))
    levels = value.get("levels", [1])
    is_list = isinstance(levels, list) and levels
    if not is_list or not all(isinstance(one, int | float) and one > 0 for one in levels):
        problems.append(f"{key}.levels={levels!r} must be a list of numbers above 0")
    for arm in value.get("arms") or []:
        if arm not in arms:
            problems.append(
                f"{key}.arms: unknown arm {arm!r}{nearest(str(arm), arms)} "
                f"(arms: {', '.join(arms)})"
            )
    return problems


def value_at(x: Points, y: Points, level: float) -> float | None:
    """``y`` where ``x`` first falls to a level, between two points by the logarithm of ``x``.

    Args:
        x: By step.
        y: By step; steps without both do not count.
        level: Above 0.

    Returns:
        None where ``x`` starts below the level or never comes to it.

    Example:
        >>> value_at({1: 1.0, 2: 0.01}, {1: 0.8, 2: 0.4}, 0.1)
        0.6
    """
    steps = sorted(set(x) & set(y))
    for before, after in zip(steps, steps[1:], strict=False):
        high, low = x[before], x[after]
        if high >= level >= low > 0:
            share = math.log(high / level) / math.log(high / low) if high > low else 0.0
            return y[before] + share * (y[after] - y[before])
    return None


def compare_matched(
    plots: Sequence[Mapping[str, Any]],
    folders: Mapping[tuple[str, int], Path],
    claim: str,
    folder: Path,
    text: Text,
) -> MatchedSection:
    """Tables and figures of the comparisons of a claim.

    Args:
        plots: Checked by ``matched_problems``.
        folders: ``(arm, seed) -> run folder``.
        claim: Its name.
        folder: Of the images.
        text: From the values of the seeds to a cell.
    """
    section = MatchedSection()
    for plot in plots:
        _add(section, Matched(**plot), folders, claim, folder, text)
    return section


def _add(
    section: MatchedSection,
    plot: Matched,
    folders: Mapping[tuple[str, int], Path],
    claim: str,
    folder: Path,
    text: Text,
) -> None:
    own = {key: at for key, at in folders.items() if plot.arms is None or key[0] in plot.arms}
    curves = read_curves(own, [plot.x, plot.y])
    runs = {
        arm: {
            seed: (points, curves[arm, plot.y][seed])
            for seed, points in seeds.items()
            if seed in curves.get((arm, plot.y), {})
        }
        for (arm, tag), seeds in curves.items()
        if tag == plot.x
    }
    order = sorted(runs) if plot.arms is None else [arm for arm in plot.arms if arm in runs]
    if not any(runs.values()):
        section.notes.append(f"{plot.name}: no run has both {plot.x} and {plot.y}")
        return
    table = Table(["arm", *(f"{plot.x} = {level:g}" for level in plot.levels)])
    for arm in order:
        columns = [
            [v for x, y in runs[arm].values() if (v := value_at(x, y, level)) is not None]
            for level in plot.levels
        ]
        counts = [f" (n={len(v)})" if 0 < len(v) < len(runs[arm]) else "" for v in columns]
        cells = [text(values) + count for values, count in zip(columns, counts, strict=True)]
        table.body.append([arm, *cells])
    image = folder / f"{claim}_{plot.name}.png"
    _draw(image, f"{claim}: {plot.name}", plot, {arm: runs[arm] for arm in order})
    section.images.append(image)
    section.parts += [
        f"`{plot.y}` where `{plot.x}` first falls to a level, between two validations by the "
        f"logarithm. (n=...): seeds that came to it, where not all did.",
        table.markdown(),
        f"![{plot.y} against {plot.x}, a line a run]({image.name})",
    ]


def _draw(
    path: Path,
    title: str,
    plot: Matched,
    runs: Mapping[str, Mapping[int, tuple[Points, Points]]],
) -> None:
    """Thin lines are runs, dots the means at the levels."""
    with figure_file(path, title, (6.8, 4.4), dpi=110) as figure:
        panel: Any = figure.subplots()
        for index, (arm, seeds) in enumerate(runs.items()):
            colour = COLOURS[1:][index % (len(COLOURS) - 1)]
            for x, y in seeds.values():
                steps = [step for step in sorted(set(x) & set(y)) if x[step] > 0]
                panel.plot(
                    [x[step] for step in steps],
                    [y[step] for step in steps],
                    color=colour,
                    linewidth=0.7,
                    alpha=0.5,
                )
            dots = []
            for level in plot.levels:
                at = [v for x, y in seeds.values() if (v := value_at(x, y, level)) is not None]
                dots += [(level, statistics.fmean(at))] if at else []
            across, up = zip(*dots, strict=True) if dots else ((), ())
            panel.plot(across, up, "o", color=colour, markersize=5, label=arm)
        panel.set_xscale("log")
        panel.invert_xaxis()
        panel.set_xlabel(f"{plot.x} (falls to the right)")
        panel.set_ylabel(plot.y, fontsize=8)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        name_arms(figure, panel)
