"""Bags in turn, merged at the end: BOOM (arXiv 2602.05787) for any module with an export.

A datamodule with bags (``data.schedule.bags``) trains one model a stage:

    start of a stage   weights back to those of the run's start, optimizer states gone
    end of a stage     the model is exported to ``bags/<number>``
    end of training    the exports (and ``include``) are merged, tensor by tensor on disk, and the
                       merge becomes the module's weights: validated, tested and exported

All bags start from the same weights and are trained by the same schedule [summary of the paper]. A
killed run goes on in its bag: exports of earlier bags are on disk, and a merge is made anew from
them. A run that ends early merges what was trained, the open bag included; one model is its own
merge. Sharded weights are gathered a tensor at a time; adapters are folded before they are merged,
since a mean of products is not the product of means [code].
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.merge_figures import MergeReport
from lightning_modules.functional.merging import METHODS, argument_problems
from lightning_modules.functional.states import (
    exported_weights,
    folder_tensors,
    load_dense,
    read_tensors,
    reshard,
    write_tensors,
)
from run_tools.merge_sources import check_alike, open_source
from run_tools.merged import merge_folders, read_report

KEY = "callbacks.model_merging"


class ModelMerging(Callback):
    """Trains bags in turn and merges them.

    Args:
        folder: Where exports of the bags, the start and the merge go.
        method: A name of ``functional.merging.METHODS``; BOOM's is ``multislerp``.
        weights: ``equal``, ``size`` (in proportion to the batches that a bag was trained on), or a
            number for each bag and then for each of ``include``.
        use_base: Merge differences from the start instead of weights; task arithmetic, TIES and
            DARE always do.
        options: Of the method, such as ``density``, and ``one_d``.
        include: Exported folders merged beside the bags, such as the model of an earlier run
            (BOOM's incremental update).
        validate: Also measure the merge on the validation split, as ``val/merged/...``.

    Raises:
        ValueError: Weights are of another kind.

    Example:
        >>> ModelMerging(folder="bags").method
        'multislerp'
    """

    def __init__(
        self,
        *,
        folder: str,
        method: str = "multislerp",
        weights: str | list[float] = "equal",
        use_base: bool = False,
        options: dict[str, Any] | None = None,
        include: list[str] | None = None,
        validate: bool = True,
    ) -> None:
        if isinstance(weights, str) and weights not in ("equal", "size"):
            raise ValueError(f"{KEY}.weights={weights!r} must be equal, size or a list of numbers")
        if weights == "size" and include:
            raise ValueError(
                f"{KEY}.weights=size does not know the sizes of {KEY}.include: give a list"
            )
        self.folder, self.method, self.weights = Path(folder), method, weights
        self.use_base, self.options = use_base, dict(options or {})
        self.include, self.validate = list(include or []), validate
        self._ends: list[int] = []  # optimizer steps at which the stages end

    # ------------------------------------------------------------------ in training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand in front of callbacks that export or save the weights when training ends."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the merge before anything is trained; keep the weights of the start.

        Raises:
            ValueError: The merge is not possible, or could not be loaded into this model.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        steps = list(getattr(data, "bag_steps", [trainer.max_steps]))
        self._ends = list(accumulate(steps))
        if problems := self._problems(trainer, steps):
            raise ValueError("; ".join(problems))
        if self._is_alone(len(steps)):
            return
        module: Any = pl_module
        exported_weights(module.policy.base)
        start = self.folder / "start.safetensors"
        if trainer.global_step == 0:
            write_tensors(start, _trainable(pl_module).items(), is_writer=trainer.is_global_zero)
            self._export(trainer, pl_module, "start")  # what figures measure distances from
        elif not start.is_file():
            raise ValueError(f"{start} is gone: the bags to come could not start from it")
        trainer.strategy.barrier()
        if self.include:
            check_alike(
                [open_source(one) for one in [self.folder / "start", *map(Path, self.include)]]
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """First micro-batch of a further stage: back to the start."""
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        if is_first and trainer.global_step in self._ends[:-1]:
            read_tensors(self.folder / "start.safetensors", _trainable(pl_module))
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Last optimizer step of a stage: export its model."""
        is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_last and trainer.global_step in self._ends and not self._is_alone(len(self._ends)):
            self._export(trainer, pl_module, str(self._ends.index(trainer.global_step)))

    def _export(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.folder.mkdir(parents=True, exist_ok=True)
        module.export(self.folder / name, data.task.tokenizer)

    # ------------------------------------------------------------------ at the end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge what is there, and let the module be the merge."""
        steps = self._trained(trainer.global_step)
        if self._is_alone(len(steps)):
            return
        if trainer.global_step not in self._ends:  # cut short: the open bag counts, too
            self._export(trainer, pl_module, str(len(steps) - 1))
        merged = self.folder / "merged"
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._merge(steps, merged)
        trainer.strategy.barrier()
        module: Any = pl_module
        reshard(module)
        load_dense(module.policy.base, folder_tensors(merged))
        module.saves_all = True  # a checkpoint of adapters alone would lose the merge
        values = _figures(read_report(merged))
        if self.validate:
            values |= self._validated(trainer, module)
        module.results |= values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _trained(self, global_step: int) -> list[int]:
        """Optimizer steps of each stage so far; stages that have not begun are left out."""
        starts = [0, *self._ends[:-1]]
        both = zip(starts, self._ends, strict=True)
        return [min(global_step, end) - start for start, end in both if start < global_step]

    def _merge(self, steps: list[int], merged: Path) -> None:
        shutil.rmtree(merged, ignore_errors=True)
        start = self.folder / "start"
        merge_folders(
            [*(self.folder / str(number) for number in range(len(steps))), *self.include],
            merged,
            self.method,
            self._shares(steps),
            base=start if self._needs_base() else None,
            options=self.options,
            reference=start if start.is_dir() else None,
        )

    def _problems(self, trainer: Trainer, steps: list[int]) -> list[str]:
        problems = [
            f"{KEY}.include: {one} is no folder; give a run's export/"
            for one in self.include
            if not Path(one).is_dir()
        ]
        if len(steps) > 1 and trainer.max_epochs != 1 and not 0 < trainer.max_steps <= sum(steps):
            problems.append(
                f"trainer.max_epochs={trainer.max_epochs} must be 1 with data.schedule.bags: each "
                f"bag is trained once; for more passes give data.schedule.epochs"
            )
        if self._is_alone(len(steps)):
            check_choice(f"{KEY}.method", self.method, tuple(METHODS))
            return problems
        return problems + argument_problems(
            self.method,
            len(steps) + len(self.include),
            weights=self._shares(steps),
            has_base=True,
            options=self.options,
            key=f"{KEY}.",
        )

    def _is_alone(self, count: int) -> bool:
        """One model is its own merge, where it is not a matter of differences."""
        return count + len(self.include) < 2 and not self._needs_base()

    def _needs_base(self) -> bool:
        return self.use_base or (self.method in METHODS and METHODS[self.method].needs_base)

    def _shares(self, steps: list[int]) -> list[float] | None:
        if self.weights == "equal":
            return None
        if self.weights == "size":
            return [float(count) for count in steps]
        given = [float(weight) for weight in self.weights]
        left_out = len(self._ends) - len(steps)  # bags that a run which ends early has not begun
        return [*given[: len(steps)], *given[len(steps) + left_out :]]

    @staticmethod
    def _validated(trainer: Trainer, module: Any) -> dict[str, float]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for number, batch in enumerate(data.val_dataloader()):
            if number >= sum(trainer.num_val_batches or [0]):
                break
            module.add_evaluation(module.evaluate(batch, "val"))
        found = module.finish_evaluation("val")
        return {f"val/merged/{tag.removeprefix('val/')}": value for tag, value in found.items()}


def _trainable(module: LightningModule) -> Mapping[str, Tensor]:
    reshard(module)
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _figures(report: MergeReport) -> dict[str, float]:
    """Scalars of a merge: means over pairs of models, distances from the start."""
    found = {"merge/cosine": _mean_of_pairs(report.cosines)}
    if report.update_cosines is not None:
        found["merge/update_cosine"] = _mean_of_pairs(report.update_cosines)
    if report.distances is not None and report.distance is not None:
        found["merge/distance"] = report.distance
        found["merge/distance_models"] = sum(report.distances) / len(report.distances)
    if report.norm_factor is not None:
        found["merge/norm_factor"] = report.norm_factor
    return {tag: value for tag, value in found.items() if math.isfinite(value)}


def _mean_of_pairs(cosines: list[list[float | None]]) -> float:
    pairs = [c for i, row in enumerate(cosines) for c in row[:i] if c is not None]
    return sum(pairs) / len(pairs) if pairs else math.nan
