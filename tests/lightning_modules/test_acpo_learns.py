"""A small run of ACPO with a fixed seed: the structure reward, alone, teaches when to plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import main


@pytest.mark.slow
def test_the_mode_is_learnt_from_the_structure_reward_alone(tmp_path: Path) -> None:
    status, _, errors = main(
        "model=acpo",
        "data.task.genres_per_kind=1",
        "backbone.warm_start.steps=400",
        "trainer.max_steps=100",
        "trainer.val_check_interval=100",
        "trainer.num_threads=1",
        "model.relative_coef=0",
        "model.length_cap=0",
        f"output_dir={tmp_path / 'out'}",
        f"cache_dir={tmp_path / 'cache'}",
    )
    assert status == 0, errors
    metrics = json.loads((tmp_path / "out" / "acpo" / "s0" / "metrics.json").read_text())
    base = metrics["test/base/mode"]
    assert metrics["test/mode"] >= base + 0.25
    assert metrics["test/no_structure/mode"] < base + 0.25
