"""Hard negatives mined with the model in training: what it takes for answers and is none.

At the start of training, and every so many steps after, all queries and passages of each training
set are embedded (the ranks share the work), the nearest passages that are no known positives are
found exactly, and the rows get them as their negatives until the next time. Margins keep false
negatives out, see ``functional.search.mine_negatives``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.functional.search import mine_negatives

KEY = "callbacks.hard_negatives"


class HardNegatives(Callback):
    """Mines negatives for ``PairDataModule``.

    Args:
        count: Negatives a row; ``data.num_negatives`` must be at least that.
        every_n_steps: Mine again after so many optimizer steps; None for once, at the start.
        range_min: Nearest candidates to skip.
        range_max: Rank at which the candidates end.
        absolute_margin: Drop candidates nearer than the positive minus this; None for none.
        relative_margin: Drop candidates above the positive's cosine times one minus this
            (NV-Retriever's rule, arXiv 2407.15831); None for none.
        sampling: ``top`` for the nearest candidates, ``random`` for a draw among all of them.
        seed: Of that draw.

    Raises:
        ValueError: Counts out of range.

    Example:
        >>> HardNegatives(count=4, relative_margin=0.05).count
        4
    """

    def __init__(
        self,
        *,
        count: int = 4,
        every_n_steps: int | None = None,
        range_min: int = 0,
        range_max: int = 50,
        absolute_margin: float | None = None,
        relative_margin: float | None = 0.05,
        sampling: Literal["top", "random"] = "top",
        seed: int = 0,
    ) -> None:
        low = {"count": (count, 1), "range_min": (range_min, 0)}
        low |= {} if every_n_steps is None else {"every_n_steps": (every_n_steps, 1)}
        problems = [
            f"{KEY}.{name}={value} must be at least {least}"
            for name, (value, least) in low.items()
            if value < least
        ]
        if range_max < range_min + count:
            problems.append(f"{KEY}.range_max={range_max} must be at least range_min + count")
        if problems:
            raise ValueError("; ".join(problems))
        self.count, self.every_n_steps, self.seed = count, every_n_steps, seed
        self.options: dict[str, Any] = {
            "count": count,
            "range_min": range_min,
            "range_max": range_max,
            "absolute_margin": absolute_margin,
            "relative_margin": relative_margin,
            "sampling": sampling,
        }
        #: Data set -> for each row the places of its negatives among the set's passages.
        self.mined: dict[str, list[list[int]]] = {}
        self.mined_at = -1

    def state_dict(self) -> dict[str, Any]:
        """What was mined, and at which step."""
        return {"mined": self.mined, "mined_at": self.mined_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same negatives."""
        self.mined, self.mined_at = state_dict["mined"], state_dict["mined_at"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine, or hand out again what a resumed run had mined.

        Raises:
            ValueError: The data takes fewer negatives than are mined, or none at all.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        room = getattr(data, "num_negatives", None)
        if room is None or room < self.count:
            raise ValueError(
                f"{KEY}.count={self.count} needs data.num_negatives={self.count} or more, and data "
                f"of pairs"
            )
        if self.mined_at < 0:
            self.mine(trainer, pl_module)
        self._hand_out(data)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mine again when it is due; the batch at hand still has the old ones."""
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        step = trainer.global_step
        if not is_first or self.every_n_steps is None or step == self.mined_at:
            return
        if step and step % self.every_n_steps == 0:
            self.mine(trainer, pl_module)
            self._hand_out(trainer.datamodule)  # type: ignore[attr-defined]

    def mine(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Embed the training sets and find their negatives."""
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found: dict[str, list[list[int]]] = {}
        short, rows, dropped = 0, 0, 0
        for pairs in data.training_sets():
            items, known = data.passages_of(pairs)
            told = data.encoding.instructions.get(pairs.name, pairs.instruction)
            queries = module.shared_vectors([row.query for row in pairs.rows], "query", told)
            corpus = module.shared_vectors(items, "passage", told)
            mined = mine_negatives(queries, corpus, known=known, seed=self.seed, **self.options)
            found[pairs.name] = mined.negatives
            short, rows = short + mined.num_short, rows + len(pairs.rows)
            dropped += sum(mined.num_dropped_by_margin.values())
        self.mined, self.mined_at = found, trainer.global_step
        if short == rows:
            rank_zero_warn(f"{KEY} found too few negatives for every row: loosen the margins")
        module.record(
            {
                "train/mined_short": (float(short), float(rows)),
                "train/mined_dropped": (float(dropped), float(rows)),
            }
        )

    def _hand_out(self, data: Any) -> None:
        mined: Mapping[str, list[list[int]]] = self.mined
        data.mined = mined
