"""What the smoke run of every embedding model leaves."""

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

import train
from run_tools.folder import flatten
from tests.embedding_runs.parts import TEXTS, plain_vectors
from tests.models import EMBEDDING_MODELS
from tests.runs import board, command, last_of, main, scalars, small

Make = Callable[..., Any]


@pytest.fixture(scope="module", params=EMBEDDING_MODELS)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    warm_cache: Path,
    compose: Make,
) -> Path:
    """The run folder of a model's smoke run."""
    folder = tmp_path_factory.mktemp("smoke")
    overrides = [*small(request.param, compose), "hydra/job_logging=none"]
    arguments = command(*overrides, output_dir=folder, cache_dir=warm_cache)[2:]
    status, output, errors = main(*arguments)
    assert status == 0, errors
    assert f"run folder:  {folder}" in output
    return folder / request.param / "s0"


def test_files_of_a_run(finished: Path) -> None:
    config: Any = OmegaConf.load(finished / "config.yaml")
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    tops = {"metrics.json", "config.yaml", "checkpoints", "export", "tensorboard"}
    if "model_merging" in config.callbacks:
        tops.add("bags")
    if "labels_folder" in config.data:
        tops.add("labels")
    assert {name.split("/")[0] for name in names} == tops
    assert {name for name in names if name.startswith("checkpoints/")} == {"checkpoints/last.ckpt"}
    export = {"config.json", "litpost.json", "model.safetensors", "tokenizer.json"}
    assert {f"export/{name}" for name in export} <= names
    assert not [name for name in names if "unfinished" in name]
    about = json.loads((finished / "export" / "litpost.json").read_text())
    assert about["module"] == config.model._target_


def test_metrics_and_config_of_a_run(finished: Path, make_config: Make, compose: Make) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    always = {"seed", "model", "time/wall_s", "time/train_s", "mem/peak_gib", "steps", "bad_steps"}
    assert always <= metrics.keys()
    assert any(tag.startswith("test/") for tag in metrics)
    assert (metrics["model"], metrics["steps"]) == (finished.parent.name, 2)
    assert all(math.isfinite(v) for k, v in metrics.items() if k != "model")
    saved = flatten(OmegaConf.to_container(OmegaConf.load(finished / "config.yaml")))
    composed = make_config(*small(finished.parent.name, compose))
    with open_dict(composed):
        composed.run_dir, composed.output_dir = str(finished), str(finished.parents[1])
        composed.predictions = f"{finished}/predictions.jsonl"
    assert saved == flatten(train.plain(composed))


def test_checkpoint_and_export_hold_the_trained_weights(finished: Path) -> None:
    last = last_of(finished)
    path, _, name = torch.load(last, weights_only=True)["litpost"]["module"].rpartition(".")
    cls = getattr(importlib.import_module(path), name)
    module = cls.load_from_checkpoint(last, weights_only=True).eval()
    kind = type(module.policy.base)
    export, start = (
        kind.from_pretrained(folder).state_dict()
        for folder in (finished / "export", module.backbone_options.path)
    )
    streamed = dict(module.policy.named_weights())
    assert streamed.keys() <= export.keys()
    for key, value in streamed.items():
        assert torch.equal(export[key], value), key
    moved = [key for key, value in streamed.items() if not torch.equal(value, start[key])]
    assert len(moved) > len(streamed) / 2, "the run trained next to nothing"


def test_a_loaded_run_embeds_as_the_checkpoint_does(finished: Path) -> None:
    config: Any = OmegaConf.load(finished / "config.yaml")
    loaded = train.load(finished)
    data = instantiate(config.data, _convert_="all")
    path, _, name = config.model._target_.rpartition(".")
    cls = getattr(importlib.import_module(path), name)
    module = cls.load_from_checkpoint(last_of(finished), weights_only=True).eval()
    data.prepare(module.backbone_options.path, "unused", for_training=False)
    module.after_load(data)
    one = next(iter(data.test_dataloader())).items[0]
    items = (one.corpus if hasattr(one, "corpus") else [row.target for row in one.rows])[:3]
    items = [getattr(item, "encoded_text", item) for item in items]
    vectors = loaded.embed(items)
    assert vectors.shape == (3, loaded.policy.width)
    assert torch.allclose(vectors, module.embed(items), atol=1e-6)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    if config.backbone.family == "encoder":
        plain = plain_vectors(finished / "export", TEXTS, config.data.encoding.pooling)
        assert torch.allclose(loaded.embed(TEXTS), plain, atol=1e-5)


def test_tensorboard_of_a_run(finished: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    reader, metrics = board(finished), json.loads((finished / "metrics.json").read_text())
    tags = reader.Tags()
    prefixes = {tag.split("/")[0] for tag in tags["scalars"] if "/" in tag}
    assert {"train", "perf", "val", "test"} <= prefixes
    assert prefixes <= {"train", "perf", "val", "test", "time", "mem", "merge", "labels"}
    for tag in ("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s"):
        assert [step for step, _ in scalars(reader, tag)] == [1, 2], tag
    for tag in tags["scalars"]:
        steps = [step for step, _ in scalars(reader, tag)]
        assert steps == sorted(set(steps)), f"{tag} has a step twice: {steps}"
    assert any(tag.startswith("val/") for tag in tags["scalars"])
    content = {
        tag: HParamsPluginData.FromString(value)
        for tag, value in reader.PluginTagToContent("hparams").items()
    }
    start = content["_hparams_/session_start_info"].session_start_info
    config = OmegaConf.load(finished / "config.yaml")
    assert start.hparams["model.temperature"].number_value == config.model.temperature
    infos = {m.name.tag for m in content["_hparams_/experiment"].experiment.metric_infos}
    final = {k: v for k, v in metrics.items() if isinstance(v, float) and k.startswith("test/")}
    assert final and final.keys() <= infos
    for tag, value in final.items():
        assert scalars(reader, tag)[-1][1] == pytest.approx(value, abs=1e-6)
