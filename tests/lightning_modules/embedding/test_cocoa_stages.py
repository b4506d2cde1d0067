"""CoCoA's stages one after another in a real Trainer: borders, adapters, exports, learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from datamodules.image_encoding import ImageTextEncoding
from datamodules.images import join_images
from datamodules.tasks.embedding import BridgeSet
from datamodules.tasks.shapes_pairs import ShapesPairs
from lightning_modules.backbones.loading import fold_adapters
from lightning_modules.backbones.tiny_vl import TinyVLOptions, build_tiny_vl
from lightning_modules.backbones.vision_language import VisionLanguage, vl_inputs
from lightning_modules.functional.attention_masks import additive, bidirectional_mask
from tests.lightning_modules.embedding.small_cocoa import cocoa, fit, scenes, stages

LORA = {"r": 4, "alpha": 8.0, "dropout": 0.1}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL that learns: as conf/backbone/tiny_vl.yaml, of two layers."""
    folder = tmp_path_factory.mktemp("small_vl")
    shape = TinyVLOptions(num_layers=2, patch_size=8, merge_size=1, init_std=0.1)
    build_tiny_vl(folder, ShapesPairs().vocabulary(), shape, seed=0)
    return folder


class Watch(Callback):
    """Notes learning rates, how old the optimizer's states are, and the adapters."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.ages: list[set[int]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """The rate of the step that is about to be taken."""
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """The states after a step."""
        states = trainer.optimizers[0].state.values()
        self.ages.append({int(state["step"]) for state in states})
        self.losses.append(float(outputs["loss"]))


def test_every_stage_starts_afresh(vl_folder: Path) -> None:
    data = scenes(vl_folder, stages=stages(2, 3, 3), micro_batches=2, batch_size=2)
    options = {"lr": 1e-3, "warmup_steps": 2, "schedule": "linear"}
    module, watch = cocoa(vl_folder, optimizer=options), Watch()
    trainer = fit(module, data, [watch])
    assert trainer.global_step == 8
    rates = [0.5, 1.0, 0.5, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert watch.rates == pytest.approx([1e-3 * rate for rate in rates])
    after_steps = watch.ages[1::2]
    assert after_steps == [{1}, {2}, {1}, {2}, {3}, {1}, {2}, {3}]
    last = module.results
    assert last["train/lr"] == pytest.approx(1e-3)
    for tag in ("warmup/loss", "warmup/pixel_loss", "bridge/loss", "positive_cosine"):
        assert f"train/{tag}" in last


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl"])
def test_both_architectures_train_every_part_in_every_stage(
    name: str, vl_folder: Path, old_folder: Path
) -> None:
    folder = vl_folder if name == "qwen2_5_vl" else old_folder
    used = {"warmup": ("visual", "layers", "image_decoder"), "bridge": ("visual", "layers"),
            "contrastive": ("visual", "layers")}  # fmt: skip
    for stage, parts in used.items():
        alone = [{"name": stage, "steps": 1}]
        data = scenes(folder, stages=alone)
        module = cocoa(folder)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        fit(module, data)
        assert type(module.policy.base).__name__.startswith("Qwen2" + name[5:7].replace("_v", "V"))
        moved = {k for k, value in module.state_dict().items() if not torch.equal(value, before[k])}
        for part in ("visual", "layers", "image_decoder"):
            has = [key for key in moved if f".{part}." in key]
            assert bool(has) == (part in parts), (stage, part)


def plain_vectors(folder: Path, items: list[Any], encoding: ImageTextEncoding) -> torch.Tensor:
    """Vectors by transformers' own class, one item at a time."""
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    found = []
    for item in encoding.encode(items, "query"):
        ids = torch.tensor([item.ids])
        valid = torch.ones_like(ids).bool()
        images = None if item.image is None else join_images([item.image])
        keywords = vl_inputs(VisionLanguage(model, None, None, None), ids, valid, images)
        mask = additive(bidirectional_mask(valid))
        with torch.no_grad():
            hidden = model.model(input_ids=ids, attention_mask=mask, **keywords).last_hidden_state
        found.append(torch.nn.functional.normalize(hidden[0, -1], dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("lora", [None, LORA])
def test_export_is_a_plain_folder_with_equal_vectors(
    lora: Any, vl_folder: Path, tmp_path: Path
) -> None:
    data = scenes(vl_folder, stages=stages(2, 2, 2))
    module = cocoa(vl_folder, lora=lora, optimizer={"lr": 1e-2})
    fit(module, data)
    module.after_load(data)
    module.export(tmp_path / "export", data.encoding.tokenizer)
    state = load_file(tmp_path / "export" / "model.safetensors")
    assert not [key for key in state if "image_decoder" in key or "lora" in key or "base_l" in key]
    start = load_file(vl_folder / "model.safetensors")
    assert state.keys() - {"lm_head.weight"} == start.keys(), "tied weights may be there twice"
    assert any(not torch.equal(state[key], value) for key, value in start.items())
    items = ["a red ring", data.task.item(data.task.records("test")[0])]
    plain = plain_vectors(tmp_path / "export", items, data.encoding)
    torch.testing.assert_close(plain, module.embed(items), atol=1e-5, rtol=0)
    assert (plain - plain_vectors(vl_folder, items, data.encoding)).abs().max() > 1e-2
    again = cocoa(tmp_path / "export", scenes(tmp_path / "export"))
    torch.testing.assert_close(again.embed(items), plain, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    assert not (tmp_path / "export" / "modules.json").exists()
    about = json.loads((tmp_path / "export" / "preprocessor_config.json").read_text())
    assert about["patch_size"] == 4


def test_folding_adapters_changes_nothing_but_where_they_are(vl_folder: Path) -> None:
    data = scenes(vl_folder)
    module = cocoa(vl_folder, data, lora=LORA)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.policy.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    items = ["a red ring", data.task.item(data.task.records("test")[0])]
    before, base = module.embed(items), dict(module.policy.named_weights())
    base = {name: value.clone() for name, value in base.items()}
    start = dict(cocoa(vl_folder).policy.named_weights())
    fold_adapters(module.policy, seed=3)
    torch.testing.assert_close(module.embed(items), before, atol=1e-5, rtol=0)
    parts = {name: value for name, value in module.policy.named_parameters() if "lora_" in name}
    assert not any(value.any() for name, value in parts.items() if "lora_B" in name)
    first = [value for name, value in parts.items() if "lora_A" in name]
    assert all(0 < float(value.detach().abs().max()) <= value.shape[1] ** -0.5 for value in first)
    for name, value in module.policy.named_weights():
        torch.testing.assert_close(value, base[name], atol=1e-6, rtol=1e-5)
    targets = {name.partition(".lora_")[0].rpartition(".")[2] for name in parts}
    assert {"q_proj", "o_proj", "down_proj", "qkv"} <= targets and "lm_head" not in targets
    moved = {name for name, value in base.items() if not torch.equal(value, start[name])}
    assert len(moved) == len(first)


@pytest.mark.parametrize("is_merged", [True, False])
def test_adapters_of_a_stage_are_in_the_weights_of_the_next(
    is_merged: bool, vl_folder: Path
) -> None:
    data = scenes(vl_folder, stages=stages(2, 2, 2))
    module = cocoa(vl_folder, lora=LORA, merge_lora_between_stages=is_merged)
    name = "policy.model.base_model.model.model.language_model.layers.0.mlp.up_proj"
    weights: list[torch.Tensor] = []
    adapters: list[torch.Tensor] = []

    class Note(Callback):
        """Weights and adapters at the end of every step."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            """As plain copies."""
            layer = pl_module.get_submodule(name)
            weights.append(layer.base_layer.weight.detach().clone())
            adapters.append(layer.lora_A["default"].weight.detach().clone())

    fit(module, data, [Note()])
    changes = [not torch.equal(a, b) for a, b in zip(weights[:-1], weights[1:], strict=True)]
    assert changes == [False, is_merged, False, is_merged, False]
    far = [float((a - b).abs().max()) for a, b in zip(adapters[:-1], adapters[1:], strict=True)]
    assert (min(far[1], far[3]) > 10 * max(far[0], far[2], far[4])) == is_merged
    assert module.saves_all == is_merged
    assert module._is_saved("policy.image_decoder.head.weight")


@pytest.mark.slow
def test_bridge_learns_to_tell_eight_scenes(small_folder: Path) -> None:
    """Masked captions of eight scenes become known, and only by what comes over the bridge."""
    task = ShapesPairs(num_train=8, num_val=2, num_test=2, draws=1, text_share=0.0)
    data = scenes(
        small_folder, task=task, stages=[{"name": "bridge", "steps": 300}], bridge_batch_size=8
    )
    torch.manual_seed(0)
    module, watch = cocoa(small_folder, optimizer={"lr": 3e-3, "warmup_steps": 20}), Watch()
    trainer = fit(module, data, [watch])
    rows = task.bridges("train")
    words = [word for row in rows for word in row.target.split()]
    counts = torch.tensor([words.count(word) for word in sorted(set(words))]).float()
    unigram = float(-(counts / counts.sum() * (counts / counts.sum()).log()).sum())
    trainer.datamodule = data  # type: ignore[attr-defined]
    found = module.measure(BridgeSet("train", rows))
    assert sum(watch.losses[:5]) / 5 > 0.8 * unigram, "it starts on the plateau or above"
    assert sum(watch.losses[-5:]) / 5 < 0.15 * unigram
    assert found["gap"] > 0.5, found
