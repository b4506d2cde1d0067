"""``mode=merge``: exported folders become one, from the command line.

    python train.py mode=merge merge.models=[a,b,c] merge.method=multislerp merge.output=merged

The keys are those of ``MergeCommand``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.functional.merge_figures import MergeReport
from lightning_modules.functional.merging import argument_problems, used_weights
from run_tools.checks import check_options
from run_tools.merged import fewest_models, is_taken, merge_folders, read_report


@dataclass
class MergeCommand:
    """Keys under ``merge``.

    Args:
        models: Exported folders.
        output: The new folder.
        method: A name of ``functional.merging.METHODS``.
        weights: One a folder, in any proportion; None for equal ones.
        base: Folder of the model that all started from; the merge is then one of task vectors.
        reference: Folder that distances are measured from, ``base`` unless given; changes nothing
            in the merge.
        options: Of the method, such as ``density``, and ``one_d``; None for its default.
    """

    models: list[str] = field(default_factory=list)
    output: str | None = None
    method: str = "linear"
    weights: list[float] | None = None
    base: str | None = None
    reference: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def merge_command(config: Mapping[str, Any]) -> Path:
    """Merge the folders that ``config["merge"]`` names, and print what came of it.

    Args:
        config: The whole run as plain values; only its key ``merge`` is read.

    Returns:
        The new folder.

    Raises:
        ValueError: A wrong key or value (all are named at once), or folders that do not go
            together.
    """
    given = dict(config.get("merge") or {})
    if problems := check_options("merge", given, MergeCommand):
        raise ValueError("; ".join(problems))
    asked = MergeCommand(**given)
    asked.options = {name: value for name, value in asked.options.items() if value is not None}
    if problems := _problems(asked):
        raise ValueError("; ".join(problems))
    assert asked.output is not None
    folder = merge_folders(
        asked.models,
        asked.output,
        asked.method,
        asked.weights,
        base=asked.base,
        options=asked.options,
        reference=asked.reference,
    )
    _print(asked, folder, read_report(folder))
    return folder


def _problems(asked: MergeCommand) -> list[str]:
    """What is wrong with the values, as far as it shows before a tensor is read."""
    found = []
    count, fewest = len(asked.models), fewest_models(asked.method)
    if count < fewest:
        wanted = "two or more" if fewest > 1 else "one or more"
        found.append(f"merge.models names {count} folders; {wanted} are needed")
    named = [("models", model) for model in asked.models]
    named += [("base", asked.base)] if asked.base is not None else []
    named += [("reference", asked.reference)] if asked.reference is not None else []
    for key, folder in named:
        if not Path(folder).is_dir():
            found.append(f"merge.{key}: {folder} is no folder; give a run's export/")
    if not asked.output:
        found.append("merge.output is required: the new folder")
    elif is_taken(Path(asked.output)):
        found.append(f"merge.output={asked.output} is there already and is not empty")
    return found + argument_problems(
        asked.method,
        max(count, 1),
        weights=asked.weights,
        has_base=asked.base is not None,
        options=asked.options,
        key="merge.",
    )


def _print(asked: MergeCommand, folder: Path, report: MergeReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"{asked.method} merge of {len(asked.models)}", box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    headers = ["weight", "cosine with others"]
    if report.distances is not None:
        headers += ["cosine of updates", "distance"]
    for header in headers:
        table.add_column(header, justify="right")
    shares = used_weights(asked.weights, len(asked.models), asked.options)
    for place, (model, share) in enumerate(zip(asked.models, shares, strict=True)):
        cells = [f"{share:.3f}", _with_others(report.cosines, place)]
        if report.distances is not None:
            assert report.update_cosines is not None
            cells += [_with_others(report.update_cosines, place), f"{report.distances[place]:.4g}"]
        table.add_row(escape(str(model)), *cells)
    if report.distances is not None:
        table.add_row("merged", "", "", "", f"{report.distance:.4g}")
    console.print(table)
    if report.norm_factor is not None:
        norm = f"norm, by that of the linear average: {report.norm_factor:.4f}"
        console.print(norm, soft_wrap=True, highlight=False, markup=False)
    for line in (
        f"merged model: {folder} (figures: merge.json)",
        f"use it:       python train.py backbone=hf backbone.path={folder} ...",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _with_others(cosines: list[list[float | None]], place: int) -> str:
    """Mean cosine of a model with the others, as a cell."""
    others = [c for other, c in enumerate(cosines[place]) if other != place and c is not None]
    return f"{sum(others) / len(others):.4f}" if others else ""
