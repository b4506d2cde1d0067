"""BaseModule: the backbone, its sharding, the optimizer, honest logging and checkpoints.

What every method shares and no method changes. Families build on it; see ``policy_rl/base.py``.

Logging: hooks hand out metrics as sums and counts (``record``); they are added over the
accumulation window and the ranks and logged once an optimizer step, at x = ``trainer.global_step``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from datamodules.loader import gather_objects
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.export import backbone_files, export_hf
from lightning_modules.backbones.sharding import shard
from lightning_modules.functional.sums import (
    Metrics,
    Summary,
    means,
    merge,
    merge_summaries,
    summary_scalars,
)
from lightning_modules.optim import build_optimizer, total_steps
from lightning_modules.options import (
    BackboneOptions,
    KernelOptions,
    LoraOptions,
    OptimizerOptions,
    read_options,
)
from lightning_modules.resuming import (
    named_optimizer_state,
    numbered_optimizer_state,
    what_is_lost,
)

AnyMetrics = Mapping[str, "tuple[Tensor | float, Tensor | float] | Summary"]


class BaseModule(LightningModule):
    """Backbone, optimizer, logging and checkpoints of every method.

    Args:
        backbone: Options of the backbone, or a folder or hub name.
        optimizer: Options of the optimizer.
        lora: Options of the adapters; None trains all parameters.
        kernel: Options of the fused head; None for its defaults.
        max_bad_steps: Steps with a non-finite gradient that are skipped before the run stops.
        progress: Short name on the progress bar -> logged tag.
    """

    #: Modules (besides the policy) that hold trainable parameters, by attribute name.
    trainable_parts: tuple[str, ...] = ("policy",)

    def __init__(
        self,
        *,
        backbone: Mapping[str, Any] | str | BackboneOptions,
        optimizer: Mapping[str, Any] | OptimizerOptions | None = None,
        lora: Mapping[str, Any] | LoraOptions | None = None,
        kernel: Mapping[str, Any] | KernelOptions | None = None,
        max_bad_steps: int = 10,
        progress: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        values = {"path": backbone} if isinstance(backbone, str) else backbone
        self.backbone_options = read_options(BackboneOptions, values, "backbone")
        self.optimizer_options = read_options(OptimizerOptions, optimizer, "optimizer")
        self.lora_options = None if lora is None else read_options(LoraOptions, lora, "lora")
        self.kernel_options = read_options(KernelOptions, kernel, "kernel")
        self.max_bad_steps = max_bad_steps
        self.progress = dict(progress or {})
        self.policy: Any = None  # a CausalLM, once configure_model has built it
        self.bad_steps = 0
        self.strict_loading = False  # our own check in on_load_checkpoint is stricter and clearer
        self.task_name = ""
        self.task_settings: dict[str, Any] = {}  # what makes the task again, for exported judges
        #: Newest value of every logged tag, in full precision.
        self.results: dict[str, float] = {}
        #: Whether checkpoints hold weights that ``backbone.path`` does not give back (merges).
        self.saves_all = False
        self._window: Metrics = {}
        self._summaries: dict[str, Summary] = {}
        self._logged_step = 0
        self._batches: list[Any] = []  # of the open window
        self._norms: list[Any] = []  # of each role, from on_before_optimizer_step to clipping
        self._files: dict[str, str] | None = None

    # ------------------------------------------------------------------ building and sharding

    def setup(self, stage: str) -> None:
        """Keep batches as they are: ``bf16-true`` would round log-probs, values and advantages."""
        plugin: Any = self.trainer.precision_plugin
        plugin.convert_input = _unchanged

    def configure_model(self) -> None:
        """Build the parts once and shard them where there is a device mesh."""
        if self.policy is not None:
            return
        self.build()
        if self.device_mesh is not None:
            options = getattr(self.trainer.strategy, "options", None)
            shard(self, self.trainable_parts, self.device_mesh["data_parallel"], options)

    def build(self) -> None:
        """Make the policy. Families with further parts (critic, reference) extend this."""
        self.policy = load_causal_lm(
            self.backbone_options, self.lora_options, kernel=self.kernel_options
        )

    # ------------------------------------------------------------------ optimization

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of one optimizer; groups of one ``role`` are clipped together."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": parameters, "role": "policy"}]

    def configure_optimizers(self) -> Any:
        """One optimizer over ``parameter_groups`` with a schedule over the whole run."""
        steps = self.stage_steps(total_steps(self.trainer))
        return build_optimizer(self.parameter_groups(), self.optimizer_options, steps)

    def stage_steps(self, total: int) -> list[int]:
        """Optimizer steps of each stage of the run: the learning rate starts again with a stage.

        Args:
            total: Optimizer steps of the run.
        """
        return [total]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log gradient norm and learning rate; drop a non-finite gradient on every rank."""
        self._norms = [
            nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for group in _by_role(optimizer)
        ]
        norm = math.sqrt(sum(_number(value) ** 2 for value in self._norms))
        self.record({"train/lr": (float(optimizer.param_groups[0]["lr"]), 1.0)})
        if math.isfinite(norm):
            self.record({"train/grad_norm": (norm, 1.0)})
            return
        self.bad_steps += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # zeros would still apply momentum and weight decay
        rank_zero_warn(f"skipped optimizer step {self.global_step}: the gradient is not finite")
        if self.bad_steps >= self.max_bad_steps:
            self._save_bad_batch()
            raise RuntimeError(
                f"{self.bad_steps} steps had a non-finite gradient (model.max_bad_steps="
                f"{self.max_bad_steps}); the last window's batches are in bad_batch.pt of the run "
                f"folder, a list a rank"
            )

    def _save_bad_batch(self) -> None:
        """The window's micro-batches of every rank: one list a rank, as any of them may be bad."""
        mine = [_plain(batch) for batch in self._batches]
        ranks = gather_objects(mine)
        if self.trainer.is_global_zero and mine:
            torch.save(ranks, f"{self.trainer.default_root_dir}/bad_batch.pt")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each role's groups by their own norm."""
        if not gradient_clip_val:
            return
        roles = _by_role(optimizer)
        norms = self._norms or [None] * len(roles)
        for parameters, norm in zip(roles, norms, strict=True):
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            elif norm is None:
                nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
            else:
                nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self._norms = []

    # ------------------------------------------------------------------ logging

    def record(self, metrics: AnyMetrics) -> None:
        """Add metrics (sums and counts, or summaries) to the open window.

        Args:
            metrics: Tag -> ``(sum, count)`` or ``Summary``. An absent tag logs nothing.
        """
        pairs: Metrics = {}
        summaries: dict[str, Summary] = {}
        for name, value in metrics.items():
            if isinstance(value, Summary):
                summaries[name] = value
            else:
                pairs[name] = value
        self._window = merge(self._window, pairs)
        self._summaries = merge_summaries(self._summaries, summaries)

    def on_train_start(self) -> None:
        """Open the first window: what was recorded before belongs to no step."""
        self._logged_step = self.trainer.global_step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep the window's batches so that they can be saved if its gradient is not finite."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._batches = []
        self._batches.append(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the window if its optimizer step is done."""
        self.log_window()

    def log_window(self) -> None:
        """Log and close the window, once an optimizer step; between steps this does nothing.

        The checkpoint callback calls it before it saves, so that a resumed run has each step once.
        """
        step = self.trainer.global_step
        if step == self._logged_step or not self._window:
            return
        self._logged_step = step
        values = self.reduce_window()
        values["train/bad_steps"] = float(self.bad_steps)
        self.results |= values
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=step)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        watched = {str(getattr(callback, "monitor", "")) for callback in callbacks}
        self.log_dict({tag: values[tag] for tag in watched & values.keys()}, logger=False)
        for name, tag in self.progress.items():
            if tag in values:
                self.log(name, values[tag], prog_bar=True, logger=False)

    def reduce_window(self) -> dict[str, float]:
        """Close the window: its metrics over all ranks as plain numbers."""
        pairs = {k: (float(total), float(count)) for k, (total, count) in self._window.items()}
        summaries = self._summaries
        self._window, self._summaries = {}, {}
        everything = gather_objects((pairs, {k: astuple(v) for k, v in summaries.items()}))
        merged: Metrics = {}
        merged_summaries: dict[str, Summary] = {}
        for other_pairs, other_summaries in everything:
            merged = merge(merged, other_pairs)
            merged_summaries = merge_summaries(
                merged_summaries, {k: Summary(*v) for k, v in other_summaries.items()}
            )
        return means(merged) | summary_scalars(merged_summaries)

    # ------------------------------------------------------------------ checkpoints and export

    def export(self, folder: str | Path, tokenizer: Any) -> None:
        """Write the policy as a plain Hugging Face folder; every rank must call it."""
        assert self.policy is not None
        info = self.export_info()
        is_writer = self._trainer is None or self.trainer.is_global_zero
        export_hf(
            self.policy,
            tokenizer,
            folder,
            info=info,
            is_writer=is_writer,
            extras=self.write_extras,
        )

    def write_extras(self, folder: Path) -> None:
        """Add further files to an export; none here.

        Args:
            folder: Holds model and tokenizer already.
        """

    def after_load(self, data: Any) -> None:
        """Take what a loaded module needs of its data (``train.load``).

        Args:
            data: The datamodule, bound to the tokenizer.
        """
        self.judge_task = data.task

    def export_info(self) -> dict[str, Any]:
        """What ``litpost.json`` of the exported folder says."""
        module = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"module": module, "task": self.task_name}

    def _is_saved(self, name: str) -> bool:
        if name.startswith("reference."):
            return False  # frozen, comes back from backbone.path
        return (
            self.saves_all
            or self.lora_options is None
            or "lora_" in name
            or not name.startswith("policy.")
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what ``backbone.path`` gives back; add what makes the file self-contained."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if self._is_saved(k)}
        trainer = self.trainer
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [
                named_optimizer_state(state, self, optimizer, trainer.strategy)
                for state, optimizer in zip(
                    checkpoint["optimizer_states"], trainer.optimizers, strict=True
                )
            ]
        checkpoint["litpost"] = {
            "module": f"{type(self).__module__}.{type(self).__qualname__}",
            "task": self.task_name,
            "architecture": type(self.policy.base).__name__ if self.policy else "",
            "world_size": self.trainer.world_size,
            "bad_steps": self.bad_steps,
            "saves_all": self.saves_all,
            "results": dict(self.results),
            "files": self._backbone_files(),
        }

    def _backbone_files(self) -> dict[str, str]:
        """Configuration and tokenizer as texts, so that a checkpoint needs no other folder."""
        if self._files is None and self.policy is not None:
            self._files = backbone_files(self.backbone_options.path)
            self._files["config.json"] = self.policy.config.to_json_string(use_diff=False)
        return self._files or {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model before anything is loaded.

        Raises:
            ValueError: Keys or shapes differ; names the first and both models.
        """
        made = checkpoint.get("litpost", {})
        self.bad_steps = int(made.get("bad_steps", 0))
        self.saves_all = bool(made.get("saves_all", False))
        if self._trainer is not None and self.trainer.training:
            self.results |= made.get("results", {})
            if lost := what_is_lost(checkpoint, self.trainer.world_size):
                rank_zero_warn(lost)
        if states := checkpoint.get("optimizer_states"):
            checkpoint["optimizer_states"] = [numbered_optimizer_state(state) for state in states]
        if not checkpoint.get("state_dict"):
            return  # under sharding only rank 0 holds the full state
        saved = {k: tuple(v.shape) for k, v in checkpoint["state_dict"].items()}
        if self.policy is None:
            self.configure_model()
        mine = {k: tuple(v.shape) for k, v in self.state_dict().items() if self._is_saved(k)}
        wrong = [k for k in sorted(saved.keys() | mine.keys()) if saved.get(k) != mine.get(k)]
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"the checkpoint is of another model: {len(wrong)} of its tensors do not fit, such "
                f"as {name} (checkpoint {saved.get(name, 'has none')}, model "
                f"{mine.get(name, 'has none')}). It was made by {made.get('module', 'unknown')} "
                f"({made.get('architecture', 'unknown')}) on task '{made.get('task', 'unknown')}'; "
                f"give the same model=, backbone=, lora= and data= as then"
            )


def _unchanged(batch: Any) -> Any:
    return batch


def _plain(batch: Any) -> Any:
    """Plain containers of CPU tensors where the batch knows how to become that."""
    state = getattr(batch.to("cpu") if hasattr(batch, "to") else batch, "state", None)
    return state() if callable(state) else batch


def _by_role(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    roles: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        roles.setdefault(group.get("role", "policy"), []).extend(group["params"])
    return list(roles.values())


def _number(norm: Tensor) -> float:
    full = getattr(norm, "full_tensor", None)  # sharded gradients give a sharded norm
    return float(full() if full is not None else norm)
