"""Claims: the metrics of every arm and seed as a table and a figure."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_tools.claim_curves import curve_table, draw_curves, read_curves
from run_tools.claim_figure import draw_claim
from run_tools.claim_matched import compare_matched
from run_tools.claim_options import ClaimOptions, Shown, find_claim, tag_of
from run_tools.claim_page import Page, Table, print_page
from run_tools.claim_scatter import draw_scatters

Arms = dict[str, dict[int, dict[str, Any]]]
NO_VALUE = "-"


@dataclass
class Cell:
    """Mean and standard error of one metric of one arm over seeds."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        mean, error = _number(self.mean), _number(self.error, like=self.mean)
        return f"{mean} \u00b1 {error}" if self.count > 1 else mean


@dataclass
class Difference(Cell):
    """Mean and standard error of differences by seed, and how many have the mean's sign."""

    same_sign: int = 0

    def __str__(self) -> str:
        text = super().__str__()
        return f"{'' if self.mean < 0 else '+'}{text} ({self.same_sign}/{self.count})"


def cell(values: Sequence[float]) -> Cell:
    """Mean, standard error of the mean (0 for one value) and number."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Cell(statistics.fmean(values), error, len(values))


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """``first - second`` over the seeds that both have; None if there are none."""
    gaps = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not gaps:
        return None
    found = cell(gaps)
    same = sum(_sign(gap) == _sign(found.mean) for gap in gaps)
    return Difference(found.mean, found.error, found.count, same)


def read_arms(claim: str, output_dir: str | Path) -> Arms:
    """``arm -> seed -> metrics`` of all finished runs below ``output_dir/claim``.

    Raises:
        ValueError: There are none, then it names the command that makes them; or a file is broken;
            or two runs of an arm have the same seed.
    """
    arms: Arms = {}
    folders: dict[tuple[str, int], Path] = {}
    for path in sorted(Path(output_dir, claim).glob("*/*/metrics.json")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            seed = int(metrics["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no metrics with a seed: {error!r}") from error
        arm = path.parent.parent.name
        if (arm, seed) in folders:
            raise ValueError(
                f"report.claim={claim}: two runs of arm {arm} have seed {seed}: "
                f"{folders[arm, seed]} and {path.parent}; move one of them away"
            )
        folders[arm, seed] = path.parent
        arms.setdefault(arm, {})[seed] = metrics
    if not arms:
        here = "" if Path(output_dir) == Path("outputs") else f" output_dir={output_dir}"
        raise ValueError(
            f"report.claim={claim}: no finished runs below {Path(output_dir, claim)}; run "
            f"{sweep_command(claim, range(5), 'outputs')}{here}"
        )
    return arms


def sweep_command(claim: str, seeds: Sequence[int], output_dir: str | Path) -> str:
    """The command that runs every arm with these seeds.

    >>> sweep_command("mgs", [0, 1, 2], "outputs")
    "python train.py -m '+claim/mgs=glob(*)' 'seed=range(0,3)' hydra/launcher=joblib"
    """
    first, last = min(seeds), max(seeds)
    listed = ",".join(str(seed) for seed in sorted(seeds))
    span = f"'seed=range({first},{last + 1})'"
    if len(seeds) == 1 or sorted(seeds) != list(range(first, last + 1)):
        span = f"seed={listed}"
    command = f"python train.py -m '+claim/{claim}=glob(*)' {span} hydra/launcher=joblib"
    return command + _output_option(output_dir)


def values_of(runs: Mapping[int, Mapping[str, Any]], tag: str) -> dict[int, float]:
    """``seed -> value`` of a tag where it is a finite number."""
    found = {seed: run[tag] for seed, run in sorted(runs.items()) if tag in run}
    return {
        seed: float(value)
        for seed, value in found.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def report(
    claim: str | None, output_dir: str | Path, folder: str | Path, conf: str | Path
) -> dict[str, float]:
    """Write the page and the figure of a claim and print its main table.

    Args:
        claim: Folder name below ``conf/claim``.
        output_dir: Where the runs are, as ``<claim>/<arm>/<run>/metrics.json``.
        folder: Where ``<claim>.md`` and ``<claim>.png`` go.
        conf: Folder of the config groups.

    Returns:
        Means as ``arm/inference/metric`` (``arm/metric`` for the state itself), and
        ``arm/seeds``: the number of finished seeds.

    Raises:
        ValueError: No such claim, no finished run, or a wrong ``report.json``.
    """
    source = find_claim(claim, conf)
    name = source.name
    arms = read_arms(name, output_dir)
    planned = sorted(p.stem for p in source.glob("*.yaml") if not p.stem.startswith("_"))
    options = ClaimOptions.read(source, sorted({*planned, *arms}))
    shown, unmeasured = options.filled(arms).measured(arms)
    cells = {
        (arm, row, metric): cell(list(values.values()))
        for arm, runs in sorted(arms.items())
        for row in shown.rows
        for metric in shown.metrics
        if (values := values_of(runs, tag_of(row, metric)))
    }
    if not cells:
        raise ValueError(
            f"report.claim={name}: {unmeasured or 'the runs hold no test/... metrics'}"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    target, image = Path(folder, f"{name}.md"), Path(folder, f"{name}.png")
    _draw(image, name, shown, cells)
    text = source / "README.md"
    folders = _run_folders(name, arms, output_dir)
    along, lines = _along(name, folders, options.curves, Path(folder))
    plots = draw_scatters(options.scatter, arms, name, Path(folder))
    equal = compare_matched(options.matched, folders, name, Path(folder), _mean_text)
    page = Page(
        claim=name,
        text=text.read_text(encoding="utf-8") if text.is_file() else "",
        notes=_notes(arms, planned, Path(output_dir, name), shown, unmeasured)
        + plots.notes
        + equal.notes,
        main=_main_table(arms, shown, cells),
        paired=_paired_table(arms, shown),
        extra=_extra_table(arms, shown),
        seeds=[(arm, _listed(sorted(runs))) for arm, runs in sorted(arms.items())],
        commands=_commands(name, arms, output_dir),
        seconds=[s for runs in arms.values() for s in values_of(runs, "time/wall_s").values()],
        num_runs=sum(len(runs) for runs in arms.values()),
        figure=image.name,
        along=along,
        curves=lines.name if lines else "",
        plots="\n\n".join(part for part in (equal.markdown(), plots.markdown()) if part),
    )
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_text(page.markdown(), encoding="utf-8")
    os.replace(unfinished, target)
    figures = [f"figure: {one}" for one in (image, lines, *equal.images, *plots.images) if one]
    print_page(f"claim {name}", page, [f"page: {target}", *figures])
    means = {"/".join(part for part in key if part): c.mean for key, c in cells.items()}
    return means | {f"{arm}/seeds": float(len(runs)) for arm, runs in sorted(arms.items())}


def _run_folders(claim: str, arms: Arms, output_dir: str | Path) -> Mapping[tuple[str, int], Path]:
    return {
        (arm, seed): path.parent
        for path in sorted(Path(output_dir, claim).glob("*/*/metrics.json"))
        if (arm := path.parent.parent.name) in arms
        for seed in [int(json.loads(path.read_text(encoding="utf-8"))["seed"])]
    }


def _mean_text(values: list[float]) -> str:
    return str(cell(values)) if values else NO_VALUE


def _along(
    claim: str, folders: Mapping[tuple[str, int], Path], tags: Sequence[str], folder: Path
) -> tuple[Table, Path | None]:
    """The table of what happened along the way and its figure, where curves are asked for."""
    curves = read_curves(folders, tags) if tags else {}
    found = [tag for tag in tags if any(tag == key[1] for key in curves)]
    if not found:
        return Table(["arm"]), None
    image = folder / f"{claim}_curves.png"
    title = f"{claim}: mean over seeds, and lowest to highest"
    draw_curves(image, title, curves, found)
    return curve_table(curves, found, _mean_text), image


def _draw(
    image: Path, claim: str, shown: Shown, cells: Mapping[tuple[str, str, str], Cell]
) -> None:
    """The figure: the first two metrics that were measured."""
    draw_claim(
        image,
        f"{claim}: mean and standard error over seeds",
        cells,
        arms=sorted({arm for arm, _, _ in cells}),
        rows=[row for row in shown.rows if any(key[1] == row for key in cells)],
        metrics=[m for m in shown.metrics if any(key[2] == m for key in cells)][:2],
    )


# --- tables ---------------------------------------------------------------------------------------


def _main_table(arms: Arms, shown: Shown, cells: Mapping[tuple[str, str, str], Cell]) -> Table:
    table = Table(["arm", "inference", *shown.metrics, "seeds"], left=2)
    for arm in sorted(arms):
        for row in shown.rows:
            found = [cells.get((arm, row, metric)) for metric in shown.metrics]
            seeds = max((one.count for one in found if one), default=0)
            if seeds:
                texts = [_text(one, seeds) for one in found]
                table.body.append([arm, row or NO_VALUE, *texts, str(seeds)])
    return table


def _paired_table(arms: Arms, shown: Shown) -> Table:
    table = Table(["difference", *shown.metrics])
    for label, (first, first_row), (second, second_row) in shown.pairs:
        gaps = [
            difference(
                values_of(arms.get(first, {}), tag_of(first_row, metric)),
                values_of(arms.get(second, {}), tag_of(second_row, metric)),
            )
            for metric in shown.metrics
        ]
        table.body.append([label, *(NO_VALUE if gap is None else str(gap) for gap in gaps)])
    return table


def _extra_table(arms: Arms, shown: Shown) -> Table:
    table = Table(["arm", *shown.extra, "seeds"])
    for arm, runs in sorted(arms.items()) if shown.extra else []:
        found = [list(values_of(runs, tag).values()) for tag in shown.extra]
        texts = [_text(cell(values) if values else None, len(runs)) for values in found]
        table.body.append([arm, *texts, str(len(runs))])
    return table


def _text(found: Cell | None, seeds: int) -> str:
    if found is None:
        return NO_VALUE
    return str(found) if found.count == seeds else f"{found} (n={found.count})"


def _number(value: float, like: float | None = None) -> str:
    """Three decimals, one where the number (or the one it goes with) is large."""
    value += 0.0  # no minus sign before an exact zero
    return f"{value:.1f}" if abs(value if like is None else like) >= 100 else f"{value:.3f}"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


# --- notes ----------------------------------------------------------------------------------------


def _notes(
    arms: Arms, planned: Sequence[str], runs_folder: Path, shown: Shown, unmeasured: str
) -> list[str]:
    """What a reader must know before the numbers."""
    not_run = _not_run(arms, planned, runs_folder)
    strangers = [arm for arm in sorted(arms) if arm not in planned]
    odd = _not_finite(arms, shown)
    notes = [
        f"not run: {'; '.join(not_run)}" if not_run else "",
        f"runs of arms that conf/claim/{runs_folder.name} does not hold: {', '.join(strangers)}"
        if strangers
        else "",
        _unequal_steps(arms),
        unmeasured,
        f"left out, not finite: {', '.join(odd)}" if odd else "",
    ]
    return [note for note in notes if note]


def _not_run(arms: Arms, planned: Sequence[str], runs_folder: Path) -> list[str]:
    """Arms without a finished run, and seeds that other arms have, with what was begun."""
    everything = {seed for runs in arms.values() for seed in runs}
    lines = []
    for arm in sorted({*planned, *arms}):
        missing = sorted(everything - arms.get(arm, {}).keys())
        begun = sorted(
            path.name
            for path in runs_folder.glob(f"{arm}/*")
            if path.is_dir() and not (path / "metrics.json").is_file()
        )
        begun = begun if arm in planned else []  # folders of a run that is no arm
        line = arm if arm not in arms else f"{arm} with seed {_listed(missing)}" if missing else ""
        if begun:
            line = f"{line or arm} (unfinished: {', '.join(begun)})"
        lines += [line] if line else []
    return lines


def _unequal_steps(arms: Arms) -> str:
    """A warning where arms that train took different numbers of optimizer steps."""
    steps = {
        arm: sorted({int(value) for value in values_of(runs, "steps").values() if value})
        for arm, runs in sorted(arms.items())
    }
    if len({value for values in steps.values() for value in values}) < 2:
        return ""
    told = [f"{arm} {_listed(values)}" for arm, values in steps.items() if values]
    return f"arms differ in steps: {'; '.join(told)}. A fair comparison needs equal steps"


def _not_finite(arms: Arms, shown: Shown) -> list[str]:
    tags = [tag_of(row, metric) for row in shown.rows for metric in shown.metrics] + shown.extra
    return [
        f"{arm} seed {seed} {tag}"
        for arm, runs in sorted(arms.items())
        for seed, run in sorted(runs.items())
        for tag in tags
        if isinstance(run.get(tag), float) and not math.isfinite(run[tag])
    ]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _commands(claim: str, arms: Arms, output_dir: str | Path) -> list[str]:
    seeds = sorted({seed for runs in arms.values() for seed in runs})
    return [
        sweep_command(claim, seeds, output_dir),
        f"python train.py mode=report report.claim={claim}{_output_option(output_dir)}",
    ]


def _output_option(output_dir: str | Path) -> str:
    """Nothing for the default, and no absolute path: pages hold no names of machines."""
    path = Path(output_dir)
    return "" if path.is_absolute() or path == Path("outputs") else f" output_dir={path}"
