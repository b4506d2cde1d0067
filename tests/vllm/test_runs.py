"""Whole runs on vLLM: every RL model, two processes, a kill and a resume."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import train
from datamodules.engines.vllm import close_guests
from tests.models import POLICY_MODELS
from tests.runs import (
    ONE_UPDATE,
    REPO,
    SHORT,
    SMALL,
    assert_same_weights,
    call,
    command,
    environment,
    read_jsonl,
    small,
    weights,
)
from tests.vllm.parts import NEEDS_VLLM

pytestmark = NEEDS_VLLM
Make = Callable[..., Any]
VLLM = ["engine=vllm", "engine.kv_cache_gib=0.1"]
ON_VLLM = [*VLLM, *SMALL, *SHORT]
GRPO = ["model=grpo", "mode=fit", *ON_VLLM]


@pytest.fixture(scope="module", autouse=True)
def _no_guest_is_left() -> Iterator[None]:
    yield
    close_guests()


def versions(folder: Path) -> dict[int, set[int]]:
    """Policy versions of the recorded completions by step."""
    found: dict[int, set[int]] = {}
    for record in read_jsonl(folder / "samples.jsonl"):
        found.setdefault(record["step"], set()).add(record["policy_version"])
    return found


@pytest.mark.parametrize("model", POLICY_MODELS)
def test_every_rl_model_trains_on_vllm(
    model: str, make_config: Make, compose: Make, tmp_path: Path
) -> None:
    config = make_config(*VLLM, *small(model, compose, *ONE_UPDATE), "compare=[]")
    metrics = train.run(config)
    assert metrics["steps"] == 2
    assert metrics["bad_steps"] == 0
    assert metrics["train/sampler_logprob_gap"] < 1e-4
    assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))
    assert versions(tmp_path / config.name / "s0") == {1: {0}, 2: {1}}
    saved = torch.load(
        tmp_path / config.name / "s0" / "checkpoints" / "last.ckpt", weights_only=True
    )
    names = [*saved["state_dict"], *saved["callbacks"], *saved]
    assert not [name for name in names if "vllm" in name.lower() or "engine" in name.lower()]


def test_adapters_and_stale_weights_with_the_correction(make_config: Make, tmp_path: Path) -> None:
    changes = ["lora=default", "engine.sync_every=2", "model.sampler_correction=2.0"]
    steps = ["trainer.max_steps=4", "trainer.limit_val_batches=0", "optimizer.lr=0.01",
             "optimizer.warmup_steps=0"]  # fmt: skip
    metrics = train.run(make_config(*GRPO, *changes, *steps, "name=stale"))
    assert versions(tmp_path / "stale" / "s0") == {1: {0}, 2: {0}, 3: {2}, 4: {2}}
    assert metrics["train/policy_lag"] == 1
    assert metrics["train/sampler_logprob_gap"] > 1e-3, "one step behind"
    assert 0 < metrics["train/sampler_weight"] <= 2
    assert 0 <= metrics["train/sampler_weight_clipped"] < 1


@pytest.mark.parametrize("strategy", ["trainer.strategy=ddp", "trainer=fsdp"])
def test_two_processes_with_an_engine_each(strategy: str, tmp_path: Path, warm_cache: Path) -> None:
    two = [strategy, "trainer.devices=2", "trainer.accelerator=cpu"]
    result = call(*command(*GRPO, *two, output_dir=tmp_path, cache_dir=warm_cache))
    assert result.returncode == 0, result.stderr
    assert "vllm" not in result.stderr.lower(), "quiet"
    run = tmp_path / "grpo" / "s0"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["train/sampler_logprob_gap"] < 1e-4
    assert versions(run) == {1: {0}, 2: {1}}
    alone = train.run(train_config(tmp_path, warm_cache))
    for tag in ("train/loss", "rollout/reward_mean", "rollout/length_mean", "train/grad_norm"):
        assert metrics[tag] == pytest.approx(alone[tag], abs=1e-4), tag
    last = Path("checkpoints", "last.ckpt")
    one = tmp_path / "alone" / "s0" / last
    assert_same_weights(weights(run / last), weights(one), atol=1e-4)


def train_config(output_dir: Path, cache_dir: Path) -> Any:
    """The same run in this process."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    overrides = command(*GRPO, "name=alone", output_dir=output_dir, cache_dir=cache_dir)[2:]
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return compose("train", overrides=overrides)


def test_a_killed_run_goes_on(make_config: Make, tmp_path: Path, warm_cache: Path) -> None:
    steps = ["trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=2"]
    words = command(*GRPO, *steps, output_dir=tmp_path, cache_dir=warm_cache)
    run = tmp_path / "grpo" / "s0"
    last = run / "checkpoints" / "last.ckpt"
    output = subprocess.DEVNULL
    process = subprocess.Popen(words, env=environment(), cwd=REPO, stdout=output, stderr=output)
    deadline = time.monotonic() + 240
    while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(last, weights_only=True)["global_step"]
    assert 0 < done < 6, "killed in the middle"
    metrics = train.run(make_config(*GRPO, *steps, "resume=auto"))
    assert metrics["steps"] == 6
    assert metrics["train/sampler_logprob_gap"] < 1e-4, (
        "weights were pushed before the first rollout"
    )
    assert versions(run) == {step + 1: {step} for step in range(6)}
    saved: Any = OmegaConf.load(run / "config.yaml")
    assert saved.engine._target_.endswith("VLLMEngine")
