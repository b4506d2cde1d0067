"""Two gloo processes on one machine compute what one process computes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.options import BackboneOptions
from tests.distributed.decode_worker import PROMPTS, completions
from tests.models import POLICY_MODELS
from tests.runs import (
    REPO,
    SHORT,
    SMALL,
    assert_same_weights,
    call,
    command,
    environment,
    existing,
    read_jsonl,
    small,
    weights,
)

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
#: One plain step on a whole rollout (ranks would fill mini-batches with other rows) whose gradient
#: is clipped: weights differ where gradients or norms do.
STEP = [
    "mode=fit", *SMALL, *SHORT, "trainer.max_steps=1", "trainer.limit_val_batches=0",
    "callbacks.sample_table.keep=all", "trainer.gradient_clip_val=0.1", "data.mini_batches=1",
]  # fmt: skip
SGD = [
    "optimizer.class_path=torch.optim.SGD", "optimizer.lr=1.0", "optimizer.warmup_steps=0",
    "model.critic_optimizer.lr=1.0", "model.critic_optimizer.warmup_steps=0",
]  # fmt: skip
TWO = {
    "ddp": ["trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"],
    "fsdp": ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"],
}


#: What a small model needs to earn a reward in its first rollout.
EASIER = {
    "rose": ["data.task.length=1", "data.task.max_loops=0", "backbone.warm_start.steps=400"],
}


def last_of(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


def two_micro_batches(config: Any) -> list[str]:
    """An accumulation window, and draws that two processes can halve, whatever the model asks."""
    counts = config.data.get("prompts_per_rollout")
    if counts is None:
        return []
    window = ["data.micro_batches=2"]
    if isinstance(counts, int):
        return [*window, f"data.prompts_per_rollout={counts + counts % 2}"]
    return [*window, *(f"data.prompts_per_rollout.{k}={v + v % 2}" for k, v in counts.items())]


@pytest.fixture(scope="module", params=POLICY_MODELS)
def recorded(
    request: pytest.FixtureRequest, base: Path, warm_cache: Path, compose: Make
) -> tuple[list[str], Path]:
    """Options of a model's run, and the rollouts that one process wrote; strategies replay them."""
    own = small(request.param, compose)
    own += existing([*STEP, *SGD], compose(*own)) + EASIER.get(request.param, [])
    own += two_micro_batches(compose(*own))
    overrides = [*own, "name=recorded", f"run_id={request.param}"]
    result = call(*command(*overrides, output_dir=base, cache_dir=warm_cache))
    assert result.returncode == 0, result.stderr
    path = base / "recorded" / request.param / "samples.jsonl"
    assert len({record["reward"] for record in read_jsonl(path)}) > 1, "no gradient at all"
    return own, path


def replay(recorded: tuple[list[str], Path]) -> list[str]:
    own, path = recorded
    return [*own, "engine=scripted", f"engine.path={path}"]


@pytest.mark.parametrize("strategy", TWO)
def test_one_step_equals_one_process(
    strategy: str,
    recorded: tuple[list[str], Path],
    make_config: Make,
    tmp_path: Path,
    warm_cache: Path,
) -> None:
    both = [*replay(recorded), *TWO[strategy], f"+callbacks.seen.folder={tmp_path / 'seen'}",
            "+callbacks.seen._target_=tests.runs.SeenPrompts"]  # fmt: skip
    both += ["name=m", "run_id=two"]
    result = call(*command(*both, output_dir=tmp_path, cache_dir=warm_cache))
    assert result.returncode == 0, result.stderr
    alone = train.run(make_config(*replay(recorded), "name=m", "run_id=one"))
    one, two = tmp_path / "m" / "one", tmp_path / "m" / "two"
    assert_same_weights(weights(last_of(one)), weights(last_of(two)), atol=1e-5)
    start = weights(last_of(one))
    untrained = load_file(recorded_backbone(recorded))
    moved = [k for k, v in untrained.items() if not torch.equal(v, start[f"policy.model.{k}"])]
    assert len(moved) == len(untrained), "the step must move every tensor"

    metrics = json.loads((two / "metrics.json").read_text())
    tags = ["train/loss", "train/entropy", "train/grad_norm", "rollout/reward_mean"]
    for tag in [*tags, *({"train/value_loss"} & alone.keys())]:
        assert metrics[tag] == pytest.approx(alone[tag], abs=1e-5), tag
    critic = [value for name, value in start.items() if name.startswith("critic.value_head.")]
    assert all(bool(value.any()) for value in critic), "a critic starts at zero and must move"

    ranks = [read_jsonl(tmp_path / "seen" / f"rank{rank}.jsonl") for rank in (0, 1)]
    uids, drawn = ([set(rows[0][part]) for rows in ranks] for part in (1, 2))
    assert not drawn[0] & drawn[1]
    assert uids[0] | uids[1] == {record["uid"] for record in read_jsonl(recorded[1])}

    export = load_file(two / "export" / "model.safetensors")
    saved = {k.removeprefix("policy.model."): v for k, v in weights(last_of(two)).items()}
    assert_same_weights({k: saved[k] for k in export}, export)
    test = [*recorded[0], "mode=test", f"ckpt_path={last_of(two)}", "name=m", "run_id=reloaded"]
    assert any(tag.startswith("test/") for tag in train.run(make_config(*test)))


@pytest.mark.parametrize("recorded", ["ppo"], indirect=True)
@pytest.mark.parametrize("strategy", TWO)
def test_two_steps_of_a_value_head_on_the_policy(
    strategy: str,
    recorded: tuple[list[str], Path],
    make_config: Make,
    tmp_path: Path,
    warm_cache: Path,
) -> None:
    # its first step leaves the policy alone: the head starts at zero
    options = ["model.critic=head", "trainer.max_steps=2", "name=m"]
    both = [*replay(recorded), *TWO[strategy], *options, "run_id=two"]
    result = call(*command(*both, output_dir=tmp_path, cache_dir=warm_cache))
    assert result.returncode == 0, result.stderr
    alone = train.run(make_config(*replay(recorded), *options, "run_id=one"))
    one, two = (weights(last_of(tmp_path / "m" / run)) for run in ("one", "two"))
    assert_same_weights(one, two, atol=1e-5)
    assert bool(one["critic.linear.weight"].any())
    metrics = json.loads((tmp_path / "m" / "two" / "metrics.json").read_text())
    for tag in ("train/loss", "train/value_loss", "train/grad_norm"):
        assert metrics[tag] == pytest.approx(alone[tag], abs=1e-5), tag


#: Ways to shard, and how far their one step may be from one process without them.
SHARDED = {
    "adapters, activations recomputed": (
        ["lora=default", "lora.r=4", "trainer.strategy.activation_checkpointing=true"], 1e-5,
    ),
    "bfloat16": (["trainer.strategy.param_dtype=bfloat16"], 0.02),
}  # fmt: skip


@pytest.mark.parametrize("recorded", ["grpo"], indirect=True)
@pytest.mark.parametrize("way", SHARDED)
def test_options_of_sharding(
    way: str,
    recorded: tuple[list[str], Path],
    make_config: Make,
    tmp_path: Path,
    warm_cache: Path,
) -> None:
    options, tolerance = SHARDED[way]
    both = [*replay(recorded), *TWO["fsdp"], *options, "name=m", "run_id=two"]
    result = call(*command(*both, output_dir=tmp_path, cache_dir=warm_cache))
    assert result.returncode == 0, result.stderr
    shared = [option for option in options if "strategy" not in option]
    alone = train.run(make_config(*replay(recorded), *shared, "name=m", "run_id=one"))
    one, two = tmp_path / "m" / "one", tmp_path / "m" / "two"
    metrics = json.loads((two / "metrics.json").read_text())
    assert metrics["train/loss"] == pytest.approx(alone["train/loss"], abs=tolerance)
    assert metrics["train/grad_norm"] == pytest.approx(alone["train/grad_norm"], rel=5 * tolerance)
    assert_same_weights(weights(last_of(one)), weights(last_of(two)), atol=tolerance)
    exports = [load_file(run / "export" / "model.safetensors") for run in (one, two)]
    assert {value.dtype for value in exports[1].values()} == {torch.float32}
    assert_same_weights(*exports, atol=tolerance)


def recorded_backbone(recorded: tuple[list[str], Path]) -> Path:
    """Weights that the recorded run started from."""
    saved = torch.load(last_of(recorded[1].parent), weights_only=True)
    return Path(saved["hyper_parameters"]["backbone"]["path"]) / "model.safetensors"


def torchrun(*arguments: str) -> list[str]:
    """Two processes; the rendezvous takes a port that is free then."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", *arguments]


def test_decoding_with_a_sharded_policy(tiny_folder: Path, tmp_path: Path) -> None:
    folder, output = tiny_folder, tmp_path / "tokens.json"
    worker = str(REPO / "tests" / "distributed" / "decode_worker.py")
    options = {"env": environment(PYTHONPATH=str(REPO))}
    result = call(*torchrun(worker, str(folder), str(output)), **options)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    policy = load_causal_lm(BackboneOptions(path=str(folder))).eval()
    expected = completions(policy, None, list(range(len(PROMPTS))))
    for way in ("all", "gathered", "again"):
        for kind in ("greedy", "sampled"):
            assert set(found[way][kind]) == set(expected[kind])
            for number, group in expected[kind].items():
                tokens = [ids for ids, _ in group]
                assert [ids for ids, _ in found[way][kind][number]] == tokens
        assert set(found[f"{way}, one rank idle"]["greedy"]) == {"0", "2", "4"}
        for number, group in found[f"{way}, one rank idle"]["greedy"].items():
            assert [ids for ids, _ in group] == [ids for ids, _ in expected["greedy"][number]]
    for number, group in found["all"]["sampled"].items():
        prompt = PROMPTS[int(number)]
        for ids, logprobs in group:
            with torch.no_grad():
                logits = policy(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            again = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.allclose(again, torch.tensor(logprobs), atol=1e-4)
    policy(torch.tensor([PROMPTS[0]])).logits.square().mean().backward()
    alone = [p.grad.norm().item() for p in policy.parameters()]
    assert found["gradients"] == pytest.approx(alone, rel=1e-4)


def test_two_torchrun_ranks_prepare_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    overrides = ["model=reflectrm", *SMALL, *SHORT, *TWO["ddp"], "trainer.max_steps=1", "mode=fit",
                 "data.prompts_per_rollout.refl=0", "data.build_samples=4"]  # fmt: skip
    script = command(*overrides, output_dir=tmp_path / "out", cache_dir=cache)[1:]
    result = call(*torchrun(*script))
    assert result.returncode == 0, result.stderr
    steps = next(key.split("=")[1] for key in SMALL if key.startswith("backbone.warm_start.steps"))
    assert result.stderr.count(f"warm start {steps}/{steps}") == 1, result.stderr
    assert not list(cache.glob("*.unfinished"))
    kinds = sorted(path.name.split("-")[0] for path in cache.iterdir() if path.is_dir())
    assert kinds == ["backbone", "judging"]
    metrics = json.loads((tmp_path / "out" / "reflectrm" / "s0" / "metrics.json").read_text())
    assert metrics["steps"] == 1


def test_a_whole_sharded_run_with_an_arm(tmp_path: Path, warm_cache: Path) -> None:
    overrides = ["model=reflectrm", *SMALL, *SHORT, *TWO["fsdp"], "compare=[rft]",
                 "model.num_votes=2"]  # fmt: skip
    result = call(*command(*overrides, output_dir=tmp_path, cache_dir=warm_cache))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "reflectrm" / "s0"
    found = sorted(path.relative_to(run).as_posix() for path in run.rglob("metrics.json"))
    assert found == ["arms/rft/metrics.json", "metrics.json"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"test/two_stage/accuracy", "test/rft/accuracy", "steps"} <= metrics.keys()
    assert result.stdout.count("run folder:") == 1, "rank 0 alone prints"
    assert (run / "export" / "model.safetensors").is_file()
    records = read_jsonl(run / "samples.jsonl")
    assert {record["step"] for record in records} == {1, 2}
