"""One tree of completions as a picture in TensorBoard: who branched where, and its worth."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.functional.trees import node_values


class TreePicture(Callback):
    """Draws a tree of the last rollout at every validation, as the image ``rollout/tree``.

    Chains are rows in the order of their creation, tokens run to the right. A line is what a chain
    wrote itself, green where its reward is at least ``correct_threshold``, else red; thin lines
    lead to the chain that it branched from; dots are nodes with their values (mean reward of the
    chains that pass through). Of all prompts the one with the most branches is drawn, among those
    with unequal rewards if there are any. Does nothing for rollouts without trees.

    Args:
        correct_threshold: Least reward that is drawn green.
        max_chains: Most rows.
    """

    def __init__(self, *, correct_threshold: float = 0.5, max_chains: int = 32) -> None:
        if max_chains < 1:
            raise ValueError(f"callbacks.tree_picture.max_chains={max_chains} must be at least 1")
        self.correct_threshold, self.max_chains = correct_threshold, max_chains

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on the main process and where there is a TensorBoard."""
        data: Any = getattr(trainer, "datamodule", None)
        rollouts = getattr(data, "last_rollouts", None)
        found: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        boards = [board for board in found if hasattr(board, "add_image")]
        if not (boards and trainer.is_global_zero) or rollouts is None:
            return
        if rollouts.reward is None or "parent" not in rollouts.info:
            return
        picture = self.draw(rollouts)
        for board in boards:
            board.add_image("rollout/tree", picture, trainer.global_step, dataformats="HWC")

    def draw(self, rollouts: Any) -> torch.Tensor:
        """The picture ``(height, width, 3)`` of one tree, uint8.

        Args:
            rollouts: Scored, with ``parent`` and ``branch_pos`` in ``info``.
        """
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = self._choose(rollouts)
        parent, branch_pos = (
            torch.tensor([rollouts.info[name][row] for row in rows])
            for name in ("parent", "branch_pos")
        )
        reward = rollouts.reward[rows].float()
        lengths = torch.tensor([len(rollouts.completions[row].token_ids) for row in rows])
        figure = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), dpi=80, layout="constrained")
        axes = figure.add_subplot()
        for chain, (origin, start, length) in enumerate(
            zip(parent.tolist(), branch_pos.tolist(), lengths.tolist(), strict=True)
        ):
            color = "tab:green" if reward[chain] >= self.correct_threshold else "tab:red"
            axes.plot([start, length], [chain, chain], color=color, linewidth=3)
            axes.annotate(f" {float(reward[chain]):g}", (length, chain), va="center", fontsize=8)
            if origin >= 0:
                axes.plot([start, start], [origin, chain], color="0.6", linewidth=0.8, zorder=0)
        for (owner, position), value in node_values(reward, parent, branch_pos, lengths).items():
            axes.plot([position], [owner], "o", color="black", markersize=4)
            axes.annotate(f"{value:.2f}", (position, owner), xytext=(2, 4), fontsize=8,
                          textcoords="offset points")  # fmt: skip
        prompt = rollouts.prompts[rows[0]]
        axes.set(xlabel="token", ylabel="chain", yticks=range(len(rows)))
        axes.set_title(f"{prompt.uid}: value of the root {float(reward.mean()):.2f}", fontsize=9)
        axes.invert_yaxis()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy())

    def _choose(self, rollouts: Any) -> list[int]:
        """Rows of the completions of one prompt."""
        best: tuple[bool, int] | None = None
        chosen: list[int] = []
        for group in rollouts.groups.unique().tolist():
            rows = (rollouts.groups == group).nonzero().flatten().tolist()[: self.max_chains]
            reward = rollouts.reward[rows]
            branches = sum(rollouts.info["parent"][row] >= 0 for row in rows)
            rank = (bool(reward.max() > reward.min()), branches)
            if best is None or rank > best:
                best, chosen = rank, rows
        return chosen
