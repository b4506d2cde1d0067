"""Figures of fidelity: which are drawn, where they go, and that they show what is there."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from callbacks.fidelity_figures import FidelityFigures
from callbacks.fidelity_tables import Row, html_table, markdown_table, table_rows
from datamodules.tasks.compression import Context, Slot
from lightning_modules.functional.outcomes import SetOutcome

HUES = ["red", "tan", "blue"]
FIGURES = ["confusion_hue", "pairs_cf", "slot_entropy", "spectra", "texts"]


def one_set(name: str, twins: list[int], shift: int) -> SetOutcome:
    """Six contexts of one fact; every second one comes back as its prior."""
    contexts, decoded = [], []
    values: list[Mapping[str, str | None]] = []
    for i in range(6):
        usual, said = HUES[i % 3], HUES[(i + shift) % 3]
        out = usual if i % 2 else said
        slot = Slot(f"n{i}", "attribute", said, usual, name="hue")
        contexts.append(Context(f"{name}{i}", f"n{i} is {said} .", (slot,)))
        decoded.append(f"n{i} is {out} .")
        values.append({f"n{i}": out})
    maker = torch.Generator().manual_seed(shift)
    memory = torch.randn(6, 2, 4, generator=maker)
    entropy = torch.rand(9, generator=maker) + shift
    return SetOutcome(name, contexts, decoded, values, memory, entropy, twins)


@pytest.fixture
def outcomes() -> dict[str, SetOutcome]:
    return {"pc": one_set("pc", [-1] * 6, 0), "cf": one_set("cf", list(range(6)), 1)}


class Toy(LightningModule):
    """Keeps outcomes as the compressor does, found at the end of an evaluation."""

    def __init__(self, found: dict[str, SetOutcome]) -> None:
        super().__init__()
        self.outcomes: dict[str, SetOutcome] = {}
        self.found = found

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.outcomes = self.found

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outcomes = self.found


def trainer(folder: Path, callback: FidelityFigures) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=TensorBoardLogger(str(folder), name="", version="tensorboard"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        barebones=False,
    )


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


@pytest.mark.filterwarnings("ignore")
def test_a_test_writes_pictures_to_the_folder_and_to_tensorboard(
    tmp_path: Path, outcomes: dict[str, SetOutcome]
) -> None:
    callback = FidelityFigures(folder=str(tmp_path / "figures"), pairs=4, rows=2)
    trainer(tmp_path, callback).test(Toy(outcomes), [0], verbose=False)
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"test_{name}.png" for name in FIGURES} | {"test_texts.html"}
    events = board(tmp_path)
    assert set(events.Tags()["images"]) == {f"test/figures/{name}" for name in FIGURES}
    for name in FIGURES:
        image = imread(tmp_path / "figures" / f"test_{name}.png")
        shown = events.Images(f"test/figures/{name}")[0]
        assert (shown.height, shown.width) == image.shape[:2]
        assert image[..., :3].min() < 0.5, f"{name} is blank"
    assert "test/figures/texts/text_summary" in events.Tags()["tensors"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every_validation", [False, True])
def test_validations_are_drawn_where_asked_for(
    tmp_path: Path, outcomes: dict[str, SetOutcome], every_validation: bool
) -> None:
    folder = tmp_path / "figures"
    callback = FidelityFigures(folder=str(folder), every_validation=every_validation)
    trainer(tmp_path, callback).validate(Toy(outcomes), [0], verbose=False)
    assert folder.exists() == every_validation
    assert (folder / "val_spectra.png").exists() == every_validation


def test_only_the_main_process_writes_and_nothing_is_drawn_without_rows(
    tmp_path: Path, outcomes: dict[str, SetOutcome]
) -> None:
    callback = FidelityFigures(folder=str(tmp_path / "figures"))
    other: Any = SimpleNamespace(is_global_zero=False, loggers=[], global_step=0)
    callback.on_test_end(other, Toy(outcomes))
    other.is_global_zero = True
    callback.on_test_end(other, Toy({}))
    assert not (tmp_path / "figures").exists()


def test_the_same_outcomes_give_the_same_bytes(
    tmp_path: Path, outcomes: dict[str, SetOutcome]
) -> None:
    module, seen = Toy(outcomes), []
    module.outcomes = outcomes
    main: Any = SimpleNamespace(is_global_zero=True, loggers=[], global_step=3)
    for name in ("a", "b"):
        FidelityFigures(folder=str(tmp_path / name)).on_test_end(main, module)
        seen.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())})
    assert seen[0] == seen[1] and len(seen[0]) == len(FIGURES) + 1


def test_a_set_has_no_figure_of_what_it_lacks(outcomes: dict[str, SetOutcome]) -> None:
    def names(found: dict[str, SetOutcome]) -> list[str]:
        return sorted(one.name for one in FidelityFigures(folder="x").pictures(found))

    assert names(outcomes) == FIGURES
    assert "pairs_cf" not in names({"cf": outcomes["cf"]})
    empty = {k: dataclasses.replace(v, memory=torch.zeros(0, 0, 0)) for k, v in outcomes.items()}
    assert names(empty) == ["confusion_hue", "slot_entropy", "texts"]
    bare = [Context("a", "x y")]
    assert names({"all": SetOutcome("all", bare, ["x"], [{}], torch.ones(1, 1, 2))}) == [
        "spectra",
        "texts",
    ]


def test_entropies_that_are_no_numbers_are_refused(outcomes: dict[str, SetOutcome]) -> None:
    bad = dataclasses.replace(outcomes["cf"], entropy_slot=torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="entropies of cf are not finite"):
        FidelityFigures(folder="x").pictures({"cf": bad})


def texts_of(figure: Any) -> Iterator[tuple[str, str]]:
    for axes in figure.axes:
        for text in axes.texts:
            yield text.get_text(), text.get_color()


def test_the_prior_is_marked_in_the_confusion_and_in_the_texts(
    outcomes: dict[str, SetOutcome],
) -> None:
    from matplotlib.figure import Figure

    pictures = {p.name: p for p in FidelityFigures(folder="x").pictures(outcomes)}
    figure = Figure()
    pictures["confusion_hue"].draw(figure)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["pc: 0.000 of 6 overwritten", "cf: 0.500 of 6 overwritten"]
    assert sum("[1]" in text for text, _ in texts_of(figure)) == 3
    figure = Figure()
    pictures["texts"].draw(figure)
    drawn = list(texts_of(figure))
    assert ("tan", "#c2338a") in drawn  # cf 1: the prior of n1
    assert ("blue", "#0072b2") in drawn  # and what the source said
    assert "3 pulled, 3 kept" in pictures["pairs_cf"].title


def test_tables_show_marks_and_no_markup_of_the_data(outcomes: dict[str, SetOutcome]) -> None:
    rows = table_rows({"cf": outcomes["cf"]}, 2)
    assert [row.name for row in rows] == ["cf 1", "cf 3"]
    odd = Row("cf|<b>", [("<i>", "gone"), ("a*b|c", "same")], [("$x$_y_", "prior")])
    shown = markdown_to_safe_html(markdown_table([odd]))
    assert "<em>&lt;i&gt;</em>" in shown and "<b>" not in shown
    shown = html.unescape(shown)
    assert "<td>cf|<b></td>" in shown and "a*b|c" in shown
    assert "<strong>$x$_y_</strong> (prior)" in shown
    page = html_table([*rows, odd])
    assert '<span class="prior">tan</span>' in page and '<span class="gone">blue</span>' in page
    assert '<span class="gone">&lt;i&gt;</span>' in page and "<i>" not in page


def test_a_module_without_outcomes_and_wrong_numbers_are_refused() -> None:
    callback = FidelityFigures(folder="x")
    module = LightningModule()
    with pytest.raises(ValueError, match="needs a module that keeps outcomes.*LightningModule"):
        callback.setup(Trainer(logger=False, accelerator="cpu"), module, "fit")
    with pytest.raises(ValueError, match="rows=0 must be at least 1; .*max_values=-1 must"):
        FidelityFigures(folder="x", rows=0, max_values=-1)
