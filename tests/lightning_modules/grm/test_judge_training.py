"""A trained judge is the reward of a policy: whole runs, resumed and in two processes; text judges.

The judge of the runs is an AC-GenRM that ``python train.py model=ac_genrm`` trained for one step
after its warm start, so that its verdicts parse.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

import train
from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, FinishReason, Prompt, Rollouts
from datamodules.tasks.base import JudgeTask
from datamodules.tasks.chat_prompts import ChatPrompts
from datamodules.tasks.criteria_pairs import CriteriaPairs
from datamodules.tasks.preferences import PreferencePairs
from datamodules.tasks.writing_prompts import WritingPrompts
from lightning_modules.backbones.tiny import TinyOptions, build_tiny, byte_tokenizer
from lightning_modules.grm.ac_genrm import ACGenRM
from lightning_modules.grm.base import GenerativeRewardModule
from lightning_modules.grm.consistrm import ConsistRM
from lightning_modules.grm.exported import ExportedJudge
from lightning_modules.grm.judge_reward import ComparisonReward
from lightning_modules.grm.reflectrm import ReflectRM
from tests.data_files import write_rows
from tests.distributed.test_two_processes import SGD, STEP, TWO, two_micro_batches
from tests.runs import (
    FEW,
    assert_same_weights,
    board,
    call,
    command,
    end,
    existing,
    last_of,
    main,
    read_jsonl,
    scalars,
    small,
    start,
    step_of,
    strike,
    unmeasured,
    weights,
)

Make = Callable[..., Any]
KINDS = ("long", "short")
STEPS = 4
#: Two steps a rollout, so that one is open when a run dies after its second step.
RUN = [
    f"trainer.max_steps={STEPS}", "data.mini_batches=2", "callbacks.sample_table.keep=all",
    "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.every_seconds=null",
]  # fmt: skip


class KeepJudge(Callback):
    """Writes the judge that a run holds in memory.

    Args:
        path: Where to.
    """

    def __init__(self, *, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        module = trainer.datamodule.reward.judge._module
        assert module is not None, "nobody asked the judge"
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
        save_file(module.policy.model.state_dict(), self.path)


class Finished(NamedTuple):
    """An unbroken run: its overrides, its folder, and the judge's files before it."""

    overrides: list[str]
    folder: Path
    judge_before: dict[str, bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def judged(model: str, judge: Path, compose: Make, *more: str) -> list[str]:
    """Overrides of a small run whose reward is that judge."""
    own = [f"model={model}", "data=mini_writing", "reward=judge", f"reward.path={judge}"]
    return [*own, *existing([*FEW, *more], compose(*own))]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, compose: Make, warm_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    own = [*small("ac_genrm", compose), "mode=fit", "trainer.max_steps=1"]
    status, _, errors = main(*command(*own, output_dir=folder, cache_dir=warm_cache)[2:])
    assert status == 0, errors
    return folder / "ac_genrm" / "s0" / "export"


@pytest.fixture(scope="module", params=["grpo", "acpo"])
def finished(
    request: pytest.FixtureRequest,
    judge: Path,
    tmp_path_factory: pytest.TempPathFactory,
    compose: Make,
    warm_cache: Path,
) -> Finished:
    folder = tmp_path_factory.mktemp("judged")
    overrides = judged(request.param, judge, compose, *RUN)
    keep = [f"+callbacks.keep._target_={__name__}.KeepJudge",
            f"+callbacks.keep.path={folder / 'judge.safetensors'}"]  # fmt: skip
    before = files_of(judge)
    started = command(*overrides, *keep, output_dir=folder, cache_dir=warm_cache)
    status, _, errors = main(*started[2:])
    assert status == 0, errors
    return Finished(overrides, folder / request.param / "s0", before)


@pytest.mark.slow
def test_a_policy_is_trained_on_the_verdicts_of_a_judge(finished: Finished) -> None:
    metrics = json.loads((finished.folder / "metrics.json").read_text())
    assert metrics["steps"] == STEPS
    assert metrics["train/grad_norm"] > 0
    assert metrics["rollout/reward_min"] < 0, "a verifier gives 0 or more"
    reader = board(finished.folder)
    for part in ("tie", "first_slot", "longer", "unparsed", "tokens", "empty"):
        values = [
            value
            for kind in KINDS
            for _, value in scalars(reader, f"rollout/judge/{part}/{kind}")
        ]  # fmt: skip
        assert len(values) >= 4, "two rollouts of either kind"
        assert all(math.isfinite(value) and value >= 0 for value in values), part
        if part == "tokens":
            assert max(values) > 0
        elif part == "unparsed":
            assert max(values) < 1, "a trained judge writes verdicts"
        else:
            assert max(values) <= 1, part
    if "model=acpo" in finished.overrides:
        assert 0 <= metrics["test/win_rate_vs_start"] <= 1


@pytest.mark.slow
def test_the_judge_is_frozen_and_stays_out_of_checkpoint_and_export(
    finished: Finished, judge: Path
) -> None:
    assert files_of(judge) == finished.judge_before
    in_memory = load_file(finished.folder.parents[1] / "judge.safetensors")
    assert_same_weights(in_memory, load_file(judge / "model.safetensors"))
    export = load_file(finished.folder / "export" / "model.safetensors")
    assert weights(last_of(finished.folder)).keys() == {f"policy.model.{name}" for name in export}
    assert export.keys() == in_memory.keys(), "one architecture: no name is the judge's alone"
    assert "judge" not in json.loads((finished.folder / "export" / "litpost.json").read_text())


def comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without what a judge wrote: after a resume, or on another rank, its cache knows less."""
    return {k: v for k, v in unmeasured(metrics).items() if "judge/tokens" not in k}


@pytest.mark.slow
def test_a_killed_run_ends_like_the_unbroken_one(
    finished: Finished, make_config: Make, tmp_path: Path, warm_cache: Path
) -> None:
    own = [*finished.overrides, "run_id=killed", "resume=auto"]
    started = command(*own, *strike("step", 1), output_dir=tmp_path, cache_dir=warm_cache)
    log = tmp_path / "log"
    assert end(start(started, log)) == -signal.SIGKILL, log.read_text()
    killed = tmp_path / finished.folder.parent.name / "killed"
    assert step_of(last_of(killed)) == 1

    metrics = train.run(make_config(*own))
    expected = json.loads((finished.folder / "metrics.json").read_text())
    assert comparable(metrics) == comparable(expected)
    assert_same_weights(weights(last_of(killed)), weights(last_of(finished.folder)))
    samples, unbroken = (
        [comparable(record) for record in read_jsonl(run / "samples.jsonl")]
        for run in (killed, finished.folder)
    )
    assert samples == unbroken
    one, other = board(killed), board(finished.folder)
    for tag in comparable(dict.fromkeys(other.Tags()["scalars"])):
        assert scalars(one, tag) == scalars(other, tag), tag


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(
    judge: Path, make_config: Make, compose: Make, tmp_path: Path, warm_cache: Path
) -> None:
    own = judged("grpo", judge, compose, *STEP, *SGD)
    own += [*two_micro_batches(compose(*own)), "name=m"]
    alone = train.run(make_config(*own, "run_id=one"))
    one, two = tmp_path / "m" / "one", tmp_path / "m" / "two"
    both = [*own, *TWO["ddp"], "engine=scripted", f"engine.path={one / 'samples.jsonl'}",
            "run_id=two"]  # fmt: skip
    result = call(*command(*both, output_dir=tmp_path, cache_dir=warm_cache))
    assert result.returncode == 0, result.stderr
    assert alone["train/grad_norm"] > 0
    assert_same_weights(weights(last_of(one)), weights(last_of(two)), atol=1e-5)
    metrics = json.loads((two / "metrics.json").read_text())
    for tag in [t for t in comparable(alone) if t.startswith(("rollout/reward", "rollout/judge/"))]:
        assert metrics[tag] == pytest.approx(alone[tag], abs=1e-5), tag


# --- judges of text -------------------------------------------------------------------------------


class Noted(HFEngine):
    """Keeps what it was asked last."""

    asked: list[str]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.asked = [prompt.task.render(prompt.token_ids) for prompt in prompts]
        return super().generate(prompts, sampling)


def write_text_judge(
    folder: Path, cls: type[GenerativeRewardModule], task: type[JudgeTask], **options: Any
) -> Path:
    """The export folder of a random judge of English; the file of its pairs is gone."""
    shape = TinyOptions(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
    )
    build_tiny(folder / "backbone", None, shape, seed=0)
    module = cls(backbone=str(folder / "backbone"), max_new_tokens=6)
    module.task_name = task.name
    settings = {"path": str(folder / "gone.jsonl"), "on_too_long": "skip", **options}
    module.task_settings = {"_target_": f"{task.__module__}.{task.__qualname__}", **settings}
    module.configure_model()
    module.export(folder / "export", byte_tokenizer())
    return folder / "export"


#: Two groups of four; the third text of each is empty to its readers.
TEXTS = [
    "The tide came.", "A cat sat.", "", "Rain fell on the roof.",
    "It snows.", "<think>bees or ants</think>Bees hum.", "<think>no end", "Leaves turn red.",
]  # fmt: skip


def texts_for(task: ChatPrompts) -> Rollouts:
    """Those texts as the answers to the first two prompts."""
    task.bind(byte_tokenizer())

    def say(text: str) -> Completion:
        ids = (*task.tokenizer(text)["input_ids"], task.tokenizer.eos_token_id)
        return Completion(ids, (-0.1,) * len(ids), FinishReason.STOP)

    prompts = [task.prompt(record) for record in task.records("train")[:2]]
    return Rollouts.from_groups(prompts, [[*map(say, TEXTS[:4])], [*map(say, TEXTS[4:])]])


@pytest.mark.parametrize(
    ("cls", "pairs", "task", "file"),
    [
        (ReflectRM, PreferencePairs, ChatPrompts, "chat_file"),
        (ConsistRM, PreferencePairs, WritingPrompts, "writing_file"),
        (ACGenRM, CriteriaPairs, WritingPrompts, "writing_file"),
    ],
)
def test_a_judge_of_text_rewards_texts(
    cls: type[GenerativeRewardModule],
    pairs: type[JudgeTask],
    task: type[ChatPrompts],
    file: str,
    tmp_path: Path,
) -> None:
    folder = write_text_judge(tmp_path, cls, pairs)
    rollouts = texts_for(task(path=str(write_rows(tmp_path, file))))
    engine = Noted()
    judge = ExportedJudge(str(folder), inference="greedy", engine=engine)
    parts = ComparisonReward(judge, path=str(folder), scheme="round_robin")(rollouts)

    reward = parts["reward"]
    assert reward.shape == (8,)
    assert reward.isfinite().all() and reward.abs().max() <= 1
    assert reward.view(2, 4).sum(1).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    # a random judge says nothing that parses, so that only the third text loses, and unread
    assert reward.tolist() == pytest.approx([1 / 3, 1 / 3, -1, 1 / 3] * 2)
    assert parts["judge/unparsed"].tolist() == pytest.approx([2 / 3, 2 / 3, 0, 2 / 3] * 2)
    assert parts["judge/empty"].tolist() == [0, 0, 1, 0] * 2
    assert (parts["judge/tokens"] > 0).tolist() == [True, True, False, True] * 2

    assert len(engine.asked) == 6
    questions = [prompt.record.text for prompt in rollouts.prompts[::4]]
    for question, own in zip(questions, (TEXTS[:4], TEXTS[4:]), strict=True):
        shown = [text.rpartition("</think>")[2] for text in own[:2] + own[3:]]
        seen = [prompt for prompt in engine.asked if question in prompt]
        assert len(seen) == 3
        assert all(sum(text in prompt for text in shown) == 2 for prompt in seen)
    assert not any("bees or ants" in prompt for prompt in engine.asked)
