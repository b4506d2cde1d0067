"""Planned memory beside measured memory: ``python -m tests.benchmarks.plan_memory``.

Small Qwen3 models on this CPU, GRPO on random prompts. Measured is what the allocator was asked for
(memory events of torch's profiler, which see inside custom operators; validated on a known tensor),
for the parts of one step and for the peak of two steps under a real Trainer. Printed are MiB and
ratios planned / measured; nothing is asserted. Aim: within 15 % on each.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer
from transformers.utils import logging as hub_logging

import datamodules.engines.decode as decode_module
from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, Prompt
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.base import Split, Task
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.policy_rl.grpo import GRPO
from run_tools.plan import Column, plan
from run_tools.plan_steps import make_rollouts, micro_batches

MIB = 2**20
MARK = 7777  # bytes of an allocation that marks a place among the others


@dataclass(frozen=True)
class Case:
    """A small model and its step."""

    width: int = 128
    layers: int = 4
    vocabulary: int = 1000
    prompt: int = 32
    new: int = 48
    prompts: int = 4
    samples: int = 8
    lora: bool = False
    checkpointing: bool = False
    micro_batches: int = 1
    kl: bool = False
    share: bool = False
    varied: bool = False
    dtype: str = "float32"

    def label(self) -> str:
        """Short name of a row."""
        on = [
            name
            for name in ("lora", "checkpointing", "kl", "share", "varied")
            if getattr(self, name)
        ]
        more = [f"micro={self.micro_batches}"] * (self.micro_batches > 1)
        kind = [self.dtype] * (self.dtype != "float32")
        return " ".join([f"{self.width}x{self.layers} V{self.vocabulary}", *on, *more, *kind])


CASES = [
    Case(width=64, layers=2, vocabulary=100),
    Case(width=64, layers=8, vocabulary=1000),
    Case(width=256, layers=2, vocabulary=32000, prompts=2),
    Case(width=512, layers=4, vocabulary=1000, prompts=2),
    Case(width=512, layers=2, vocabulary=32000, prompts=2),
    Case(layers=8, checkpointing=True),
    Case(width=256, layers=4, vocabulary=32000, prompts=2, checkpointing=True),
    Case(layers=8, lora=True),
    Case(width=512, layers=4, lora=True, checkpointing=True, prompts=2),
    Case(layers=4, micro_batches=4),
    Case(layers=4, kl=True),
    Case(layers=4, share=True),
    Case(layers=4, new=128, prompts=2),
    Case(layers=4, new=128, prompts=2, varied=True),
    Case(layers=12, vocabulary=100, prompts=2),
    Case(width=256, layers=4, dtype="bfloat16", prompts=2),
]


class RandomPrompts(Task):
    """Prompts of random words; the reward is the share of even token ids."""

    name = "random"

    def __init__(self, vocabulary: int, length: int, is_varied: bool) -> None:
        self.size, self.length, self.is_varied = vocabulary, length, is_varied

    def vocabulary(self) -> list[str]:
        """All words but the three special ones."""
        return [f"w{i}" for i in range(self.size - 3)]

    def records(self, split: Split) -> Sequence[int]:
        """Numbers to seed prompts with."""
        return list(range(64)) if split == "train" else []

    def prompt(self, record: int) -> Prompt:
        """Random words."""
        length = self.length - (record % 3 if self.is_varied else 0)
        ids = random.Random(record).choices(range(3, self.size), k=length)
        return Prompt(uid=str(record), token_ids=tuple(ids), task=self)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Share of even ids."""
        ids = completion.token_ids
        return {"reward": sum(i % 2 == 0 for i in ids) / max(1, len(ids))}


def build(case: Case, folder: Path) -> tuple[GRPO, RolloutDataModule]:
    """Module and data of a case, on the model in ``folder``."""
    task = RandomPrompts(case.vocabulary, case.prompt, case.varied)
    if not folder.exists():
        shape = TinyOptions(
            hidden_size=case.width,
            intermediate_size=3 * case.width,
            num_layers=case.layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=case.width // 4,
        )
        build_tiny(folder, task.vocabulary(), shape, seed=0)
    data = RolloutDataModule(
        task=task,
        engine=HFEngine(),
        prompts_per_rollout=case.prompts,
        micro_batches=case.micro_batches,
    )
    data.bind(AutoTokenizer.from_pretrained(folder))
    backbone = {"path": str(folder), "gradient_checkpointing": case.checkpointing}
    module = GRPO(
        backbone=backbone | {"dtype": case.dtype},
        lora={} if case.lora else None,
        samples_per_prompt=case.samples,
        max_new_tokens=case.new,
        kl_coef=0.1 if case.kl else 0.0,
        share_prompts=case.share,
    )
    return module, data


def config_of() -> dict[str, Any]:
    """What ``plan`` reads of a config."""
    options = {"gpus": [], "gpu_memory_gib": 80.0, "reserve_gib": 0.0, "peak_tflops": 1.0}
    options |= {"bandwidth_tbs": 1.0, "mfu": 1.0, "bandwidth_share": 1.0, "launch_us": 0.0}
    options |= {"prompt_tokens": None, "completion_tokens": None, "output": None}
    trainer = {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "strategy": "auto"}
    trainer |= {"precision": "32-true", "max_steps": 2, "accumulate_grad_batches": None}
    return {"plan": options, "trainer": trainer, "seed": 0}


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Every allocation (bytes) and release (negative) inside the block, in order, afterwards."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield found
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    found += [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]


def highest(changes: Sequence[int]) -> int:
    """Largest running sum, at least 0."""
    living = most = 0
    for change in changes:
        living += change
        most = max(most, living)
    return most


def size(tensors: Any) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def measure_parts(case: Case, folder: Path) -> dict[str, float]:
    """Bytes of the parts of one real step, and the peak of training."""
    module, data = build(case, folder)
    data.trainer = _One()  # type: ignore[assignment]
    module.configure_model()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    rollouts, _ = make_rollouts(module, data, [data.task.prompt(i) for i in range(case.prompts)])
    for name, value in module.annotate(rollouts).items():
        setattr(rollouts, name, value)
    batch = max(micro_batches(module, data, rollouts), key=lambda piece: piece.input_ids.numel())
    weights = size(module.parameters())
    with allocations() as changes:  # the first step too: the release of what is older is not seen
        module.training_step(batch, 0).backward()
        optimizer.step()
        module._window, module._summaries = {}, {}
        held = {
            "weights": weights,
            "gradients": size(p.grad for p in trained),
            "optimizer": size(t for state in optimizer.state.values() for t in state.values()),
        }
        torch.empty(MARK, dtype=torch.uint8)
        loss = module.training_step(batch, 0)
        torch.empty(MARK, dtype=torch.uint8)
        if case.micro_batches == 1:
            for parameter in trained:
                parameter.grad = None
        loss.backward()
    first, second = (number for number, change in enumerate(changes) if change == MARK)
    kept = sum(changes[first:second])
    peak = weights + sum(changes[:first]) + highest(changes[first:])
    base = sum(held.values())
    module._window, module._summaries = {}, {}
    decode, cache = _measure_decoding(module, data, case)
    return held | {
        "activations": kept,
        "training": peak,
        "KV cache": cache,
        "rollout": base + decode,
    }


def _measure_decoding(module: GRPO, data: RolloutDataModule, case: Case) -> tuple[float, float]:
    loops: list[Any] = []
    start: Callable[..., Any] = decode_module._Loop.start

    def remember(loop: Any, rows: Any) -> Any:
        result = start(loop, rows)
        loops.append(size(t for layer in loop.cache.layers for t in (layer.keys, layer.values)))
        return result

    decode_module._Loop.start = remember  # type: ignore[method-assign]
    try:
        data.engine.sync(module.policy, 0)
        with allocations() as changes, torch.no_grad():
            module.rollout([data.task.prompt(i) for i in range(case.prompts)], data.engine)
    finally:
        decode_module._Loop.start = start  # type: ignore[method-assign]
    return highest(changes), max(loops)


def measure_run(case: Case, folder: Path) -> float:
    """Peak of two steps under a real Trainer, weights included (bytes)."""
    module, data = build(case, folder)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=case.micro_batches,
        use_distributed_sampler=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        gradient_clip_val=1.0,
    )
    module.configure_model()  # weights that are cast while they are loaded are not all seen
    with allocations() as changes:
        trainer.fit(module, datamodule=data)
    return size(module.parameters()) + highest(changes)


class _One:
    """One process."""

    global_rank, world_size = 0, 1


def planned(case: Case, folder: Path) -> tuple[dict[str, float], Column]:
    """The plan's numbers under the names of ``measure_parts``."""
    module, data = build(case, folder)
    found = plan(module, data, config_of())
    column = found.columns[0]
    assert column.phases is not None and column.step is not None, column.problem
    parts = {
        "weights": found.counts.sum("total"),
        "gradients": found.counts.sum("trained"),
        "optimizer": found.counts.optimizer,
        "activations": column.step.numbers.kept,
        "training": sum(column.phases.training.values()),
        "KV cache": column.step.numbers.decode.parts["kv_cache"],
        "rollout": sum(column.phases.rollout.values()),
    }
    return parts, column


def compare(case: Case, *, with_run: bool = True) -> dict[str, tuple[float, float]]:
    """Planned and measured bytes by part."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place) / "model"
        own, column = planned(case, folder)
        measured = measure_parts(case, folder)
        if with_run:
            assert column.phases is not None
            own["run"], measured["run"] = column.phases.peak, measure_run(case, folder)
    return {name: (own[name], measured[name]) for name in measured}


def main() -> None:
    """Print the table."""
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    hub_logging.disable_progress_bar()
    torch.set_num_threads(1)
    with allocations() as changes:
        known = torch.empty(MIB)
        del known
    print(f"a tensor of 4 MiB is measured as {highest(changes) / MIB:.3f} MiB")
    worst: dict[str, float] = {}
    for number, case in enumerate(CASES):
        found = compare(case)
        if not number:
            print(f"{'planned / measured':<34}" + "".join(f"{name:>17}" for name in found))
        cells = []
        for name, (one, other) in found.items():
            ratio = one / other if other else 1.0
            worst[name] = max(worst.get(name, 0.0), abs(ratio - 1))
            cells.append(f"{other / MIB:8.2f} MiB {ratio:.2f}".rjust(17))
        print(f"{case.label():<34}" + "".join(cells), flush=True)
    print(f"{'largest deviation':<34}" + "".join(f"{value:>17.1%}" for value in worst.values()))


if __name__ == "__main__":
    main()
