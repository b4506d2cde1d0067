"""Whole runs of CoCoA: killed in every stage, on two processes, tested and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from safetensors.torch import load_file

import train
from datamodules.tasks.shapes_pairs import ShapesPairs
from tests.data_files import write_rows
from tests.runs import (
    assert_same_run,
    assert_same_weights,
    board,
    call,
    command,
    last_of,
    scalars,
    step_of,
    unmeasured,
    weights,
)

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
#: Two steps of each stage, of eight rows, in a model of one layer.
STAGES = "{name: warmup, steps: 2}, {name: bridge, steps: 2}, {name: contrastive, steps: 2}"
SMALL = [
    "model=cocoa",
    f"data.stages=[{STAGES}]",
    "data.batch_size=8",
    "data.bridge_batch_size=8",
    "data.task.num_train=24",
    "data.task.num_val=6",
    "data.task.num_test=6",
    "backbone.tiny.num_layers=1",
    "trainer.max_steps=-1",
]
STEPS = 6
EVERY_STEP = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.every_seconds=null",
              "trainer.limit_val_batches=1.0"]  # fmt: skip
LORA = ["lora=default", "lora.r=4", "lora.dropout=0.1"]


def crash(make_config: Make, *overrides: str, before: int) -> None:
    """The run ends before that step, counted from where it goes on."""
    stop = ["+callbacks.crash._target_=tests.runs.CrashAt", f"+callbacks.crash.batch={before}"]
    with pytest.raises(KeyError, match="crashed before"):
        train.run(make_config(*SMALL, *EVERY_STEP, *overrides, "run_id=broken", *stop))


@pytest.mark.parametrize("lora", [[], LORA], ids=["whole", "adapters"])
def test_a_run_broken_in_every_stage_ends_like_the_unbroken_one(
    lora: list[str], make_config: Make, tmp_path: Path
) -> None:
    expected = train.run(make_config(*SMALL, *EVERY_STEP, *lora, "run_id=whole"))
    assert expected["steps"] == STEPS and expected["train/grad_norm"] > 0
    at, broken = 0, tmp_path / "cocoa" / "broken"
    for step in (1, 3, 4, 5):  # inside each stage, and between two
        crash(make_config, *lora, "resume=auto", before=step - at)
        at = step
        assert step_of(last_of(broken)) == at
    found = train.run(make_config(*SMALL, *EVERY_STEP, *lora, "run_id=broken", "resume=auto"))
    whole = tmp_path / "cocoa" / "whole"
    assert_same_run(whole, broken, STEPS)
    assert unmeasured(found) == unmeasured(expected)

    # the area is the mean of the contrastive stage's recalls, and went through the break at 5
    recalls = scalars(board(whole), "val/retrieval/recall_at_1")[4:]
    areas = scalars(board(broken), "val/area")
    assert [step for step, _ in recalls] == [step for step, _ in areas] == [5, 6]
    first, second = (value for _, value in recalls)
    assert [value for _, value in areas] == pytest.approx([first, (first + second) / 2])
    assert found["val/area"] == pytest.approx((first + second) / 2)
    assert found["val/area_points"] == 2

    decoder = {k for k in weights(last_of(broken)) if ".image_decoder." in k}
    assert decoder, "a run broken in the warm-up needs it"


def test_checkpoint_and_export_are_enough(make_config: Make, tmp_path: Path) -> None:
    expected = train.run(make_config(*SMALL, "trainer.limit_test_batches=1.0"))
    run = tmp_path / "cocoa" / "s0"
    tested = train.run(
        make_config(
            *SMALL, "mode=test", f"ckpt_path={last_of(run)}", "trainer.limit_test_batches=1.0"
        )
    )
    for tag in ("test/retrieval/recall_at_1", "test/retrieval/alignment", "test/bridge/gap"):
        assert tested[tag] == pytest.approx(expected[tag], abs=1e-6), tag
    assert expected["test/bridge/gap"] != 0
    module = train.load(run)
    task = ShapesPairs(num_test=2)
    items = [*(task.item(scene) for scene in task.records("test")), "a red ring at tl"]
    vectors = module.embed(items)
    assert vectors.shape == (3, 64) and torch.allclose(vectors.norm(dim=1), torch.ones(3))
    exported = train.run(
        make_config(
            *SMALL, "mode=test", f"backbone.path={run / 'export'}", "run_id=again",
            "trainer.limit_test_batches=1.0",
        )
    )  # fmt: skip
    tag = "test/retrieval/alignment"
    assert exported[tag] == pytest.approx(expected[tag], abs=1e-5)


def test_stages_from_files(make_config: Make, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "image_text_file", 40)
    captions = tmp_path / "captions.jsonl"
    lines = [{"image_path": f"{i}.png", "caption": f"number {i}"} for i in range(1, 41)]
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = train.run(
        make_config(
            *(option for option in SMALL if "data.task" not in option),
            "data=image_text_file", f"data.path={rows}", f"data.task.captions_path={captions}",
            "data.task.val_fraction=0.2", "data.encoding.image_sizes={warmup: 16}",
            "trainer.limit_test_batches=1.0",
        )
    )  # fmt: skip
    assert metrics["steps"] == STEPS
    for stage in ("warmup", "bridge"):
        assert metrics[f"train/{stage}/loss"] > 1
    assert 0 < metrics["test/pairs/recall_at_10"] <= 1
    assert {"test/bridge/loss", "test/bridge/gap"} <= metrics.keys()


CONTRAST = ["data.stages=[{name: contrastive, steps: 2}]", "test_base=false"]


@pytest.mark.parametrize("lora", [[], LORA], ids=["whole", "adapters"])
def test_merges_with_an_earlier_run(lora: list[str], make_config: Make, tmp_path: Path) -> None:
    """Exports of Qwen2.5-VL have other names than the running model."""
    own = [*SMALL, *CONTRAST, "trainer.limit_test_batches=1.0"]
    train.run(make_config(*own, "seed=1", "run_id=earlier"))
    earlier = tmp_path / "cocoa" / "earlier" / "export"
    merging = ["callbacks=[default,model_merging]", "callbacks.model_merging.method=linear"]
    include = f"callbacks.model_merging.include=[{earlier}]"
    found = train.run(make_config(*own, *lora, *merging, include, "run_id=merged"))
    run = tmp_path / "cocoa" / "merged"
    exports = [load_file(folder / "model.safetensors") for folder in (earlier, run / "bags" / "0")]
    merged = load_file(run / "export" / "model.safetensors")
    mean = {name: (exports[0][name] + exports[1][name]) / 2 for name in merged}
    assert "visual.patch_embed.proj.weight" in merged
    assert_same_weights(mean, merged, atol=1e-6)
    assert any(not torch.equal(exports[0][name], exports[1][name]) for name in merged)
    tested = train.run(make_config(*own, "mode=test", f"backbone.path={run / 'export'}"))
    tag = "test/retrieval/alignment"
    assert tested[tag] == pytest.approx(found[tag], abs=1e-5)


def test_images_and_texts_by_contrast_alone(make_config: Make) -> None:
    own = [*SMALL[1:], "model=contrastive", "data=shapes_caption", "backbone=tiny_vl"]
    own += ["trainer.limit_test_batches=1.0"]
    with pytest.raises(ValueError, match="the stage 'warmup', and this model trains contrastive"):
        train.run(make_config(*own, "test_base=false"))
    metrics = train.run(make_config(*own, *CONTRAST, "run_id=contrast"))
    assert metrics["steps"] == 2 and 0 < metrics["test/retrieval/recall_at_10"] <= 1
    assert "test/bridge/gap" not in metrics and "test/gap" not in metrics
    with pytest.raises(
        InstantiationException, match="data.schedule.bags cannot be cut from data with stages"
    ):
        train.run(make_config(*own, *CONTRAST, "data.schedule.bags=[{percent: 50}]", "run_id=bags"))


#: Ways to train on two processes; plain gradients, so that weights differ as much as these do.
SGD = ["optimizer.class_path=torch.optim.SGD", "optimizer.lr=0.05", "mode=fit",
       "trainer.limit_val_batches=0"]  # fmt: skip
DDP = ["trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
FSDP = ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=-1"]
PLAIN = ["lora=default", "lora.r=4"]
TWO = {
    "ddp": (DDP, []),
    "ddp, chunks, windows": (DDP, ["model.chunk_size=3", "data.micro_batches=2"]),
    "ddp, adapters": (DDP, PLAIN),
    "fsdp": (FSDP, []),
    # in half of the bridge's micro-batches one rank has an image and the other a text
    "fsdp, chunks, windows": (
        FSDP,
        ["model.chunk_size=3", "data.micro_batches=2", "data.bridge_batch_size=2"],
    ),
    "fsdp, adapters": (FSDP, PLAIN),
}


@pytest.mark.parametrize("way", TWO)
def test_two_processes_train_as_one_does(
    way: str, make_config: Make, tmp_path: Path, warm_cache: Path
) -> None:
    strategy, options = TWO[way]
    own = [*SMALL, *SGD, *options]
    both = [*own, *strategy, "run_id=two"]
    result = call(*command(*both, output_dir=tmp_path, cache_dir=warm_cache))
    assert result.returncode == 0, result.stderr
    alone = train.run(make_config(*own, "run_id=one"))
    one, two = tmp_path / "cocoa" / "one", tmp_path / "cocoa" / "two"
    assert_same_weights(weights(last_of(one)), weights(last_of(two)), atol=2e-5)
    metrics = json.loads((two / "metrics.json").read_text())
    assert metrics["steps"] == alone["steps"] == STEPS
    tags = ["warmup/loss", "warmup/pixel_loss", "bridge/loss", "loss", "grad_norm", "alignment"]
    for tag in tags:
        assert metrics[f"train/{tag}"] == pytest.approx(alone[f"train/{tag}"], rel=1e-4), tag
    exports = [load_file(run / "export" / "model.safetensors") for run in (one, two)]
    assert_same_weights(*exports, atol=2e-5)
    saved = json.loads((two / "export" / "preprocessor_config.json").read_text())
    assert saved["patch_size"] == 8
