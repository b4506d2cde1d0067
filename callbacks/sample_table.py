"""Rollouts to read: a table in TensorBoard, histograms, and every record as JSON-lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SampleTable(Callback):
    """Shows what the policy writes, best and worst first.

    Args:
        path: JSON-lines file of the full records; a resumed run cuts it to its checkpoint.
        every_n_steps: Optimizer steps between tables.
        rows: Completions a table.
        width: Characters a cell at most.
        keep: Records in the file: ``extremes`` (best and worst of each group) or ``all`` (enough
            for the scripted engine to replay).
    """

    def __init__(
        self,
        *,
        path: str,
        every_n_steps: int = 5,
        rows: int = 8,
        width: int = 400,
        keep: Literal["extremes", "all"] = "extremes",
    ) -> None:
        if keep not in ("extremes", "all"):
            raise ValueError(f"callbacks.sample_table.keep={keep!r} must be 'extremes' or 'all'")
        self.path = Path(path)
        self.every_n_steps, self.rows, self.width, self.keep = every_n_steps, rows, width, keep
        self._bytes = 0
        self._seen = -1

    def state_dict(self) -> dict[str, Any]:
        """Length of the file and the last rollout in it."""
        return {"bytes": self._bytes, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind the checkpoint."""
        self._bytes, self._seen = int(state_dict["bytes"]), int(state_dict["seen"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut what was written after the checkpoint that is resumed (all of it, if none is).

        Not at the start of the fit: FSDP2 restores callbacks after that.
        """
        if trainer.is_global_zero and self.path.exists():
            with open(self.path, "r+b") as handle:
                handle.truncate(self._bytes)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a rollout once, at the step that first trained on it."""
        data: Any = getattr(trainer, "datamodule", None)
        rollouts = getattr(data, "last_rollouts", None)
        if rollouts is None or rollouts.index <= self._seen or not trainer.is_global_zero:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        first = self._seen < 0
        self._seen = rollouts.index
        step = trainer.global_step
        records = _records(rollouts, step)
        kept = _replayable(records, rollouts) if self.keep == "all" else _extremes(records)
        self._append(kept)
        if not first and step % self.every_n_steps:
            return
        for logger in trainer.loggers:
            board: Any = getattr(logger, "experiment", None)
            if hasattr(board, "add_text"):
                board.add_text("rollout/samples", _table(records, self.rows, self.width), step)
                for name, values in _histograms(rollouts).items():
                    if values.numel():
                        board.add_histogram(f"rollout/{name}", values, step)

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as handle:
                for record in records:
                    handle.write((json.dumps(record) + "\n").encode())
                handle.flush()
                self._bytes = handle.tell()
        except OSError as error:
            raise OSError(
                f"cannot write {self.path} ({error.strerror or error}); the last checkpoint is "
                f"intact: free space and go on with resume=auto"
            ) from error


def _records(rollouts: Any, step: int) -> list[dict[str, Any]]:
    advantages = rollouts.advantages
    if advantages.ndim == 2:
        advantages = advantages.sum(1)
    records = []
    for index, (prompt, completion) in enumerate(
        zip(rollouts.prompts, rollouts.completions, strict=True)
    ):
        render = prompt.task.render
        records.append(
            {
                "step": step,
                "rollout": rollouts.index,
                "uid": prompt.uid,
                "group": int(rollouts.groups[index]),
                "domain": prompt.domain,
                "prompt": render(prompt.token_ids),
                "completion": render(completion.token_ids),
                "label": prompt.label,
                "finish_reason": completion.finish_reason.value,
                "advantage": float(advantages[index]),
                **{name: float(value[index]) for name, value in rollouts.parts.items()},
                "token_ids": list(completion.token_ids),
                **_observed(completion),
                "logprobs": [round(value, 6) for value in completion.logprobs],
                "policy_version": completion.policy_version,
                **{name: values[index] for name, values in rollouts.info.items()},
            }
        )
    return records


def _observed(completion: Any) -> dict[str, list[int]]:
    """Places of the tokens that an environment wrote; nothing where the policy wrote them all."""
    marks = completion.observed
    if marks is None:
        return {}
    return {"observed": [place for place, mark in enumerate(marks) if mark]}


def _replayable(records: list[dict[str, Any]], rollouts: Any) -> list[dict[str, Any]]:
    """Records with the candidates of every position, unrounded: they say where a tree branches."""
    found = [completion.candidates for completion in rollouts.completions]
    return [
        record
        if one is None
        else record | {"candidates": {"ids": one.ids.tolist(), "logprobs": one.logprobs.tolist()}}
        for record, one in zip(records, found, strict=True)
    ]


def _extremes(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    kept = []
    for group in groups.values():
        best = max(group, key=lambda record: record["reward"])
        worst = min(group, key=lambda record: record["reward"])
        kept += [best] if best is worst else [best, worst]
    return kept


def _table(records: list[dict[str, Any]], rows: int, width: int) -> str:
    """A Markdown table, best and worst completions first."""
    ordered = sorted(records, key=lambda record: -record["advantage"])
    half = (rows + 1) // 2
    chosen = ordered[:half] + ordered[max(half, len(ordered) - rows // 2) :][::-1]
    hidden = {"token_ids", "logprobs", "group", "rollout", "policy_version", "step", "uid"}
    names = [name for name in records[0] if name not in hidden | {"observed"}]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for record in chosen:
        lines.append("| " + " | ".join(_cell(record[name], width) for name in names) + " |")
    return "\n".join(lines)


def _cell(value: Any, width: int) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    text = text if len(text) <= width else text[: width // 2] + " ... " + text[-width // 2 :]
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
        text = text.replace(mark, entity)
    return text.replace("\n", "<br>").replace("*", "&#42;").replace("`", "&#96;")


def _histograms(rollouts: Any) -> dict[str, torch.Tensor]:
    surprise = [
        -value
        for c in rollouts.completions
        for value, mark in zip(c.logprobs, c.observed or [False] * len(c.logprobs), strict=True)
        if not mark
    ]
    return {
        "reward_histogram": rollouts.reward.float(),
        "length_histogram": torch.tensor([float(c.num_written) for c in rollouts.completions]),
        "advantage_histogram": rollouts.advantages.float().flatten(),
        "token_surprise_histogram": torch.tensor(surprise),
    }
