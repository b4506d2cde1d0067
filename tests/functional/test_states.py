"""Names of live weights in exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
)

from lightning_modules.functional.states import exported_weights, folder_tensors, load_dense

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 16,
    "patch_size": 4, "fullatt_block_indexes": [0],
}  # fmt: skip


def renamed() -> PreTrainedModel:
    """A model that is exported under names of its first checkpoints."""
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION)
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_renamed_weights_are_loaded_from_an_export(adapted: bool, tmp_path: Path) -> None:
    other, model = renamed(), renamed()
    other.save_pretrained(tmp_path)
    saved = dict(folder_tensors(tmp_path))
    assert "model.embed_tokens.weight" in saved
    assert "model.embed_tokens.weight" not in model.state_dict()
    expected = other.state_dict()
    if adapted:
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert set(saved) <= set(exported_weights(model))
    load_dense(model, saved.items())
    live = model.state_dict()
    for name, value in expected.items():
        if not adapted or "q_proj" not in name:
            assert torch.equal(live[name], value), name
    if adapted:
        assert all(not live[name].any() for name in live if "lora_B" in name)
    with pytest.raises(ValueError, match="the weights have no tensor"):
        load_dense(model, list(saved.items())[1:])


def test_experts_that_exports_cut_are_refused() -> None:
    experts = {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 8}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**TEXT, **experts))
    with pytest.raises(ValueError, match=r"cut or join weights \(.*experts.*mode=merge"):
        exported_weights(model)
