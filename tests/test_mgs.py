"""MGS as a config: surgery in the body, arms, metrics by domain, the paper's recipe, real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

import train
from datamodules.rewards import RewardModel
from datamodules.tasks.mixture import Mixture
from tests.datamodules.tasks.test_preferences import byte_tokenizer, write
from tests.runs import SMALL, read_jsonl

Make = Callable[..., Any]
PARTS = [
    f"data.task.tasks.{name}.num_{split}={size}"
    for name in ("math", "chat", "if")
    for split, size in (("train", 24), ("val", 2), ("test", 3))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One small file a domain, and a random reward model."""
    folder = tmp_path_factory.mktemp("domains")
    checks = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    tokenizer = byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = Qwen3Config(**shape, head_dim=8, num_labels=1, pad_token_id=0)
    Qwen3ForSequenceClassification(config).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    sums = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    return {
        "math": write(folder, sums, "math.jsonl"),
        "chat": write(folder, [{"prompt": f"Topic {i}?"} for i in range(40)], "chat.jsonl"),
        "if": write(folder, [{"prompt": f"Do {i}."} | checks for i in range(40)], "if.jsonl"),
        "judge": str(folder / "judge"),
    }


def own_files(files: dict[str, str]) -> list[str]:
    paths = [f"data.task.tasks.{name}.path={files[name]}" for name in ("math", "chat", "if")]
    return [*paths, f"reward.path={files['judge']}", "reward.dtype=float32", "reward.device=cpu"]


def test_callbacks_default_keeps_the_surgery_and_a_user_can_remove_it(make_config: Make) -> None:
    config = make_config("model=mgs", "callbacks=default", smoke=False)
    surgery = instantiate(config.callbacks.gradient_surgery)
    assert (surgery.granularity, surgery.method) == ("tensor", "pcgrad")
    removed = make_config("model=mgs", "~callbacks.gradient_surgery", smoke=False)
    assert "gradient_surgery" not in removed.callbacks


def test_arms_change_the_surgery_and_one_the_advantages(make_config: Make) -> None:
    config = make_config("model=mgs", smoke=False)
    seen = {}
    for arm in config.arms:
        changed = OmegaConf.merge(config, OmegaConf.from_dotlist(list(config.arms[arm])))
        surgery = instantiate(changed.callbacks.gradient_surgery)
        seen[arm] = (surgery.method, surgery.granularity)
        assert changed.model.normalize_std is (arm == "normalised")
        changed.model.normalize_std = config.model.normalize_std
        assert {**changed, "callbacks": None} == {**config, "callbacks": None}
    assert seen == {
        "naive": ("none", "tensor"),
        "global": ("pcgrad", "global"),
        "module": ("pcgrad", "module"),
        "layer": ("pcgrad", "layer"),
        "normalised": ("none", "tensor"),
    }


@pytest.mark.slow
def test_a_short_run(make_config: Make, tmp_path: Path) -> None:
    counts = [f"data.prompts_per_rollout.{name}=2" for name in ("math", "chat", "if")]
    config = make_config("model=mgs", *SMALL, *PARTS, *counts, "backbone.warm_start.steps=20")
    metrics = train.run(config)
    assert metrics["steps"] == 2
    assert metrics["bad_steps"] == 0
    for name in ("math", "chat", "if"):
        assert f"rollout/reward/{name}_mean" in metrics
        assert f"rollout/score/{name}" in metrics
    records = read_jsonl(tmp_path / "mgs" / "s0" / "samples.jsonl")
    assert {record["domain"] for record in records} == {"math", "chat", "if"}


def test_the_paper_s_recipe_on_a_tiny_backbone(
    make_config: Make, files: dict[str, str], tmp_path: Path
) -> None:
    tiny = ["backbone=tiny", "backbone.path=null", "trainer=auto", "engine=hf"]
    tiny += ["trainer.strategy=auto", "~engine.dtype", *SMALL, "backbone.warm_start.steps=0"]
    config = make_config("experiment=mgs_paper", *own_files(files), *tiny, smoke=False)
    with open_dict(config):
        config.run_dir, config.predictions = str(tmp_path), str(tmp_path / "p.jsonl")
    train.check_config(train.plain(config))
    data = instantiate(config.data, _convert_="all")
    assert isinstance(data.task, Mixture)
    assert isinstance(data.reward, RewardModel)
    backbone = train.prepare_backbone(config, data)
    data.bind(AutoTokenizer.from_pretrained(backbone["path"]))
    module = train.build_module(config, backbone)
    assert (module.temperature, module.kl_coef, module.dual_clip) == (0.7, 0.001, 3.0)
    assert (module.loss_aggregation, module.normalize_std) == ("sequence_mean", True)
    assert data.window == 72
    prompts = data.train_prompts()
    texts = {p.domain: p.task.render(p.token_ids) for p in prompts}
    assert set(texts) == {"math", "chat", "if"}
    for text in texts.values():
        assert text.startswith("First plan the answer between <think>")


def test_a_run_on_files_with_a_reward_model(
    make_config: Make, files: dict[str, str], tmp_path: Path
) -> None:
    counts = [f"data.prompts_per_rollout.{name}=1" for name in ("math", "chat", "if")]
    config = make_config(
        "model=mgs", "data=mixture_files", "reward=model", *own_files(files), *SMALL, *counts,
        "backbone.warm_start.steps=0", "model.max_new_tokens=8", "model.samples_per_prompt=2",
    )  # fmt: skip
    metrics = train.run(config)
    assert metrics["steps"] == 2
    assert metrics["rollout/reward_nan/chat"] == 0.0
    assert metrics["rollout/reward_model/chat"] != 0.0
    assert metrics["rollout/reward_model/if"] == 0.0
    assert json.loads((tmp_path / "mgs" / "s0" / "metrics.json").read_text())["steps"] == 2
