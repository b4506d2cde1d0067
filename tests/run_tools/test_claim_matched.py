"""Arms compared where a curve of theirs has come equally far."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from run_tools.claim_matched import matched_problems, value_at
from run_tools.report import report

PM = "\u00b1"
PLOT = {"name": "equal_loss", "x": "val/ce", "y": "val/fidelity", "levels": [0.1, 0.001]}


def make_run(folder: Path, arm: str, seed: int, x: list[float], y: list[float]) -> None:
    run = folder / "outputs" / "toy" / arm / f"s{seed}"
    logger = TensorBoardLogger(str(run), name="", version="tensorboard")
    for step, (loss, fidelity) in enumerate(zip(x, y, strict=True), start=1):
        logger.log_metrics({"val/ce": loss, "val/fidelity": fidelity}, step=step)
    logger.finalize("success")
    (run / "metrics.json").write_text(json.dumps({"seed": seed, "test/reward": 1.0}))


@pytest.fixture
def house(tmp_path: Path) -> Path:
    claim = tmp_path / "conf" / "claim" / "toy"
    claim.mkdir(parents=True)
    for arm in ("slow", "fast"):
        (claim / f"{arm}.yaml").write_text("# @package _global_\n")
    make_run(tmp_path, "slow", 0, [1.0, 0.1, 0.01], [0.9, 0.8, 0.4])
    make_run(tmp_path, "slow", 1, [1.0, 0.1, 0.05], [0.9, 0.6, 0.4])
    make_run(tmp_path, "fast", 0, [1.0, 0.01, 0.0001], [0.9, 0.5, 0.1])
    return tmp_path


def page(house: Path, plot: dict[str, object]) -> str:
    (house / "conf" / "claim" / "toy" / "report.json").write_text(json.dumps({"matched": [plot]}))
    report("toy", house / "outputs", house / "docs", house / "conf")
    return (house / "docs" / "toy.md").read_text()


def test_values_at_equal_loss(house: Path) -> None:
    text = page(house, PLOT)
    assert f"| slow | 0.700 {PM} 0.100 | - |" in text  # neither seed comes to 0.001
    assert "| fast | 0.700 | 0.300 |" in text  # halfway by the logarithm, twice
    assert "(toy_equal_loss.png)" in text
    image = (house / "docs" / "toy_equal_loss.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 5000


def test_seeds_that_never_came_there_are_counted(house: Path) -> None:
    text = page(house, {**PLOT, "levels": [0.02], "arms": ["slow"]})
    row = next(line for line in text.splitlines() if line.startswith("| slow | 0.5"))
    assert row.endswith("(n=1) |")
    assert "| fast |" not in text.split("## At equal levels")[1].split("## ")[0]


def test_a_tag_that_no_run_has_is_noted(house: Path) -> None:
    text = page(house, {**PLOT, "y": "val/other"})
    assert "equal_loss: no run has both val/ce and val/other" in text
    assert "## At equal levels" not in text


@pytest.mark.parametrize(
    ("x", "level", "wanted"),
    [
        ({1: 1.0, 2: 0.1}, 0.1, 0.5),  # at a point
        ({1: 0.05, 2: 0.01}, 0.1, None),  # below from the start
        ({1: 1.0, 2: 0.2}, 0.1, None),  # never
        ({1: 1.0, 2: 4.0, 3: 0.25}, 1.0, 0.375),  # it rises first
        ({1: 1.0}, 1.0, None),  # one point is no fall
    ],
)
def test_the_first_fall_to_a_level(x: dict[int, float], level: float, wanted: object) -> None:
    y = {1: 1.0, 2: 0.5, 3: 0.25}
    found = value_at(x, y, level)
    assert found == (wanted if wanted is None else pytest.approx(wanted))


def test_steps_without_both_values_do_not_count() -> None:
    assert value_at({1: 1.0, 2: 0.1, 3: 0.01}, {1: 0.8, 3: 0.4}, 0.1) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "matched={} must be a list of objects"),
        ([1], r"matched\[0\]=1 must be an object"),
        ([{**PLOT, "level": 1}], "unknown key 'level'; did you mean 'levels'"),
        ([{"name": "a", "x": "l", "levels": [1]}], r"matched\[0\] needs 'y'"),
        ([{**PLOT, "x": ""}], r"matched\[0\].x='' must be a text"),
        ([{**PLOT, "levels": []}], "must be a list of numbers above 0"),
        ([{**PLOT, "arms": ["slw"]}], "unknown arm 'slw'"),
    ],
)
def test_bad_plots_are_named(value: object, message: str) -> None:
    found = "; ".join(matched_problems(value, ["slow"]))
    assert re.search(message, found), found
    assert matched_problems([PLOT], []) == []
