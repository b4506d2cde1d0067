"""``mode=plan``: what a run will take, before anything is started.

The module is built without memory (``meta``), its own hooks run one step on fake tensors
(``plan_steps``), and the parts are added up for this machine and for numbers of GPUs
(``plan_memory``, ``plan_time``). Deep models are metered at two depths and drawn out linearly.
What each number means and how sure it is: docs/planning.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from lightning_modules.backbones.sharding import ShardingOptions
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.options import read_options
from run_tools import plan_steps as steps
from run_tools.plan_memory import GIB, Counts, Layout, Machine, Phases, count, phases, sharding_of
from run_tools.plan_meter import take_data_away
from run_tools.plan_options import PlanOptions
from run_tools.plan_prompts import Lengths, prompt_lengths
from run_tools.plan_runs import Runs, Step
from run_tools.plan_time import flops, seconds

#: Models of more layers are metered at these two depths (multiples of the usual periods of layer
#: types) and drawn out [our choice].
DEPTHS = (4, 2)
#: ``32-true`` keeps what ``backbone.dtype`` says, as Lightning does.
PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


@dataclass
class Column:
    """The plan for one machine.

    Args:
        machine: Which.
        phases: Memory by part.
        step: What one GPU does.
        flops: Of a step on one GPU, by what they are for.
        seconds: Of a step, or empty.
        fits: Whether the peak and the reserve fit.
        weights: Bytes of all weights as the computation reads them.
        fitting_tokens: Tokens of the largest micro-batch that fits, None where not known.
        problem: Why there is no plan; empty if there is one.
    """

    machine: Machine
    phases: Phases | None = None
    step: Step | None = None
    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fits: bool = False
    weights: float = 0.0
    fitting_tokens: int | None = None
    problem: str = ""


@dataclass
class Plan:
    """Everything that is printed.

    Args:
        counts: Parameters.
        columns: One a machine.
        lengths: Of prompts, by domain.
        notes: What to know when reading it.
        options: Of the hardware.
    """

    counts: Counts
    columns: list[Column]
    lengths: dict[str, Lengths]
    notes: list[str]
    options: PlanOptions

    def flat(self) -> dict[str, Any]:
        """Plain containers for ``plan.json``."""
        columns = {}
        for column in self.columns:
            bare = column
            if column.step is not None:  # its request holds whole prompts
                work = replace(column.step.work, request=None)
                bare = replace(column, step=replace(column.step, work=work))
            found = asdict(bare)
            if column.phases is not None:
                found["phases"]["peak"] = column.phases.peak
            columns[column.machine.name] = found
        return {
            "counts": asdict(self.counts),
            "lengths": {name or "all": asdict(one) for name, one in self.lengths.items()},
            "machines": columns,
            "notes": self.notes,
        }


@contextmanager
def backbone_to_plan(options: Mapping[str, Any], task: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Options of the backbone with a path; a tiny one is made in a temporary folder, untrained.

    Args:
        options: Config group ``backbone``.
        task: Gives the vocabulary of a tiny one.
        seed: Of its weights, which nobody looks at.
    """
    own = {
        key: value
        for key, value in options.items()
        if key not in ("family", "tiny", "warm_start", "merge")
    }
    with TemporaryDirectory() as folder:
        if not own["path"]:
            own["path"] = folder
            shape = read_options(TinyOptions, options["tiny"], "backbone.tiny")
            build_tiny(folder, task.vocabulary(), shape, seed)
        yield own


def plan(module: Any, data: Any, config: Mapping[str, Any]) -> Plan:
    """Work out the plan.

    Args:
        module: The LightningModule, not yet built.
        data: Its datamodule, not prepared.
        config: The whole run as plain values.

    Raises:
        ValueError: The backbone's configuration cannot be read, or lengths cannot be known.
    """
    options = PlanOptions(**config["plan"])
    notes: list[str] = []
    _build(module, notes)
    lengths = _lengths(module, data, config, options)
    trainer, sharding = config["trainer"], sharding_of(config["trainer"])
    stored, mixed = dtypes(str(trainer["precision"]))
    counts = count(module, stored)
    take_data_away(module, stored)
    _count_optimizer(module, data, counts, max(1, int(trainer["max_steps"])))
    if sharding is not None and sharding.activation_checkpointing:
        for part in steps.parts_of(module):
            enable = getattr(getattr(part, "base", None), "gradient_checkpointing_enable", None)
            if enable is not None:
                enable({"use_reentrant": False})
    gathered = None if sharding is None else sharding.param_dtype
    runs = Runs(
        module,
        data,
        lengths,
        is_sharded=sharding is not None,
        mixed=mixed,
        window=int(trainer["accumulate_grad_batches"] or 1),
    )
    found = [Column(machine) for machine in machines(trainer, options)]
    depth = max((part.layers for part in counts.parts), default=0)
    deep, shallow = DEPTHS if depth > DEPTHS[0] else (depth, depth)
    steps.cut_layers(module, deep)
    take_data_away(module, getattr(torch, gathered) if gathered else None)
    places = [column.machine for column in found]
    metered = runs.measure(places)
    if deep != shallow:
        steps.cut_layers(module, shallow)
        take_data_away(module)
        runs.draw_out(metered, runs.measure(places), (depth - deep) / (deep - shallow))
    computed = next(iter(module.parameters())).dtype.itemsize
    engine = getattr(data, "engine", None)
    for column in found:
        column.problem = runs.problems.get(column.machine.name, "")
        if not column.problem:
            layout = Layout(counts, column.machine, sharding, computed, engine)
            _fill(column, layout, runs.of(column.machine), options)
    notes += runs.notes + remarks(found, sharding, engine)
    return Plan(counts, found, lengths, list(dict.fromkeys(notes)), options)


def _fill(column: Column, layout: Layout, step: Step, options: PlanOptions) -> None:
    """Memory, work and seconds of one machine."""
    layout.window = step.work.window
    column.step, column.phases = step, phases(layout, step.numbers)
    column.flops = flops(step.numbers, step.work, options.completion_tokens)
    column.weights = layout.counts.sum("numel", frozen=False) * layout.computed
    if column.machine.is_timed:
        column.seconds = seconds(step.numbers, step.work, column.weights, options)
    room = column.machine.memory - options.reserve_gib * GIB
    column.fits = column.phases.peak <= room
    if step.other is None:
        return
    training = sum(column.phases.training.values())
    other = sum(phases(layout, step.other).training.values())
    slope = (training - other) / (step.rows - step.other_rows)
    if slope > 0:  # bytes a sequence
        rows = step.rows + math.floor((room - training) / slope)
        column.fitting_tokens = max(0, rows) * (step.tokens // step.rows)


def remarks(columns: Sequence[Column], sharding: ShardingOptions | None, engine: Any) -> list[str]:
    """What to know when reading the plan.

    Args:
        columns: Of the plan.
        sharding: FSDP2, or None.
        engine: Of the run.
    """
    planned = [column for column in columns if column.phases is not None]
    found = []
    slow = [c.machine.name for c in planned if c.phases is not None and not c.phases.is_whole]
    if slow and hasattr(engine, "max_cached_tokens"):
        found.append(
            f"{', '.join(slow)}: all weights do not fit beside the rest, so they are gathered "
            f"layer by layer for every token, which is slow and not in the seconds "
            f"(trainer.strategy.unshard_for_rollout)"
        )
    if planned and engine is not None and not steps.is_local(engine):
        name = type(engine).__name__
        found.append(
            f"{name} samples on devices of its own: its memory and seconds are not planned"
        )
    for column in planned:
        assert column.phases is not None and column.step is not None
        room = column.phases.rollout["engine"] - column.weights
        wanted = column.step.numbers.decode.parts["kv_cache"]
        if column.phases.rollout["engine"] and wanted > room:
            found.append(
                f"{column.machine.name}: the engine's KV cache holds {max(0.0, room) / GIB:.1f} of "
                f"{wanted / GIB:.1f} GiB that engine.max_num_seqs completions of full length take, "
                f"so some of them wait (engine.gpu_memory_utilization)"
            )
    if sharding is not None and all(column.machine.gpus == 1 for column in columns):
        found.append("trainer=fsdp on one device shards nothing")
    return found


def dtypes(precision: str) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Of stored weights and of autocast under a Trainer's ``precision``; None keeps their own.

    Example:
        >>> dtypes("bf16-true"), dtypes("bf16-mixed")
        ((torch.bfloat16, None), (None, torch.bfloat16))
    """
    name, _, kind = precision.partition("-")
    named = PRECISIONS.get(name)
    return (named if kind == "true" else None, named if kind == "mixed" else None)


def write(found: Plan, path: str) -> None:
    """Write the plan as JSON."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found.flat(), indent=1) + "\n")


def machines(trainer: Mapping[str, Any], options: PlanOptions) -> list[Machine]:
    """This machine, then each number of GPUs to plan for."""
    is_cuda = torch.cuda.is_available() and trainer["accelerator"] in ("auto", "gpu", "cuda")
    devices = trainer["devices"]
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if not str(devices).isdecimal():
        devices = torch.cuda.device_count() if is_cuda else 1
    world = max(1, int(devices)) * int(trainer["num_nodes"])
    if is_cuda:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = psutil.virtual_memory().total / max(1, int(devices))
    kind = "GPU" if is_cuda else "CPU"
    here = Machine(f"here, {world} {kind}", world, memory, is_cuda, is_timed=is_cuda)
    size = options.gpu_memory_gib * GIB
    return [here, *(Machine(f"{number} x H100", number, size) for number in options.gpus)]


def _build(module: Any, notes: list[str]) -> None:
    options = module.backbone_options
    options.random_init = True
    if options.attn_implementation not in ("sdpa", "eager"):
        notes.append(f"attn_implementation={options.attn_implementation} is planned as sdpa")
        options.attn_implementation = "sdpa"
    try:
        with torch.device("meta"):
            module.configure_model()
    except ValueError as error:
        hint = ""
        if not Path(options.path).is_dir():
            hint = (
                "; mode=plan reads nothing but its config.json: with no network give a folder that "
                "holds that file"
            )
        raise ValueError(f"{error}{hint}") from error


def _lengths(
    module: Any, data: Any, config: Mapping[str, Any], options: PlanOptions
) -> dict[str, Lengths]:
    if not hasattr(data, "prompts_per_rollout"):
        return {}
    why_not = ""
    try:
        data.bind(AutoTokenizer.from_pretrained(module.backbone_options.path))
    except Exception as error:  # transformers raises many kinds; only lengths depend on it
        why_not = f"no tokenizer: {str(error).strip().splitlines()[0]}"
    return prompt_lengths(data, options.prompt_tokens, why_not, config["seed"])


def _count_optimizer(module: Any, data: Any, counts: Counts, max_steps: int) -> None:
    """Let the module's own optimizer take one step without data, and see what it keeps."""
    with steps.attached(module, data, 1, max_steps):
        made = module.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, Mapping) else made
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    meter = steps.meter_for(module, is_cuda=False)
    with meter:
        optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values()]
    state = [t for t in state if isinstance(t, torch.Tensor)]
    counts.optimizer = float(sum(t.numel() * t.element_size() for t in state))
    meter.label(state, "kv_cache")  # any label that can be left out
    counts.optimizer_class = type(optimizer).__name__
    counts.step = meter.peak(without="kv_cache").total
    for parameter in module.parameters():
        parameter.grad = None
