"""Data of a judge that labels itself: votes before training, orders of a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datamodules import self_training
from datamodules.engines.hf import HFEngine
from datamodules.self_training import SelfTrainingDataModule
from datamodules.tasks.prefix_audit import PrefixAudit


def make(**options: Any) -> SelfTrainingDataModule:
    task = PrefixAudit(num_train=6, num_val=2, num_test=2)
    return SelfTrainingDataModule(task=task, engine=HFEngine(), **options)


def test_votes_in_chunks_are_the_same_votes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for count in (4096, 5):
        monkeypatch.setattr(self_training, "VOTED_AT_ONCE", count)
        data = make(prior_votes=3)
        data.prepare(str(tiny_folder), tmp_path / str(count))
        found.append(data.prior())
    assert found[0] == found[1]
    assert [(swapped, len(votes)) for _, swapped, votes in found[0]] == [(False, 3), (True, 3)] * 6


@pytest.mark.parametrize(("order", "per_record"), [("both", 2), ("single", 1), ("random", 1)])
def test_prompts_of_a_draw(tiny_folder: Path, tmp_path: Path, order: Any, per_record: int) -> None:
    data = make(prior_votes=0, pair_order=order, prompts_per_rollout=4)
    data.prepare(str(tiny_folder), tmp_path)
    drawn = data.draw(0)
    assert len(drawn) == 4 * data.prompts_per_record == 4 * per_record
    assert all(prompt.record.label is None for prompt in drawn)
