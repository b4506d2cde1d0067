"""``kernel=reference`` is the plain path of the same run: twenty steps of both agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from tests.runs import SHORT, SMALL, board, scalars

TAGS = ("train/loss", "train/entropy", "train/grad_norm", "train/kl")


def curves(config: Any) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of the tags of a run."""
    train.run(config)
    reader = board(Path(config.run_dir))
    return {tag: scalars(reader, tag) for tag in TAGS}


@pytest.mark.slow
def test_twenty_steps_of_both_paths_agree(make_config: Callable[..., Any], tmp_path: Path) -> None:
    options = [
        *(*SMALL, *SHORT, "model=grpo", "model.kl_coef=0.05", "trainer.max_steps=20"),
        *("trainer.val_check_interval=20", "data.prompts_per_rollout=4"),
    ]
    found = {}
    for choice in ("fused", "reference"):
        config = make_config(*options, f"kernel={choice}", f"output_dir={tmp_path / choice}")
        found[choice] = curves(config)
    for tag in TAGS:
        fused, plain = found["fused"][tag], found["reference"][tag]
        assert len(fused) == 20, tag
        assert [step for step, _ in fused] == [step for step, _ in plain]
        gaps = [abs(a - b) for (_, a), (_, b) in zip(fused, plain, strict=True)]
        assert max(gaps) < 1e-4, (tag, max(gaps))
    assert any(value for _, value in found["fused"]["train/grad_norm"])
