"""The picture of a tree, and where it is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.tree_picture import TreePicture
from datamodules.experience import Completion, FinishReason, Prompt, Rollouts
from datamodules.tasks.forks import Forks


def rollouts(reward: list[float], parent: list[int], branch_pos: list[int]) -> Rollouts:
    """Groups of four chains of six tokens."""
    count = len(reward)
    return Rollouts(
        prompts=[Prompt(f"p{i // 4}", (3,), Forks()) for i in range(count)],
        completions=[Completion((4,) * 6, (0.0,) * 6, FinishReason.STOP) for _ in range(count)],
        groups=torch.arange(count) // 4,
        reward=torch.tensor(reward),
        info={"parent": parent, "branch_pos": branch_pos},
    )


TREES = rollouts(
    [0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0],
    [-1, 0, 0, 0, -1, 0, 1, -1, -1, -1, -1, -1],
    [0, 1, 2, 3, 0, 2, 4, 0, 0, 0, 0, 0],
)


def colored(picture: torch.Tensor, color: tuple[int, int, int]) -> int:
    return int((picture == torch.tensor(color, dtype=torch.uint8)).all(-1).sum())


GREEN, RED = (44, 160, 44), (214, 39, 40)


def test_lines_are_as_long_as_what_a_chain_wrote() -> None:
    picture = TreePicture().draw(TREES)
    assert picture.dtype == torch.uint8
    assert picture.shape[2] == 3
    # prompt 1: unequal rewards and most branches; green 6 + 2 tokens, red 4 + 6
    green, red = colored(picture, GREEN), colored(picture, RED)
    assert green / red == pytest.approx(8 / 10, rel=0.05)
    all_green = TreePicture(correct_threshold=0.0).draw(TREES)
    assert colored(all_green, RED) == 0


def test_the_most_branched_tree_with_unequal_rewards_is_chosen() -> None:
    assert TreePicture()._choose(TREES) == [4, 5, 6, 7]
    assert TreePicture(max_chains=2)._choose(TREES) == [4, 5]
    equal = rollouts([0.0] * 8, [-1, -1, -1, -1, -1, 0, 0, -1], [0, 0, 0, 0, 0, 1, 1, 0])
    assert TreePicture()._choose(equal) == [4, 5, 6, 7]


def events(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return {tag: None for tag in EventAccumulator(str(folder)).Reload().Tags()["images"]}


@pytest.mark.parametrize("has_trees", [True, False])
def test_a_validation_writes_one_image(has_trees: bool, tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    found = TREES if has_trees else rollouts([0.0, 1.0], [], [])
    if not has_trees:
        found.info = {}
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(last_rollouts=found), loggers=[logger], is_global_zero=True,
        global_step=3,
    )  # fmt: skip
    TreePicture().on_validation_end(trainer, None)  # type: ignore[arg-type]
    trainer.is_global_zero = False
    TreePicture().on_validation_end(trainer, None)  # type: ignore[arg-type]
    logger.experiment.close()
    assert list(events(tmp_path)) == (["rollout/tree"] if has_trees else [])


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="max_chains=0"):
        TreePicture(max_chains=0)
