"""Every file under conf/ composes and its parts are built; every model's smoke run is complete."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from datamodules.tasks.search_world import SearchWorld
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder
from run_tools.folder import RunFolder, flatten
from tests.data_files import (
    data_options,
    write_agent,
    write_judge,
    write_reward_model,
)
from tests.models import MODELS, POLICY_MODELS, composed
from tests.probes import probe
from tests.runs import (
    ONE_UPDATE,
    REPO,
    SMALL,
    board,
    command,
    existing,
    main,
    read_jsonl,
    scalars,
    small,
)

CONF = REPO / "conf"
WORDS = SearchWorld().vocabulary()
#: Of every tiny backbone the keys that it has.
UNFITTED = [*SMALL, "backbone.warm_start.steps=0", "backbone.warm_start.decoder_steps=0"]
Make = Callable[..., Any]


def options(group: str) -> list[str]:
    """Names of a group's option files, those for inheriting left out."""
    names = (path.stem for path in (CONF / group).glob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "claim"))
PARTS = [(group, name) for group in GROUPS for name in options(group) if group != "experiment"]
CLAIMS = sorted(p.relative_to(CONF).with_suffix("").as_posix() for p in CONF.glob("claim/*/*.yaml"))
#: One model of each kind of data and of backbone: what options of theirs are tried with.
KINDS = {
    name: composed(f"model={name}")
    for name in ("grpo", "contrastive", "cocoa", "agentic_r", "compressor")
}


def test_the_groups_are_those_of_the_design() -> None:
    expected = {"model", "data", "backbone", "engine", "reward", "lora", "optimizer", "kernel",
                "trainer", "agent",
                "callbacks", "logger", "experiment", "debug"}  # fmt: skip
    assert set(GROUPS) == expected
    assert MODELS
    assert CLAIMS


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model."""
    return write_reward_model(tmp_path_factory.mktemp("reward"))


def build(config: Any, folder: Path) -> tuple[Any, Any, Any]:
    """Data, module and trainer of a config, built as ``train.run`` does it."""
    with open_dict(config):
        config.run_dir, config.predictions = str(folder), str(folder / "predictions.jsonl")
    shrink(config)
    train.check_config(train.plain(config))
    data = instantiate(config.data, _convert_="all")
    backbone = train.prepare_backbone(config, data)
    module = train.build_module(config, backbone)
    module.configure_model()
    trainer = train.build_trainer(config, data, RunFolder(folder))
    names = {config.callbacks[name]._target_ for name in config.callbacks}
    built = {f"{type(c).__module__}.{type(c).__name__}" for c in trainer.callbacks}
    assert names <= built
    assert len(trainer.loggers) == len(config.logger)
    probe(config, data, module, backbone["path"])
    return data, module, trainer


def shrink(config: Any) -> None:
    """Set those of ``UNFITTED`` that the config has."""
    for key, value in (text.split("=") for text in existing(UNFITTED, config)):
        OmegaConf.update(config, key, int(value))


def kind_of(group: str, name: str) -> str:
    """The model that an option is tried with: one of its own kind of data or backbone."""
    config = composed("model=grpo", f"{group}={name}")
    mine = {"data": config.data._target_, "backbone": config.backbone.get("family")}
    for kind, other in KINDS.items():
        theirs = {"data": other.data._target_, "backbone": other.backbone.family}
        if group in mine and mine[group] == theirs[group]:
            return kind
    return "grpo"


@pytest.mark.parametrize("model", MODELS)
def test_model(model: str, make_config: Make, tmp_path: Path) -> None:
    config = make_config(f"model={model}", smoke=False)
    assert config.name == model
    data, module, trainer = build(config, tmp_path)
    assert f"{type(module).__module__}.{type(module).__qualname__}" == config.model._target_
    assert trainer.max_steps == config.trainer.max_steps
    assert (trainer.max_steps > 0) != (trainer.max_epochs > 0), "one of them ends the run"
    assert trainer.accumulate_grad_batches == data.window
    for arm in config.arms:
        changed = OmegaConf.merge(config, OmegaConf.from_dotlist(list(config.arms[arm])))
        assert changed != config, f"the arm {arm} changes nothing"
        train.check_config(train.plain(changed))


@pytest.mark.parametrize(("group", "name"), PARTS, ids=[f"{g}={n}" for g, n in PARTS])
def test_option(
    group: str, name: str, make_config: Make, tmp_path: Path, reward_model: Path, tiny_folder: Path
) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text('{"uid": "1", "token_ids": [3]}\n')
    needs = {
        "backbone=hf": [f"backbone.path={tiny_folder}", "backbone.dtype=float32"],
        "backbone=minilm": ["data=pair_file", *data_options(tmp_path, "pair_file")],
        "reward=model": [f"reward.path={reward_model}", "reward.dtype=float32"],
        **{
            f"agent={one}": [f"agent.path={write_agent(tmp_path, WORDS)}"] if name == one else []
            for one in ("folder", "grpo", "ppo")
        },
        "reward=judge": [f"reward.path={write_judge(tmp_path)}"] if name == "judge" else [],
        "engine=scripted": [f"engine.path={script}"],
        "trainer=fsdp": ["trainer.accelerator=cpu"],
        "trainer=slurm": ["trainer.accelerator=cpu"],
    }
    choice = f"{group}={name}"
    own = needs.get(choice, data_options(tmp_path, name) if group == "data" else [])
    kind = "contrastive" if choice == "backbone=minilm" else kind_of(group, name)
    kind = "agentic_r" if group == "agent" else kind
    model = [] if group == "model" else [f"model={kind}"]
    config = make_config(*model, choice, *own, smoke=False)
    build(config, tmp_path)


@pytest.mark.parametrize("name", options("experiment"))
def test_experiment(name: str, make_config: Make, tmp_path: Path, reward_model: Path) -> None:
    recipe: Any = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    groups = {k: v for one in recipe.defaults if one != "_self_" for k, v in one.items()}
    small = data_options(tmp_path, groups.get("override /data", ""))
    if name.endswith("_paper"):
        others = dict.fromkeys(("boom", "agentic_r"), "tiny_encoder")
        others |= {"cocoa": "tiny_vl", "compressor": "tiny_pair"}
        tiny = others.get(groups["override /model"], "tiny")
        small = [f"backbone={tiny}", "backbone.path=null", "trainer=auto", "engine=hf"]
        small += ["trainer.precision=32-true", "trainer.strategy=auto"]
        small += [f"~engine.{key}" for key in recipe.get("engine", {})]
        small += (rows := data_options(tmp_path, groups["override /data"]))
        if "test_path" in recipe.data.get("task", {}):
            small.append(rows[0].replace("data.path", "data.task.test_path"))
        shares = {"val_fraction", "test_fraction"} & recipe.data.get("task", {}).keys()
        small += [f"data.task.{share}=0.2" for share in sorted(shares)]  # of few rows
        if "override /agent" in groups:
            small += [f"agent.path={write_agent(tmp_path)}", "data.judge.path=null"]
            small += ["data.task.search.passages=null", "data.task.search.val_fraction=0.2"]
            small += ["data.task.search.test_fraction=0.2"]
        if "decoder" in recipe.model:
            small.append("model.decoder.backbone=null")  # a tiny pair has its own
        if "mask_token" in recipe.model:
            small.append("model.mask_token=null")  # a tiny tokenizer has its own
        small += {
            "model": [f"reward.path={reward_model}", "reward.dtype=float32"],
            "judge": [f"reward.path={write_judge(tmp_path)}", "reward.judge.engine=null"],
        }.get(groups.get("override /reward"), [])
    config = make_config(f"experiment={name}", *small, smoke=False)
    build(config, tmp_path)
    wanted = {k: v for k, v in flatten(OmegaConf.to_container(recipe)).items() if k != "defaults"}
    got = flatten(train.plain(config))
    ours = {option.lstrip("~").split("=")[0] for option in (*small, *UNFITTED)}
    shrunk = {k for k in wanted for option in ours if f"{k}.".startswith(f"{option}.")}
    lost = [k for k, v in wanted.items() if k not in shrunk and got.get(k) != v]
    assert not lost, f"the experiment's own values do not win: {lost}"


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim(claim: str, make_config: Make, tmp_path: Path) -> None:
    _, paper, arm = claim.split("/")
    config = make_config(f"+claim/{paper}={arm}", smoke=False)
    merge = config.backbone.merge
    words = instantiate(config.data.task).vocabulary()
    for folder in merge.folders if merge else []:  # exports of other arms of this claim
        build_tiny(folder, words, TinyOptions(), seed=0)
    if config.backbone.path:
        build_tiny_encoder(config.backbone.path, words, TinyEncoderOptions(), seed=0)
    if "path" in (config.data.get("reward") or {}):  # the judge that another arm trained
        write_judge(Path(config.data.reward.path).parent)
    assert (config.claim.name, config.claim.arm) == (paper, arm)
    assert config.resume == "auto", "a killed sweep must go on"
    assert list(config.compare) == []
    build(config, tmp_path)


def test_claim_arms_differ_only_in_what_they_say(make_config: Make) -> None:
    seen: dict[str, str] = {}
    for claim in CLAIMS:
        _, paper, arm = claim.split("/")
        values = flatten(train.plain(make_config(f"+claim/{paper}={arm}", smoke=False)))
        text = json.dumps({k: v for k, v in values.items() if k != "claim.arm"}, sort_keys=True)
        assert text not in seen, f"{claim} is the same run as {seen.get(text)}"
        seen[text] = claim


def test_callbacks_default_keeps_what_the_model_added(make_config: Make, tmp_path: Path) -> None:
    own = tmp_path / "conf" / "model" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(
        "# @package _global_\ndefaults:\n  - grpo\n  - _self_\n"
        "callbacks:\n  extra:\n    _target_: tests.runs.CrashAt\n    batch: 7\n"
    )
    found = ["model=mine", f"hydra.searchpath=[file://{own.parents[1]}]"]
    config = make_config(*found, "callbacks=default")
    assert config.callbacks.extra.batch == 7
    assert "checkpoint" in config.callbacks
    assert make_config(*found, "callbacks.extra.batch=9").callbacks.extra.batch == 9
    assert "extra" not in make_config(*found, "~callbacks.extra").callbacks
    for model in MODELS:
        body = OmegaConf.load(CONF / "model" / f"{model}.yaml").get("callbacks", {})
        kept = make_config(f"model={model}", "callbacks=default").callbacks
        assert set(body) <= set(kept)


def test_the_command_line_wins_over_model_and_experiment(make_config: Make) -> None:
    config = make_config("model=grpo", "optimizer.lr=0.5", "trainer.max_steps=3", "data.passes=2")
    assert (config.optimizer.lr, config.trainer.max_steps, config.data.passes) == (0.5, 3, 2)
    assert make_config("model=grpo").trainer.max_steps == 2, "smoke wins over the model"


def test_cfg_job_prints_the_whole_config(tmp_path: Path, warm_cache: Path) -> None:
    arguments = command("--cfg", "job", output_dir=tmp_path, cache_dir=warm_cache)[2:]
    status, output, errors = main(*arguments)
    assert status == 0, errors
    printed = OmegaConf.create(output)
    assert {"model", "data", "backbone", "trainer", "callbacks", "optimizer"} <= set(printed)
    assert printed.output_dir == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_help_lists_groups_options_and_commands() -> None:
    status, output, errors = main("--help")
    assert status == 0, errors
    for group in GROUPS:
        line = next(line for line in output.splitlines() if line.startswith(f"{group}:"))
        listed = line.split(":", 1)[1].replace(" ", "").split(",")
        assert set(options(group)) <= set(listed)
    assert output.count("python train.py") >= 10


# --- what a finished run leaves ---------------------------------------------------------------


@pytest.fixture(scope="module", params=POLICY_MODELS)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    warm_cache: Path,
    compose: Make,
) -> Path:
    """The run folder of a model's smoke run."""
    folder = tmp_path_factory.mktemp("smoke")
    overrides = [*small(request.param, compose, *ONE_UPDATE), "hydra/job_logging=none"]
    arguments = command(*overrides, output_dir=folder, cache_dir=warm_cache)[2:]
    status, output, errors = main(*arguments)
    assert status == 0, errors
    assert f"run folder:  {folder}" in output
    return folder / request.param / "s0"


def test_files_of_a_run(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    export = {"config.json", "generation_config.json", "litpost.json", "model.safetensors",
              "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    expected = {"metrics.json", "config.yaml", "samples.jsonl", "checkpoints", "export",
                "tensorboard", "checkpoints/last.ckpt", "tensorboard/hparams.yaml"}  # fmt: skip
    expected |= {f"export/{name}" for name in export}
    assert {name for name in names if "events.out.tfevents" not in name} == expected


def test_metrics_and_config_of_a_run(finished: Path, make_config: Make, compose: Make) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    always = {"seed", "model", "time/wall_s", "time/train_s", "mem/peak_gib", "steps", "bad_steps"}
    assert always <= metrics.keys()
    assert any(tag.startswith("test/") for tag in metrics)
    assert (metrics["model"], metrics["steps"]) == (finished.parent.name, 2)
    assert all(math.isfinite(v) for k, v in metrics.items() if k != "model")
    text = (finished / "config.yaml").read_text()
    assert "${" not in text, "resolved"
    assert "???" not in text
    saved = flatten(OmegaConf.to_container(OmegaConf.load(finished / "config.yaml")))
    composed = make_config(*small(finished.parent.name, compose, *ONE_UPDATE))
    with open_dict(composed):
        composed.run_dir, composed.output_dir = str(finished), str(finished.parents[1])
        composed.predictions = f"{finished}/predictions.jsonl"
    assert saved == flatten(train.plain(composed))


def test_samples_of_a_run(finished: Path) -> None:
    records = read_jsonl(finished / "samples.jsonl")
    assert {record["step"] for record in records} == {1, 2}
    for record in records:
        assert len(record["token_ids"]) == len(record["logprobs"]) > 0
        assert all(value <= 0 for value in record["logprobs"])
        assert record["prompt"]
        assert math.isfinite(record["advantage"])


def test_export_reloads_with_equal_logits(finished: Path) -> None:
    last = finished / "checkpoints" / "last.ckpt"
    path, _, name = torch.load(last, weights_only=True)["litpost"]["module"].rpartition(".")
    cls = getattr(importlib.import_module(path), name)
    module = cls.load_from_checkpoint(last, weights_only=True).eval()
    plain = AutoModelForCausalLM.from_pretrained(finished / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    records = read_jsonl(finished / "samples.jsonl")
    ids = torch.tensor([records[0]["token_ids"] * 2])
    assert tokenizer.decode(records[0]["token_ids"]) == records[0]["completion"]
    with torch.no_grad():
        ours, theirs = module.policy(ids).logits, plain(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-6)
    untrained = AutoModelForCausalLM.from_pretrained(module.backbone_options.path)
    with torch.no_grad():
        assert not torch.allclose(untrained(ids).logits, theirs, atol=1e-6), "nothing was trained"


def test_tensorboard_of_a_run(finished: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    reader, metrics = board(finished), json.loads((finished / "metrics.json").read_text())
    tags = reader.Tags()
    prefixes = {tag.split("/")[0] for tag in tags["scalars"] if "/" in tag}
    assert {"train", "rollout", "perf", "val", "test"} <= prefixes
    assert prefixes <= {
        "train", "rollout", "perf", "val", "test", "time", "mem", "surgery",
        "pseudo", "critique", "criteria",
    }  # fmt: skip
    for tag in ("train/loss", "train/lr", "rollout/reward_mean", "perf/tokens_per_s"):
        assert [step for step, _ in scalars(reader, tag)] == [1, 2]
    for tag in tags["scalars"]:
        steps = [step for step, _ in scalars(reader, tag)]
        assert steps == sorted(set(steps)), f"{tag} has a step twice: {steps}"
    parts = ("reward", "length", "advantage", "token_surprise")
    assert {f"rollout/{part}_histogram" for part in parts} <= set(tags["histograms"])
    for part in parts:
        for event in reader.Histograms(f"rollout/{part}_histogram"):
            assert event.histogram_value.num > 0
    table = reader.Tensors("rollout/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    header, _, *rows = table.splitlines()
    assert {"prompt", "completion", "reward", "advantage"} <= set(
        header.replace(" ", "").split("|")
    )
    column = header.split("|").index(" advantage ")
    advantages = [float(row.split("|")[column]) for row in rows]
    half = len(rows) // 2
    assert min(advantages[:half]) >= max(advantages[half:]), "best first, then worst"

    content = {
        tag: HParamsPluginData.FromString(value)
        for tag, value in reader.PluginTagToContent("hparams").items()
    }
    start = content["_hparams_/session_start_info"].session_start_info
    config = OmegaConf.load(finished / "config.yaml")
    assert start.hparams["optimizer.lr"].number_value == pytest.approx(config.optimizer.lr)
    aggregation = start.hparams["model.loss_aggregation"].string_value
    assert aggregation == config.model.loss_aggregation
    infos = {m.name.tag for m in content["_hparams_/experiment"].experiment.metric_infos}
    final = {k: v for k, v in metrics.items() if isinstance(v, float) and k.startswith("test/")}
    assert final
    assert final.keys() <= infos
    for tag, value in final.items():
        assert scalars(reader, tag)[-1][1] == pytest.approx(value, abs=1e-6)
