"""What a small run of every model of contexts leaves, and that it can be tested again."""

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
from lightning_modules.compressor.folders import load_pair
from run_tools.folder import flatten
from tests.compressor_runs.parts import ALL_SETS
from tests.models import CONTEXT_MODELS
from tests.runs import board, command, last_of, main, scalars, small, unmeasured

Make = Callable[..., Any]


@pytest.fixture(scope="module", params=CONTEXT_MODELS)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    warm_cache: Path,
    compose: Make,
) -> Path:
    """The run folder of a model's smoke run."""
    folder = tmp_path_factory.mktemp("smoke")
    overrides = [*small(request.param, compose), *ALL_SETS, "hydra/job_logging=none"]
    arguments = command(*overrides, output_dir=folder, cache_dir=warm_cache)[2:]
    status, output, errors = main(*arguments)
    assert status == 0, errors
    assert f"run folder:  {folder}" in output
    return folder / request.param / "s0"


def test_files_of_a_run(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    tops = {"metrics.json", "config.yaml", "checkpoints", "export", "tensorboard", "figures"}
    assert {name.split("/")[0] for name in names} == tops
    assert {name for name in names if name.startswith("checkpoints/")} == {"checkpoints/last.ckpt"}
    model = {"config.json", "model.safetensors", "tokenizer.json", "litpost.json"}
    export = model | {f"decoder/{name}" for name in model}
    export |= {"bridge.json", "bridge.safetensors"}
    assert {f"export/{name}" for name in export} <= names
    pictures = ("spectra", "confusion_colour", "pairs_cf", "slot_entropy", "texts")
    assert {f"figures/test_{name}.png" for name in pictures} <= names
    assert not [name for name in names if "unfinished" in name]
    about = json.loads((finished / "export" / "litpost.json").read_text())
    assert about["module"] == OmegaConf.load(finished / "config.yaml").model._target_


def test_metrics_and_config_of_a_run(finished: Path, make_config: Make, compose: Make) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    always = {"seed", "model", "time/wall_s", "time/train_s", "mem/peak_gib", "steps", "bad_steps"}
    assert always <= metrics.keys()
    assert (metrics["model"], metrics["steps"]) == (finished.parent.name, 2)
    assert all(math.isfinite(v) for k, v in metrics.items() if k != "model")
    for name in ("pc", "cf", "neu"):
        for tag in (
            "ce",
            "exact_match",
            "fact_fidelity",
            "shuffled/ce",
            "rank_z/erank",
            "corpus_bleu",
        ):
            assert f"test/{name}/{tag}" in metrics
    for tag in ("knowledge_overwriting", "net_overwriting", "gap", "mcnemar_p", "pair_cosine"):
        assert f"test/cf/{tag}" in metrics
    saved = flatten(OmegaConf.to_container(OmegaConf.load(finished / "config.yaml")))
    composed = make_config(*small(finished.parent.name, compose), *ALL_SETS)
    with open_dict(composed):
        composed.run_dir, composed.output_dir = str(finished), str(finished.parents[1])
        composed.predictions = f"{finished}/predictions.jsonl"
    assert saved == flatten(train.plain(composed))


def test_the_exported_pair_says_what_the_checkpoint_says(finished: Path) -> None:
    config: Any = OmegaConf.load(finished / "config.yaml")
    path, _, name = config.model._target_.rpartition(".")
    cls = getattr(importlib.import_module(path), name)
    module = cls.load_from_checkpoint(last_of(finished), weights_only=True).eval()
    data = instantiate(config.data, _convert_="all")
    data.prepare(str(finished / "export"), "unused", for_training=False)
    batch = data.evaluation_batch(data.evaluation_sets("test")[0].contexts)
    seeds = list(range(len(batch.uids)))
    found = []
    for pair in (module.policy, load_pair(finished / "export")):
        with torch.no_grad():
            memory = pair.compress(batch.source_ids, batch.source_mask, seeds)
            found.append(pair.score(memory, batch.target_ids, batch.target_mask).logprob)
    assert torch.equal(*found) and (found[0][batch.target_mask] < 0).all()
    start = module.backbone_options.path
    moved = {
        name: float((value - before).detach().abs().max())
        for (name, value), before in zip(
            load_pair(finished / "export").compressor.base.named_parameters(),
            load_causal(start).parameters(),
            strict=True,
        )
    }
    assert sum(gap > 0 for gap in moved.values()) > len(moved) / 2, "next to nothing was trained"
    decoders = [load_causal(Path(one, "decoder")) for one in (start, finished / "export")]
    for one, other in zip(*(model.parameters() for model in decoders), strict=True):
        assert torch.equal(one, other), "a frozen decoder has moved"


def load_causal(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("what", ["export", "checkpoint"])
def test_what_is_left_gives_the_same_test(
    what: str, finished: Path, make_config: Make, compose: Make, tmp_path: Path
) -> None:
    expected = json.loads((finished / "metrics.json").read_text())
    path = {
        "export": f"backbone.path={finished / 'export'}",
        "checkpoint": f"ckpt_path={last_of(finished)}",
    }[what]
    own = [*small(finished.parent.name, compose), *ALL_SETS]
    tested = train.run(make_config(*own, "mode=test", path, f"cache_dir={tmp_path / 'cache'}"))
    tags = [tag for tag in unmeasured(expected) if tag.startswith("test/")]
    assert len(tags) > 100
    for tag in tags:
        assert tested[tag] == pytest.approx(expected[tag], abs=1e-6), tag


def test_tensorboard_of_a_run(finished: Path) -> None:
    reader, metrics = board(finished), json.loads((finished / "metrics.json").read_text())
    tags = reader.Tags()
    prefixes = {tag.split("/")[0] for tag in tags["scalars"] if "/" in tag}
    assert prefixes == {"train", "perf", "val", "test", "time", "mem", "size"}
    for tag in ("train/loss", "train/ce_slot", "train/hidden", "train/lr", "perf/tokens_per_s"):
        assert [step for step, _ in scalars(reader, tag)] == [1, 2], tag
    for tag in tags["scalars"]:
        steps = [step for step, _ in scalars(reader, tag)]
        assert steps == sorted(set(steps)), f"{tag} has a step twice: {steps}"
    hidden = [value for _, value in scalars(reader, "train/hidden")]
    assert all(0 < value < 1 / 3 for value in hidden), "half of the colours, a word in three"
    assert "test/figures/spectra" in tags["images"]
    assert any(tag.startswith("test/figures/texts") for tag in tags["tensors"])
    final = {k: v for k, v in metrics.items() if isinstance(v, float) and k.startswith("test/")}
    for tag, value in final.items():
        assert scalars(reader, tag)[-1][1] == pytest.approx(value, abs=1e-6)
