"""The scripted engine: replays recorded rollouts and refuses bad records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from callbacks.sample_table import SampleTable
from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.engines.scripted import ScriptedEngine
from datamodules.experience import Completion, FinishReason, Prompt, Rollouts
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.policy_rl.grpo import GRPO


@pytest.fixture
def prompts() -> list[Prompt]:
    return [Prompt(uid, (3, 4), PrefixAudit()) for uid in ("p0", "p1")]


def script(path: Path, *records: Any) -> str:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_scripted_engine_replays_in_order_and_repeats(prompts, tmp_path):
    path = script(
        tmp_path / "script.jsonl",
        {"uid": "p0", "token_ids": [4, 2], "logprobs": [-0.5, -1.5], "finish_reason": "length"},
        {"uid": "p1", "token_ids": [9]},
        {"uid": "p0", "token_ids": [6]},
        {"uid": "p0", "token_ids": [7], "logprobs": None},
    )
    engine = ScriptedEngine(path=path)
    engine.sync(None, 3)
    pair, single = engine.generate([prompts[0], prompts[1]], Sampling(samples=2))
    assert pair[0] == Completion((4, 2), (-0.5, -1.5), FinishReason.LENGTH, 3)
    assert pair[1] == Completion((6,), (0.0,), FinishReason.STOP, 3)
    assert [one.token_ids for one in single] == [(9,), (9,)]
    engine.sync(None, 4)
    (group,) = engine.generate(prompts[:1], Sampling(samples=3))
    assert [one.token_ids for one in group] == [(7,), (4, 2), (6,)]
    assert {one.policy_version for one in group} == {4}


def test_scripted_engine_without_repeat_ends(prompts):
    records = [{"uid": "p0", "token_ids": [n]} for n in (4, 5)]
    engine = ScriptedEngine(records=records, repeat=False)
    engine.sync(None, 0)
    engine.generate(prompts[:1], Sampling(samples=2))
    with pytest.raises(ValueError, match="'p0' has only 2 recorded completions"):
        engine.generate(prompts[:1], Sampling())
    with pytest.raises(ValueError, match="'p1' has none"):
        engine.generate(prompts[1:2], Sampling())
    assert engine.generate([], Sampling()) == []


GOOD = {"uid": "p0", "token_ids": [4]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ({"token_ids": [1]}, "'uid'"),
        ({"uid": "p0"}, "'token_ids'"),
        ({"uid": "p0", "token_ids": "four"}, "not a recorded rollout"),
        ([1, 2], "not a recorded rollout"),
        (GOOD | {"finish_reason": "tired"}, "tired"),
        (GOOD | {"logprobs": [-1.0, -2.0]}, "1 tokens, 2 logprobs"),
    ],
)
def test_bad_script_names_file_and_line(tmp_path, line, message):
    path = script(tmp_path / "script.jsonl", GOOD, GOOD, line)
    with pytest.raises(ValueError, match=rf"script\.jsonl:3: .*{message}"):
        ScriptedEngine(path=path)


def test_script_must_be_given_once(tmp_path):
    with pytest.raises(ValueError, match=r"engine\.path=.*nothing\.jsonl: no such file"):
        ScriptedEngine(path=str(tmp_path / "nothing.jsonl"))
    for options in ({}, {"path": "x", "records": []}):
        with pytest.raises(ValueError, match="engine=scripted needs engine.path"):
            ScriptedEngine(**options)


class Recorded(SampleTable):
    """The real table; also keeps the rollouts themselves."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        rollouts: Rollouts = trainer.datamodule.last_rollouts
        self.rollouts = [*getattr(self, "rollouts", []), rollouts]
        super().on_train_batch_end(trainer, *args)


def test_scripted_engine_replays_what_the_sample_table_kept(tiny_folder, tmp_path):
    """A real run with two rollouts of the same prompts; then the same calls to the replay."""
    task = PrefixAudit(num_train=3)
    data = RolloutDataModule(task=task, engine=HFEngine(), prompts_per_rollout=3)
    data.bind(AutoTokenizer.from_pretrained(tiny_folder))
    table = Recorded(path=str(tmp_path / "samples.jsonl"), keep="all")
    trainer = Trainer(
        accelerator="cpu", max_steps=2, max_epochs=-1, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[table],
    )  # fmt: skip
    module = GRPO(backbone=str(tiny_folder), samples_per_prompt=4, max_new_tokens=6)
    trainer.fit(module, datamodule=data)

    replay = ScriptedEngine(path=str(tmp_path / "samples.jsonl"), repeat=False)
    assert len(table.rollouts) == 2
    for rollouts in table.rollouts:
        replay.sync(module.policy, rollouts.index)
        asked = [rollouts.prompts[i] for i in range(0, 12, 4)]
        again = Rollouts.from_groups(asked, replay.generate(asked, Sampling(samples=4)))
        assert again.prompts == rollouts.prompts
        for mine, theirs in zip(again.completions, rollouts.completions, strict=True):
            assert mine.token_ids == theirs.token_ids
            assert mine.finish_reason is theirs.finish_reason
            assert mine.policy_version == theirs.policy_version
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-6)
