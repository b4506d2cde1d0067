"""Metered steps of a run, each done once for machines that are alike."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from run_tools import plan_steps as steps
from run_tools.plan_memory import Machine
from run_tools.plan_prompts import Lengths, draw
from run_tools.plan_steps import Numbers
from run_tools.plan_time import Work, waves


@dataclass
class Step:
    """A metered step of one GPU.

    Args:
        numbers: Of a micro-batch and a rollout.
        other: Of a micro-batch of another size, where one could be made.
        other_rows: Its sequences.
        work: What there is to do.
        prompts: Of a rollout.
        sequences: Of a rollout.
        rows: Sequences of the largest micro-batch.
        tokens: Its tokens, prompts and completions, padding included.
        completion: Longest completion (tokens).
    """

    numbers: Numbers = field(default_factory=Numbers)
    other: Numbers | None = None
    other_rows: int = 0
    work: Work = field(default_factory=Work)
    prompts: int = 0
    sequences: int = 0
    rows: int = 0
    tokens: int = 0
    completion: int = 0


class Runs:
    """Meters steps of a module on data, machine by machine.

    Args:
        module: Without data (``plan_meter.take_data_away``).
        data: Its datamodule.
        lengths: Of prompts, by domain; empty for data without rollouts.
        is_sharded: Whether weights are sharded.
        mixed: Dtype of mixed precision, or None.
        window: Micro-batches an optimizer step where the data do not say.
    """

    def __init__(
        self,
        module: Any,
        data: Any,
        lengths: Mapping[str, Lengths],
        *,
        is_sharded: bool,
        mixed: torch.dtype | None,
        window: int,
    ) -> None:
        self.module, self.data, self.lengths = module, data, lengths
        self.is_sharded, self.mixed, self.window = is_sharded, mixed, window
        self.found: dict[Any, Step] = {}
        self.shallower: dict[Any, Step] = {}
        self.keys: dict[str, Any] = {}
        self.problems: dict[str, str] = {}
        self.notes: list[str] = []

    def of(self, machine: Machine) -> Step:
        """The step on a machine that has no problem."""
        return self.found[self.keys[machine.name]]

    def measure(self, machines: Sequence[Machine]) -> dict[Any, Step]:
        """Meter a step for every machine, at the module's present depth."""
        found: dict[Any, Step] = {}
        for machine in machines:
            with steps.attached(self.module, self.data, machine.gpus):
                prompts, share = draw(self.data, self.lengths, machine.gpus, self.notes)
                sizes = tuple(len(prompt.token_ids) for prompt in prompts)
                is_alone = machine.gpus == 1 and not self.is_sharded
                key = self.keys[machine.name] = (sizes, machine.is_cuda, is_alone)
                if key in found or machine.name in self.problems:
                    continue
                try:
                    found[key] = self._step(prompts, share, machine.is_cuda, is_alone)
                except ValueError as error:
                    self.problems[machine.name] = str(error)
        self.found = found
        return found

    def draw_out(
        self, deep: Mapping[Any, Step], shallow: Mapping[Any, Step], factor: float
    ) -> None:
        """Steps of a deeper model from those at two depths; see ``Numbers.towards``."""
        for key, step in deep.items():
            step.numbers = step.numbers.towards(shallow[key].numbers, factor)
            other = shallow[key].other
            if step.other is not None and other is not None:
                step.other = step.other.towards(other, factor)
        self.found = dict(deep)

    def _step(self, prompts: list[Any], share: float, is_cuda: bool, is_alone: bool) -> Step:
        module, data = self.module, self.data
        if self.is_sharded:  # weights that look like shards: the model then shares no prompts
            for parameter in module.parameters():
                parameter.full_tensor = None
        step = Step(prompts=len(prompts))
        step.work.window = int(getattr(data, "window", self.window))
        own: dict[str, Any] = {"is_cuda": is_cuda, "autocast": self.mixed}
        if prompts:
            batch = self._rollout(prompts, share, step, own)
        else:
            batch = next(iter(data.train_dataloader()))
        step.rows, step.tokens = len(batch.input_ids), batch.input_ids.numel()
        own |= {"accumulates": is_alone and step.work.window > 1, "with_gradients": is_alone}
        steps.measure_training(module, batch, step.numbers, **own)
        if hasattr(batch, "select"):
            rows = torch.arange(step.rows // 2) if step.rows > 1 else torch.zeros(2).long()
            step.other, step.other_rows = copy.deepcopy(step.numbers), len(rows)
            steps.measure_training(module, batch.select(rows), step.other, **own)
        return step

    def _rollout(self, prompts: list[Any], share: float, step: Step, own: dict[str, Any]) -> Any:
        """Meter a rollout; returns its largest micro-batch."""
        module, data, work = self.module, self.data, step.work
        rollouts, requests = steps.make_rollouts(module, data, prompts)
        step.sequences = len(rollouts)
        step.completion = max(len(one.token_ids) for one in rollouts.completions)
        work.updates, work.prompt_share = rollouts.num_updates, share
        work.is_eager = hasattr(data.engine, "max_cached_tokens")
        chunks = [steps.largest_chunk(data.engine, one) for one in requests]
        if chunks and steps.is_local(data.engine):
            work.request = max(chunks, key=steps.cached_tokens)
            work.waves = waves(requests, work.request)
            steps.measure_decoding(
                module, work.request, step.numbers, is_cuda=own["is_cuda"], is_padded=share < 1
            )
        rollouts.annotations(steps.measure_annotate(module, rollouts, step.numbers, **own))
        pieces = steps.micro_batches(module, data, rollouts)
        return max(pieces, key=lambda piece: piece.input_ids.numel())
