"""The plan as tables in the terminal, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from run_tools.plan import Column, Plan
from run_tools.plan_memory import GIB, PARTS
from run_tools.plan_time import figures


def print_plan(title: str, found: Plan, config: Mapping[str, Any]) -> None:
    """Print the plan.

    Args:
        title: Of the run.
        found: The plan.
        config: The whole run as plain values.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for line in headline(title, found):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    columns = [column for column in found.columns if not column.problem]
    unit, size = unit_of(columns)
    for column in columns:
        assert column.phases is not None
        title = f"{column.machine.name}: memory of one device ({unit}) at the peak of each phase"
        memory = Table(title=title, box=box.SIMPLE_HEAD)
        memory.add_column("", no_wrap=True, min_width=24)
        for phase in column.phases.by_name:
            memory.add_column(phase, justify="right", min_width=11)
        for label, cells in memory_rows(column, found.options.reserve_gib, size):
            memory.add_row(label, *cells, style="bold" if label == "peak" else None)
        console.print(memory)
    work = Table(title="an optimizer step", box=box.SIMPLE_HEAD)
    work.add_column("", no_wrap=True)
    for column in columns:
        work.add_column(column.machine.name, justify="right")
    for label, cells in work_rows(columns, found):
        work.add_row(label, *cells)
    console.print(work)
    for line in [*verdicts(found, config), *(f"note: {one}" for one in found.notes)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def headline(title: str, found: Plan) -> list[str]:
    """Parameters and lengths, in words."""
    counts = found.counts
    tied = ", tied to the embedding" if counts.is_tied else ""
    copies = f"; {counts.reference:,} in frozen copies" if counts.reference else ""
    lines = [
        f"{title} (mode=plan: nothing was started)",
        f"parameters: {counts.parameters:,} in all, {counts.trainable:,} trainable, "
        f"{counts.head:,} in the head{tied}{copies}; optimizer: {counts.optimizer_class}",
    ]
    for name, one in found.lengths.items():
        if name or len(found.lengths) == 1:
            label = f" of {name}" if name else ""
            lines.append(
                f"prompts{label}: longest {one.longest} tokens, mean {one.mean:.0f} ({one.source})"
            )
    return lines


def unit_of(columns: list[Column]) -> tuple[str, int]:
    """GiB, or MiB where every peak is small."""
    peak = max((c.phases.peak for c in columns if c.phases is not None), default=0.0)
    return ("GiB", GIB) if peak >= GIB else ("MiB", 2**20)


def memory_rows(column: Column, reserve: float, unit: int = GIB) -> list[tuple[str, list[str]]]:
    """Rows of a machine's table; parts that are nowhere are left out.

    Args:
        column: With a plan.
        reserve: GiB kept free.
        unit: Bytes that count as 1.
    """

    def cell(value: float) -> str:
        return f"{value / unit:,.2f}" if value else ""

    assert column.phases is not None
    phases = list(column.phases.by_name.values())
    rows = [
        (label, [cell(parts[name]) for parts in phases])
        for name, label in PARTS.items()
        if any(parts[name] for parts in phases)
    ]
    rows.append(("peak", [cell(sum(parts.values())) for parts in phases]))
    if column.phases.host:
        rows.append(("on the host", [cell(column.phases.host)] * len(phases)))
    room = column.machine.memory - reserve * GIB
    rows.append((f"there is, less {reserve:g} GiB", [cell(room)] * len(phases)))
    return rows


def work_rows(columns: list[Column], found: Plan) -> list[tuple[str, list[str]]]:
    """Rows of the second table."""

    def row(label: str, value: Callable[[Column], Any]) -> tuple[str, list[str]]:
        return label, [str(value(column)) for column in columns]

    def step(column: Column) -> Any:
        assert column.step is not None
        return column.step

    def per_step(column: Column, name: str) -> str:
        size = getattr(step(column), name) * column.machine.gpus
        return figures(size / step(column).work.updates)

    rows = []
    if found.lengths:
        rows += [
            row("prompts", lambda c: per_step(c, "prompts")),
            row("sequences", lambda c: per_step(c, "sequences")),
            row("optimizer steps a rollout", lambda c: step(c).work.updates),
        ]
    rows += [
        row("tokens at most", lambda c: figures(_tokens(c))),
        row("micro-batches a device", lambda c: step(c).work.window),
        row("sequences a micro-batch", lambda c: step(c).rows),
        row("tokens a micro-batch", lambda c: figures(step(c).tokens)),
        row("tokens a micro-batch that fit", lambda c: _fitting(c)),
    ]
    names = ("prefill", "decode", "annotate", "training")
    for name in names:
        if any(column.flops.get(name) for column in columns):
            label = f"TFLOPs: {name}"
            rows.append(
                row(label, lambda c, n=name: figures(c.flops[n] * c.machine.gpus / 1e12))  # type: ignore[misc]
            )
    for name in names:
        if any(column.seconds.get(name) for column in columns):
            rows.append(row(f"seconds: {name}", lambda c, n=name: figures(c.seconds.get(n, 0.0))))  # type: ignore[misc]
    rows.append(
        row("seconds", lambda c: figures(sum(c.seconds.values())) if c.seconds else "not estimated")
    )
    return rows


def _tokens(column: Column) -> float:
    assert column.step is not None
    return column.step.tokens * column.step.work.window * column.machine.gpus


def _fitting(column: Column) -> str:
    return "not known" if column.fitting_tokens is None else figures(column.fitting_tokens)


def verdicts(found: Plan, config: Mapping[str, Any]) -> list[str]:
    """Whether each machine has room, and what to change where it has not."""
    options, lines = found.options, []
    for column in found.columns:
        name = column.machine.name
        if column.phases is None:
            lines.append(f"{name}: cannot run: {column.problem}")
            continue
        peak, room = column.phases.peak / GIB, column.machine.memory / GIB
        if column.fits:
            lines.append(f"{name}: fits ({peak:.2f} of {room:.1f} GiB)")
        else:
            lines.append(
                f"{name}: does not fit ({peak:.1f} of {room:.1f} GiB, {options.reserve_gib:g} in "
                f"reserve); try, largest first: {'; '.join(advice(column, config))}"
            )
    if any(column.seconds for column in found.columns):
        lines.append(
            f"seconds: at {options.mfu:.0%} of {options.peak_tflops:g} TFLOP/s (plan.mfu) and "
            f"{options.bandwidth_share:.0%} of {options.bandwidth_tbs:g} TB/s, computed and not "
            f"measured; scoring and communication are left out"
        )
    return lines


def advice(column: Column, config: Mapping[str, Any]) -> list[str]:
    """Overrides that make the largest parts of a peak smaller, largest first."""
    assert column.phases is not None and column.step is not None
    trainer, data = config["trainer"], config["data"]
    strategy = trainer["strategy"] if isinstance(trainer["strategy"], Mapping) else {}
    is_sharded = "activation_checkpointing" in strategy
    recomputes = config["backbone"]["gradient_checkpointing"] or strategy.get(
        "activation_checkpointing"
    )
    by_name = column.phases.by_name
    phase = max(by_name, key=lambda name: sum(by_name[name].values()))
    worst = by_name[phase]
    found: dict[str, float] = {}

    def suggest(text: str, *parts: str) -> None:
        found[text] = sum(worst[part] for part in parts)

    if phase == "training":
        if not recomputes:
            key = "trainer.strategy.activation_checkpointing"
            key = key if is_sharded else "backbone.gradient_checkpointing"
            suggest(f"{key}=true", "activations", "temporaries")
        if column.step.rows > 1 and "micro_batches" in data:
            count = data["micro_batches"] * 2
            suggest(f"data.micro_batches={count} or more", "activations", "temporaries")
        suggest("kernel.workspace_mb=128", "head")
        suggest("engine.sleep_level=1", "engine")
    else:
        if phase == "rollout" and "max_cached_tokens" in config["engine"]:
            half = max(1, config["engine"]["max_cached_tokens"] // 2)
            suggest(f"engine.max_cached_tokens={half} or less", "kv_cache", "temporaries")
        if phase == "annotate" and "annotate_batch_size" in config["model"]:
            half = max(1, config["model"]["annotate_batch_size"] // 2)
            suggest(f"model.annotate_batch_size={half}", "temporaries")
        if phase == "rollout" and is_sharded:
            suggest("trainer.strategy.unshard_for_rollout=never", "gathered")
        suggest("a smaller engine.gpu_memory_utilization", "engine")
    state = ("weights", "reference", "gradients", "optimizer")
    if not is_sharded and column.machine.gpus > 1:
        suggest("trainer=fsdp", *state, "gathered")
    if is_sharded and not strategy.get("cpu_offload"):
        suggest("trainer.strategy.cpu_offload=true", *state)
    if not config["lora"]["enabled"]:
        suggest("lora=default", "gradients", "optimizer", "reference")
    least = 0.05 * sum(worst.values())  # less is not worth a restart [our choice]
    useful = sorted((text for text in found if found[text] > least), key=lambda x: -found[x])
    return useful[:4] or ["more or larger GPUs"]
