"""A tiny vision-language model, and batches ``[image] A <eos> B`` for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from datamodules.tasks.shapes_caption import ShapesCaption
from lightning_modules.backbones.tiny_vl import TinyVLOptions, build_tiny_vl
from lightning_modules.backbones.vision_language import VisionLanguage, encode_images, load_vl


@pytest.fixture(scope="session")
def vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL with the words of ShapesCap, as a folder."""
    folder = tmp_path_factory.mktemp("tiny_vl")
    build_tiny_vl(folder, ShapesCaption().vocabulary(), TinyVLOptions(), seed=0)
    return folder


@pytest.fixture(scope="session")
def vl(vl_folder: Path) -> VisionLanguage:
    """That folder loaded; tests leave it as it is."""
    return load_vl(vl_folder)


@pytest.fixture(scope="session")
def old_folder(vl_folder, tmp_path_factory):
    """A tiny Qwen2-VL with a preprocessor config as the released ones have it."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    shutil.copytree(vl_folder, folder, dirs_exist_ok=True)
    config = json.loads((vl_folder / "config.json").read_text(encoding="utf-8"))
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    text = {key: value for key, value in config["text_config"].items() if key != "model_type"}
    tokens = {key: value for key, value in config.items() if key.endswith("token_id")}
    made = Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens
    )
    Qwen2VLForConditionalGeneration(made).save_pretrained(folder)
    processor = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    processor |= {"min_pixels": 64, "max_pixels": 1024, "image_mean": [0.5] * 3}
    processor |= {"image_std": [0.5] * 3, "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def layout():
    """``(vl, rows, side) -> ids, valid, eos_pos, encoded images or None``.

    A row is (image or None, text A, text B); B may be "".
    """

    def make(vl, rows, side="right", extra=0):
        images = [image for image, _, _ in rows if image is not None]
        encoded = encode_images(vl, images) if images else None
        sizes = iter(encoded.num_tokens(vl.merge_size) if encoded else [])
        made, eos_pos = [], []
        for image, first, second in rows:
            ids = [] if image is None else vl.image_tokens(next(sizes))
            ids = ids + vl.tokenizer(first)["input_ids"]
            eos_pos.append(len(ids))
            made.append([*ids, vl.tokenizer.eos_token_id, *vl.tokenizer(second)["input_ids"]])
        length = max(map(len, made)) + extra
        ids = torch.full((len(made), length), vl.tokenizer.pad_token_id)
        for number, row in enumerate(made):
            first = 0 if side == "right" else length - len(row)
            ids[number, first : first + len(row)] = torch.tensor(row)
            eos_pos[number] += first
        valid = ids != vl.tokenizer.pad_token_id
        return ids, valid, torch.tensor(eos_pos), encoded

    return make
