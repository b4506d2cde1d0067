"""Curves of a claim from real event files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from run_tools.claim_curves import read_curves, read_points
from run_tools.report import report

PM = "\u00b1"


def make_run(
    folder: Path, arm: str, seed: int, values: list[float], tag: str = "rollout/x"
) -> Path:
    run = folder / "outputs" / "toy" / arm / f"s{seed}"
    logger = TensorBoardLogger(str(run), name="", version="tensorboard")
    for step, value in enumerate(values, start=1):
        logger.log_metrics({tag: value}, step=step)
    logger.finalize("success")
    metrics = {"seed": seed, "test/reward": values[-1], "steps": len(values)}
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


@pytest.fixture
def house(tmp_path: Path) -> Path:
    claim = tmp_path / "conf" / "claim" / "toy"
    claim.mkdir(parents=True)
    for arm in ("a", "b"):
        (claim / f"{arm}.yaml").write_text("# @package _global_\n")
    make_run(tmp_path, "a", 0, [1.0, 2.0, 3.0])
    make_run(tmp_path, "a", 1, [3.0, 4.0, 5.0])
    make_run(tmp_path, "b", 0, [1.0, 0.0, 0.5])
    return tmp_path


def page(house: Path, curves: list[str]) -> str:
    options = {"curves": curves, "baseline_arm": "a"}
    (house / "conf" / "claim" / "toy" / "report.json").write_text(json.dumps(options))
    report("toy", house / "outputs", house / "docs", house / "conf")
    return (house / "docs" / "toy.md").read_text()


def test_table_and_figure_of_curves(house: Path) -> None:
    text = page(house, ["rollout/x", "rollout/never"])
    assert f"| a | 3.000 {PM} 1.000 | 2.000 {PM} 1.000 |" in text
    assert "| b | 0.500 | 0.000 |" in text
    assert "never" not in text.split("## Along the way")[1].split("##")[0]
    assert "(toy_curves.png)" in text
    image = (house / "docs" / "toy_curves.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 5000


def test_without_curves_the_page_has_none(house: Path) -> None:
    assert "Along the way" not in page(house, [])
    assert "Along the way" not in page(house, ["rollout/never"])
    assert not (house / "docs" / "toy_curves.png").exists()


def test_points_of_a_resumed_run_are_joined_by_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", 0, [1.0, 2.0])
    logger = TensorBoardLogger(str(run), name="", version="tensorboard")
    logger.log_metrics({"rollout/x": 7.0}, step=3)
    logger.finalize("success")
    assert read_points(run, ["rollout/x"]) == {"rollout/x": {1: 1.0, 2: 2.0, 3: 7.0}}
    curves = read_curves({("a", 0): run}, ["rollout/x"])
    assert curves == {("a", "rollout/x"): {0: {1: 1.0, 2: 2.0, 3: 7.0}}}
