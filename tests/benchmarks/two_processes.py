"""What two processes cost: the same GRPO steps in one process, under DDP and under FSDP2.

``python -m tests.benchmarks.two_processes [--steps 8] [--repeats 2]`` prints seconds of training a
step and the ratio to one process of two threads. It asserts nothing: the ranks share the machine's
cores and the model is tiny, so what is above 1 is start-up, collectives and smaller batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.runs import SMALL, call, command

WAYS = {
    "one process": ["trainer.devices=1", "trainer.num_threads=2"],
    "DDP": ["trainer.strategy=ddp", "trainer.devices=2", "trainer.num_threads=1"],
    "FSDP2": ["trainer=fsdp", "trainer.devices=2", "trainer.num_threads=1"],
}


def seconds(way: str, steps: int, folder: Path, cache: Path) -> float:
    """Seconds of training a step of one run, rollouts included."""
    overrides = [
        *("model=grpo", "mode=fit", *SMALL, *WAYS[way], "overwrite=true"),
        *(f"trainer.max_steps={steps}", "trainer.accelerator=cpu", "trainer.limit_val_batches=0"),
    ]
    arguments = command(*overrides, output_dir=folder, cache_dir=cache)
    arguments.remove("trainer.num_threads=1")  # ours stands among the overrides
    result = call(*arguments)
    if result.returncode:
        raise RuntimeError(result.stderr)
    metrics = json.loads((folder / "grpo" / "s0" / "metrics.json").read_text())
    return metrics["time/train_s"] / steps


def main() -> None:
    """Run every way in turn, several times, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(options.repeats):
            for way in WAYS:
                times[way].append(seconds(way, options.steps, Path(name, "out"), Path(name, "c")))
    alone = statistics.median(times["one process"])
    print("| way | seconds a step | of one process |\n|---|---|---|")
    for way, values in times.items():
        middle = statistics.median(values)
        print(f"| {way} | {middle:.3f} | {middle / alone:.2f} |")


if __name__ == "__main__":
    main()
