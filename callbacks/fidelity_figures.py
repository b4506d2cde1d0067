"""Figures of what a compressor's memory kept: for TensorBoard, as PNG and as coloured texts.

The numbers behind them come from ``lightning_modules/functional/fidelity_pictures.py``; what is
drawn is the list of the compressor card, section 7, one run at a time. Plots over runs (loss and
fidelity against size) are made by ``mode=report``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.fidelity_tables import (
    INK,
    LEGEND,
    Outcomes,
    Row,
    html_table,
    markdown_table,
    table_rows,
)
from lightning_modules.functional.fidelity_pictures import (
    Confusion,
    confusions,
    memory_spectrum,
    pair_cosines,
    paired_sets,
)
from run_tools.claim_figure import COLOURS, figure_file, name_arms

KEY = "callbacks.fidelity_figures"
MAX_LETTERS = 160  # of a line in the picture of texts


class Picture(NamedTuple):
    """A figure that is not drawn yet.

    Args:
        name: Of the file and the tag.
        title: Above the panels.
        size: Width and height (inches).
        draw: Draws on a figure.
    """

    name: str
    title: str
    size: tuple[float, float]
    draw: Callable[[Any], None]


class FidelityFigures(Callback):
    """Draws what the evaluation sets of a compressor say, after a test and perhaps validations.

    Reads ``outcomes`` of the module: set -> ``SetOutcome``, all rows on the main process.
    TensorBoard gets ``<split>/figures/<name>`` at the step of the evaluation, the folder
    ``<split>_<name>.png`` of the last evaluation of the split:

    - ``spectra``: singular values of the memories, one line a set, log-log;
    - ``confusion_<attribute>``: value in the source against value that came back, one panel a set;
      what is the prior's is marked in brackets;
    - ``pairs_<set>``: cosines of the memories of minimal pairs;
    - ``slot_entropy``: entropy of the decoder on tokens of facts, sets against each other;
    - ``texts``: source and reconstruction with changed words marked; the PNG cuts long lines, the
      Markdown table and ``<split>_texts.html`` hold them whole.

    What a set does not have (attributes, twins, memories of one shape) it has no figure of.

    Args:
        folder: Of the files.
        every_validation: Also after validations (not the sanity check).
        pairs: Minimal pairs in the matrix of cosines.
        rows: Texts of each set in the table, those that changed first.
        max_values: Values of an attribute with a row of their own.

    Raises:
        ValueError: A number below 1.

    Example:
        >>> FidelityFigures(folder="figures", pairs=0)
        Traceback (most recent call last):
        ...
        ValueError: callbacks.fidelity_figures.pairs=0 must be at least 1
    """

    def __init__(
        self,
        *,
        folder: str,
        every_validation: bool = False,
        pairs: int = 16,
        rows: int = 6,
        max_values: int = 12,
    ) -> None:
        given = {"pairs": pairs, "rows": rows, "max_values": max_values}
        problems = [f"{KEY}.{k}={v} must be at least 1" for k, v in given.items() if v < 1]
        if problems:
            raise ValueError("; ".join(problems))
        self.folder, self.every_validation = Path(folder), every_validation
        self.pairs, self.rows, self.max_values = pairs, rows, max_values

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without outcomes before anything is trained.

        Raises:
            ValueError: The module keeps none.
        """
        if not hasattr(pl_module, "outcomes"):
            raise ValueError(
                f"{KEY} needs a module that keeps outcomes of evaluation sets (model=compressor), "
                f"not {type(pl_module).__name__}: leave it out with ~{KEY}"
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the test found."""
        self._write(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what a validation found, if that is asked for."""
        if self.every_validation and not trainer.sanity_checking:
            self._write(trainer, pl_module, "val")

    def pictures(self, outcomes: Outcomes) -> list[Picture]:
        """All figures of these sets, not drawn yet.

        Args:
            outcomes: Set -> rows.
        """
        return [
            *_spectra(outcomes),
            *_confusions(outcomes, self.max_values),
            *_pairs(outcomes, self.pairs),
            *_entropies(outcomes),
            *_texts(table_rows(outcomes, self.rows)),
        ]

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        outcomes: Outcomes = getattr(pl_module, "outcomes", {})
        if not (outcomes and trainer.is_global_zero):
            return
        from matplotlib.image import imread

        self.folder.mkdir(parents=True, exist_ok=True)
        boards: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        step = trainer.global_step
        for name, title, size, draw in self.pictures(outcomes):
            path = self.folder / f"{split}_{name}.png"
            with figure_file(path, f"{title} ({split}, step {step})", size, dpi=100) as figure:
                draw(figure)
            for board in boards:
                if hasattr(board, "add_image"):
                    tag = f"{split}/figures/{name}"
                    board.add_image(tag, imread(path)[..., :3], step, dataformats="HWC")
        rows = table_rows(outcomes, self.rows)
        page = self.folder / f"{split}_texts.html"
        page.write_text(html_table(rows), encoding="utf-8")
        for board in boards:
            if hasattr(board, "add_text"):
                board.add_text(f"{split}/figures/texts", markdown_table(rows), step)


# -------------------------------------------------------------------------------------- figures


def _texts(rows: Sequence[Row]) -> Iterator[Picture]:
    if not rows:
        return
    lines = [
        (prefix, words)
        for row in rows
        for prefix, words in ((f"{row.name}  ", row.source), ("", row.decoded))
    ]
    indent = max(len(prefix) for prefix, _ in lines)
    longest = indent + max(sum(len(word) + 1 for word, _ in words) for _, words in lines)
    letters = min(MAX_LETTERS, max(70, longest))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.set(xlim=(0, letters), ylim=(len(lines) + 0.5, -1))
        axes.axis("off")
        font = {"family": "monospace", "fontsize": 8, "clip_on": True, "parse_math": False}
        axes.text(0, -0.9, LEGEND, fontsize=7)
        for number, (prefix, words) in enumerate(lines):
            axes.text(0, number, prefix, color="#777777", va="top", **font)
            at = indent
            for word, mark in words:
                weight = "normal" if mark == "same" else "bold"
                axes.text(at, number, word, color=INK[mark], va="top", weight=weight, **font)
                at += len(word) + 1

    size = (0.4 + 0.071 * letters, 1.0 + 0.19 * len(lines))
    yield Picture("texts", "Source, and below it what came back", size, draw)


def _spectra(outcomes: Outcomes) -> Iterator[Picture]:
    spectra = {
        name: memory_spectrum(one.memory) for name, one in outcomes.items() if one.memory.numel()
    }
    if not spectra:
        return

    def draw(figure: Any) -> None:
        axes = _plain(figure.add_subplot())
        for (name, sigma), colour in zip(spectra.items(), _colours(), strict=False):
            kept = sigma[sigma > 0]
            axes.plot(range(1, len(kept) + 1), kept, ".-", label=name, color=colour, markersize=3)
        axes.set(xscale="log", yscale="log", xlabel="index", ylabel="singular value of Z, centred")
        name_arms(figure, axes)

    yield Picture("spectra", "Spectra of the memories", (5.5, 4.2), draw)


def _confusions(outcomes: Outcomes, max_values: int) -> Iterator[Picture]:
    by_name: dict[str, dict[str, Confusion]] = {}
    for name, one in outcomes.items():
        for attribute, found in confusions(one, max_values=max_values).items():
            by_name.setdefault(attribute, {})[name] = found
    for attribute, panels in sorted(by_name.items()):
        side = max(1.6 + 0.42 * len(found.columns) for found in panels.values())

        def draw(figure: Any, panels: dict[str, Confusion] = panels) -> None:
            axes = figure.subplots(1, len(panels), squeeze=False)[0]
            for panel, (name, found) in zip(axes, panels.items(), strict=True):
                _draw_confusion(panel, name, found)

        title = (
            f"Source and decoded {_texts_of([attribute])[0]}; [n]: slots overwritten by their prior"
        )
        name = f"confusion_{quote(attribute, safe='')}" if attribute else "confusion"
        yield Picture(name, title, (max(6.0, side * len(panels)), side), draw)


def _draw_confusion(panel: Any, name: str, found: Confusion) -> None:
    total = found.counts.sum(1, keepdim=True).clamp(min=1)
    panel.imshow((found.counts / total).numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in found.counts.nonzero().tolist():
        count, prior = int(found.counts[row, column]), int(found.overwritten[row, column])
        ink = "white" if count / int(total[row]) > 0.55 else "#222222"
        text = f"{count}\n[{prior}]" if prior else f"{count}"
        weight = "bold" if prior else "normal"
        panel.text(
            column, row, text, ha="center", va="center", fontsize=6, color=ink, weight=weight
        )
        if prior:
            _frame(panel, row, column)
    panel.set_xticks(
        range(len(found.columns)), _texts_of(found.columns), rotation=60, ha="right", fontsize=7
    )
    panel.set_yticks(range(len(found.rows)), _texts_of(found.rows), fontsize=7)
    share = float(found.overwritten.sum() / found.counts.sum())
    panel.set_title(f"{name}: {share:.3f} of {int(found.counts.sum())} overwritten", fontsize=8)
    panel.set(xlabel="decoded", ylabel="source")


def _frame(panel: Any, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.46, row - 0.46)
    panel.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#d55e00", linewidth=1.2))


def _pairs(outcomes: Outcomes, count: int) -> Iterator[Picture]:
    for one, usual in paired_sets(outcomes):
        found = pair_cosines(one, usual, count=count)

        def draw(figure: Any, matrix: torch.Tensor = found.matrix,
                 labels: list[str] = found.labels) -> None:  # fmt: skip
            axes = figure.add_subplot()
            image = axes.imshow(matrix.numpy(), cmap="RdBu", vmin=-1, vmax=1)
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
            axes.set_yticks(range(len(labels)), labels, fontsize=6)
            figure.colorbar(image, shrink=0.8)

        title = f"Cosines of centred memories, halves of a pair side by side\n{found.diagnosis()}\n"
        side = 3.2 + 0.13 * len(found.labels)
        yield Picture(f"pairs_{quote(one.name, safe='')}", title, (side + 1.6, side), draw)


def _entropies(outcomes: Outcomes) -> Iterator[Picture]:
    values = {
        name: one.entropy_slot.float() for name, one in outcomes.items() if len(one.entropy_slot)
    }
    if not values:
        return
    if bad := [name for name, found in values.items() if not bool(found.isfinite().all())]:
        raise ValueError(f"entropies of {', '.join(bad)} are not finite")
    top = max(float(found.max()) for found in values.values())
    edges = torch.linspace(0, max(top, 1e-3), 41)

    def draw(figure: Any) -> None:
        axes = _plain(figure.add_subplot())
        for (name, found), colour in zip(values.items(), _colours(), strict=False):
            share = torch.histc(found, bins=40, min=0, max=float(edges[-1])) / len(found)
            label = f"{name}, mean {float(found.mean()):.3f}"
            axes.stairs(share.numpy(), edges.numpy(), label=label, color=colour, linewidth=1.4)
        axes.set(xlabel="entropy on tokens of facts (nats)", ylabel="share of tokens")
        name_arms(figure, axes)

    yield Picture("slot_entropy", "Entropy where facts are told", (5.5, 3.8), draw)


def _colours() -> list[str]:
    return [*COLOURS[1:7], COLOURS[0], "#000000"] * 4


def _plain(axes: Any) -> Any:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _texts_of(labels: Sequence[str]) -> list[str]:
    """Labels without formulas: two dollars would begin one."""
    return [label.replace("$", r"\$") for label in labels]
