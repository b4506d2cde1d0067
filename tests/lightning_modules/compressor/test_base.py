"""The compressor's module: loss, penalties, noise, continuations, what it is built from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from datamodules.context_encoding import CompressionBatch
from datamodules.contexts import ContextDataModule
from datamodules.tasks.twin_nouns import TwinNouns
from lightning_modules.backbones.tiny_pair import prepare_tiny_pair
from lightning_modules.compressor.base import CompressorModule
from lightning_modules.compressor.training import continuation, mean_of_ranks, sum_of_ranks

BRIDGE = {
    "memory": {"tokens": 2},
    "projector": {"kind": "low_rank", "rank": 8, "match_scale": False},
}


@pytest.fixture(scope="module")
def task() -> TwinNouns:
    return TwinNouns(num_first=3, num_second=3, num_colours=4, num_held_out=2, num_val=6)


@pytest.fixture(scope="module")
def folder(task: TwinNouns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pair, 16 and 64 wide."""
    return prepare_tiny_pair(
        task, tiny={"hidden_size": 16, "rank": 8, "match_scale": False}, warm_start=None,
        task_settings={}, seed=0, cache_dir=tmp_path_factory.mktemp("pairs"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch(task: TwinNouns, folder: Path) -> CompressionBatch:
    """Six texts of six words."""
    data = ContextDataModule(task=task)
    data.bind(AutoTokenizer.from_pretrained(folder))
    return data.evaluation_batch(task.contexts("val"))


def module_of(folder: Path, tmp_path: Path | None = None, **options: Any) -> CompressorModule:
    """Built, with a trainer where there is a place for it, in evaluation mode."""
    module = CompressorModule(backbone={"path": str(folder)}, **{**BRIDGE, **options})
    module.configure_model()
    if tmp_path is not None:
        plain = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        module.trainer = Trainer(default_root_dir=tmp_path, **plain)
    return module.eval()


def reordered(batch: CompressionBatch, rows: list[int]) -> CompressionBatch:
    names = ("source_ids", "source_mask", "target_ids", "target_mask", "slot_mask", "hidden")
    parts = {name: getattr(batch, name)[rows] for name in names}
    return CompressionBatch(uids=[batch.uids[i] for i in rows], **parts)


# ---------------------------------------------------------------------- the loss


def test_the_loss_is_the_weighted_mean_of_all_labels(
    folder: Path, batch: CompressionBatch, tmp_path: Path
) -> None:
    found = {}
    for weight in (1.0, 3.0, 0.0):
        module = module_of(folder, tmp_path, loss={"slot_weight": weight})
        loss = module.training_step(batch, 0)
        with torch.no_grad():
            memory = module.memory_of(batch, "train/0")
            losses = module.token_loss(memory, batch, "ae").loss
        total = count = 0.0
        for i in range(len(batch.uids)):
            for t in range(batch.target_ids.shape[1]):
                if batch.target_mask[i, t]:
                    own = weight if batch.slot_mask[i, t] else 1.0
                    total, count = total + own * float(losses[i, t]), count + own
        assert float(loss) == pytest.approx(total / count, rel=1e-5)
        found[weight] = float(loss)
    assert len(set(found.values())) == 3, "weights of facts must play a part"


def test_gradients_reach_the_compressor_and_not_the_frozen_decoder(
    folder: Path, batch: CompressionBatch, tmp_path: Path
) -> None:
    module = module_of(folder, tmp_path, bridge_parts=["projector.up"])
    module.training_step(batch, 0).backward()
    pair = module.policy
    assert all(p.grad is None for p in pair.decoder.parameters())
    assert pair.bridge.projector.up.weight.grad is None
    for parameter in (pair.bridge.tokens, pair.bridge.projector.down.weight):
        assert parameter.grad.abs().sum() > 0
    used = [p for name, p in pair.compressor.named_parameters() if "lm_head" not in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in used)


def test_mean_of_ranks_of_one_process() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    assert float(mean_of_ranks(total, torch.tensor(4.0))) == 1.5
    nothing = mean_of_ranks(0 * total, torch.tensor(0.0))
    nothing.backward()
    assert float(nothing.detach()) == 0 and float(total.grad) == 0
    weight = torch.tensor(2.0, requires_grad=True)
    assert not sum_of_ranks(weight).requires_grad and float(weight) == 2


# ---------------------------------------------------------------------- penalties


def test_without_controls_there_is_no_penalty(folder: Path, batch: CompressionBatch) -> None:
    module = module_of(folder)
    memory = module.memory_of(batch, "k")
    scores = module.token_loss(memory, batch, "ae")
    assert module.penalties(memory, scores, batch) == (None, {})


def test_penalties_are_added_by_their_weights(
    folder: Path, batch: CompressionBatch, tmp_path: Path
) -> None:
    plain = float(module_of(folder, tmp_path).training_step(batch, 0))
    module = module_of(
        folder, tmp_path,
        rank_control={"nuclear": 0.5, "whitening": 0.25, "erank_floor": 64.0, "erank_weight": 2.0},
        entropy_control={"penalty": -0.125},
    )  # fmt: skip
    memory = module.memory_of(batch, "train/0")
    scores = module.token_loss(memory, batch, "ae")
    total, metrics = module.penalties(memory, scores, batch)
    found = {name: value for name, (value, _) in metrics.items()}
    weights = {"nuclear_norm": 0.5, "whitening": 0.25, "erank_shortfall": 2.0}
    weights["entropy_penalty"] = -0.125
    assert found.keys() == weights.keys() and all(value > 0 for value in found.values())
    expected = sum(weights[name] * value for name, value in found.items())
    assert total is not None and float(total) == pytest.approx(expected, rel=1e-5)
    assert float(module.training_step(batch, 0)) == pytest.approx(plain + expected, rel=1e-5)
    total.backward()
    assert module.policy.bridge.tokens.grad.abs().sum() > 0


# ---------------------------------------------------------------------- noise and short texts


def test_noise_depends_on_the_text_and_the_key_alone(folder: Path, batch: CompressionBatch) -> None:
    noisy = {**BRIDGE["projector"], "noise": 0.5, "noise_in_eval": True}
    module = module_of(folder, projector=noisy)
    with torch.no_grad():
        memory = module.memory_of(batch, "a").embeds
        rows = [3, 0, 5]
        other = module.memory_of(reordered(batch, rows), "a").embeds
        assert torch.allclose(other, memory[rows], atol=1e-6)
        assert torch.equal(module.memory_of(batch, "a").embeds, memory)
        assert (module.memory_of(batch, "b").embeds - memory).abs().mean() > 0.01
        clean = module_of(folder).memory_of(batch, "a").embeds
        assert (clean - memory).abs().mean() > 0.01


def test_a_text_shorter_than_its_memory_is_refused(folder: Path, batch: CompressionBatch) -> None:
    module = module_of(folder, memory={"tokens": 7})
    with pytest.raises(ValueError, match=r"6 tokens, shorter .*model.memory.tokens=7"):
        module.memory_of(batch, "k")
    counting = module_of(folder, memory={"tokens": 7, "on_short": "count"})
    assert counting.memory_of(batch, "k").num_short == 6


# ---------------------------------------------------------------------- continuations


def odd_batch() -> CompressionBatch:
    """A text of five tokens and one of two, EOS behind them."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 2], [5, 6, 2, 0, 0, 0]])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    slots = torch.tensor([[False, False, True, False, True, False], [False] * 6])
    source = mask[:, 1:]
    hidden = torch.tensor([[True, False, False, False, True], [False] * 5])
    return CompressionBatch(ids[:, :5], source, ids, mask, slots, ["a", "b"], hidden)


def test_the_first_half_is_compressed_and_the_second_written() -> None:
    half = continuation(odd_batch())
    assert half.source_mask.tolist() == [[True, True, True, False, False], [True] + [False] * 4]
    assert half.target_mask.tolist() == [
        [False, False, False, True, True, True], [False, True, True, False, False, False]
    ]  # fmt: skip
    assert half.slot_mask[0].nonzero()[:, 0].tolist() == [4]
    assert half.hidden.tolist() == [[True] + [False] * 4, [False] * 5]


def test_continuations_need_one_tokenizer() -> None:
    batch = odd_batch()
    batch.target_mask = batch.target_mask.clone()
    batch.target_mask[0, -1] = False
    with pytest.raises(ValueError, match="model.lm_ratio above 0 needs one tokenizer"):
        continuation(batch)


def test_a_step_that_continues_never_reads_the_second_half(
    folder: Path, batch: CompressionBatch, tmp_path: Path
) -> None:
    module = module_of(folder, tmp_path, lm_ratio=1.0, loss={"skip": 1})
    changed = reordered(batch, list(range(6)))
    changed.source_ids = batch.source_ids.clone()
    changed.source_ids[:, 3:] = 5
    losses = [float(module.training_step(one, 0)) for one in (batch, changed)]
    assert losses[0] == losses[1]
    assert losses[0] != float(module_of(folder, tmp_path).training_step(batch, 0))
    window = module._window
    assert window["train/lm/ce"][1] == 2 * 6 * 4, "two steps, six texts, three words and EOS"
    assert window["train/loss"][1] == 2 * 6 * 3, "the first one is skipped"
    assert "train/ce" not in window


def test_a_continuation_without_a_label_is_refused(
    folder: Path, batch: CompressionBatch, tmp_path: Path
) -> None:
    module = module_of(folder, tmp_path, lm_ratio=1.0)
    with pytest.raises(ValueError, match=r"model.loss.skip=8 leaves no label .*lm_ratio=1.0"):
        module.training_step(batch, 0)


# ---------------------------------------------------------------------- building and saving


def test_wrong_options_are_named_all_at_once() -> None:
    with pytest.raises(ValueError) as error:
        CompressorModule(backbone="x", lm_ratio=1.5, extra_tokens=-1, controls=["random"],
                         embedder="policy")  # fmt: skip
    for part in ("model.lm_ratio=1.5 ", "model.extra_tokens=-1 ", "model.controls has 'random'",
                 "model.embedder=policy"):  # fmt: skip
        assert part in str(error.value)


def test_a_backbone_without_a_decoder_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.decoder.backbone=null: .* is no exported pair"):
        CompressorModule(backbone=str(tmp_path)).decoder_options()


def test_the_decoder_takes_the_revision_of_its_own_model_only(folder: Path) -> None:
    backbone = {"path": str(folder), "revision": "v1"}
    for own, revision in ((None, "v1"), (str(folder), "v1"), ("other/model", None)):
        module = CompressorModule(backbone=backbone, decoder={"backbone": own})
        assert module.decoder_options().backbone_options.revision == revision


def test_an_exported_pair_starts_as_it_was_or_says_that_it_does_not(
    folder: Path, tmp_path: Path
) -> None:
    module, tokenizer = module_of(folder), AutoTokenizer.from_pretrained(folder)
    module.export(tmp_path / "export", tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = module_of(tmp_path / "export")
    for name, value in module.policy.bridge.state_dict().items():
        assert torch.equal(again.policy.bridge.state_dict()[name], value)
    with pytest.warns(UserWarning, match=r"bridge.safetensors is of another shape .*start anew"):
        module_of(tmp_path / "export", memory={"tokens": 3})


def test_checkpoints_of_adapters_hold_what_the_folder_does_not(folder: Path) -> None:
    module = module_of(folder, lora={"r": 2})
    saved = {name for name in module.state_dict() if module._is_saved(name)}
    assert any(name.startswith("policy.bridge.projector") for name in saved)
    assert any("lora_" in name for name in saved)
    assert not [n for n in saved if "lora_" not in n and not n.startswith("policy.bridge.")]
    learns = module_of(folder, lora={"r": 2}, decoder={"train": "full"})
    assert learns._is_saved("policy.decoder.x") and not learns._is_saved("policy.compressor.x")
    module.saves_all = True
    assert module._is_saved("policy.compressor.x")


def test_a_checkpoint_carries_the_files_of_both_models(folder: Path) -> None:
    files = module_of(folder)._backbone_files()
    for part in ("", "decoder/"):
        assert {f"{part}config.json", f"{part}tokenizer.json"} <= files.keys()
        assert files[f"{part}tokenizer.json"] == (folder / part / "tokenizer.json").read_text()
    other = module_of(folder, decoder={"backbone": str(folder)})  # an exported pair: its decoder
    assert other._backbone_files()["decoder/config.json"] == files["decoder/config.json"]
