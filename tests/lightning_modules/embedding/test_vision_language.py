"""The tiny Qwen2.5-VL as a folder, loading of both architectures, images, positions."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.tasks.shapes_caption import ShapesCaption
from lightning_modules.backbones.tiny_vl import VISION, TinyVLOptions, build_tiny_vl
from lightning_modules.backbones.vision_language import (
    encode_images,
    load_vl,
    mrope_positions,
    read_image,
    vl_inputs,
)
from lightning_modules.functional.attention_masks import additive, causal_mask

WORDS = ShapesCaption().vocabulary()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def old_vl(old_folder):
    return load_vl(old_folder)


@pytest.fixture(params=["qwen2_5_vl", "qwen2_vl"])
def either(request, vl, old_vl):
    return vl if request.param == "qwen2_5_vl" else old_vl


# --- the folder -----------------------------------------------------------------------------------


def test_folder_loads_again_with_its_words_and_special_tokens(vl):
    known = vl.tokenizer.get_vocab()
    config = vl.model.config
    assert [known[word] for word in VISION] == [
        config.vision_start_token_id,
        config.vision_end_token_id,
        config.image_token_id,
        config.video_token_id,
    ]
    assert vl.mask_id == known["<mask>"] and config.text_config.eos_token_id == known["<eos>"]
    assert config.text_config.pad_token_id == known["<pad>"]
    assert len(known) == len(WORDS) + 8 == config.text_config.vocab_size
    text = "a red ring at tl <mask> <eos>"
    ids = vl.tokenizer(text)["input_ids"]
    assert vl.tokenizer.decode(ids) == text and known["<unk>"] not in ids
    assert set(vl.special_ids) == set(range(8))
    assert vl.model.training and vl.model.lm_head.weight.data_ptr() == (
        vl.model.get_input_embeddings().weight.data_ptr()
    )
    assert "torchvision" not in sys.modules


def test_seed_decides_the_weights_and_leaves_the_generator(vl, vl_folder, tmp_path):
    state = torch.get_rng_state()
    for seed in (0, 1):
        build_tiny_vl(tmp_path / str(seed), WORDS, TinyVLOptions(), seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = (load_vl(tmp_path / str(seed)).model.state_dict() for seed in (0, 1))
    mine = vl.model.state_dict()
    assert all(torch.equal(again[name], mine[name]) for name in mine)
    assert not torch.equal(other["lm_head.weight"], mine["lm_head.weight"])


def test_untied_and_other_shapes(tmp_path):
    options = TinyVLOptions(
        hidden_size=48, num_heads=2, num_kv_heads=1, tie_embeddings=False, vision_layers=1,
        vision_heads=1, patch_size=8, merge_size=1, image_size=64,
    )  # fmt: skip
    build_tiny_vl(tmp_path, WORDS, options, seed=0)
    vl = load_vl(tmp_path)
    assert vl.model.lm_head.weight is not vl.model.get_input_embeddings().weight
    encoded = encode_images(vl, [noise(64, 64)])
    assert encoded.num_tokens(vl.merge_size) == [64]
    ids = torch.tensor([vl.image_tokens(64)])
    valid = torch.ones_like(ids).bool()
    assert vl.model(input_ids=ids, **vl_inputs(vl, ids, valid, encoded)).logits.isfinite().all()


def test_without_words_a_token_is_a_byte(tmp_path):
    build_tiny_vl(tmp_path, None, TinyVLOptions(num_layers=1), seed=0)
    vl = load_vl(tmp_path)
    assert len(vl.tokenizer) == vl.model.config.text_config.vocab_size == 3 + 256 + 5
    ids = vl.tokenizer("Ein St\u00fcck")["input_ids"]
    assert len(ids) == 10 and vl.tokenizer.decode(ids) == "Ein St\u00fcck"
    assert vl.tokenizer("<|image_pad|>")["input_ids"] == [vl.model.config.image_token_id]
    assert vl.mask_id == vl.tokenizer.get_vocab()["<mask>"]


def test_weights_can_be_left_to_a_checkpoint(vl_folder, vl, tmp_path):
    for path in vl_folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    torch.manual_seed(1)
    bare = load_vl(tmp_path, random_init=True)
    assert bare.model.training and bare.model.dtype == torch.float32
    mine, theirs = bare.model.state_dict(), vl.model.state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    assert not torch.equal(mine["lm_head.weight"], theirs["lm_head.weight"])
    assert bare.model.lm_head.weight is bare.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["a", "a"], {}, "has 'a' twice"),
        (["<eos>"], {}, "has '<eos>' twice"),
        (["<mask>"], {}, "has '<mask>' twice"),
        (["a"], {"hidden_size": 66}, "hidden_size=66 and num_heads=4"),
        (["a"], {"hidden_size": 16}, "at least 6"),
        (["a"], {"vision_heads": 3}, "vision_heads=3"),
    ],
)
def test_builder_refuses(tmp_path, words, options, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_vl(tmp_path, words, TinyVLOptions(**options), seed=0)
    assert not any(tmp_path.iterdir())


# --- loading --------------------------------------------------------------------------------------


def test_both_architectures_load(either, old_vl):
    names = {"Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"}
    assert type(either.model).__name__ in names
    assert type(old_vl.model).__name__ == "Qwen2VLForConditionalGeneration"
    assert encode_images(either, [noise(64, 64)]).image_grid_thw.tolist() == [[1, 8, 8]]


def test_mask_token_can_be_named(vl_folder):
    vl = load_vl(vl_folder, mask_token="<|video_pad|>", dtype="bfloat16")
    assert vl.mask_id == vl.model.config.video_token_id
    assert vl.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="mask_token='<hole>' is no token"):
        load_vl(vl_folder, mask_token="<hole>")


def test_loading_names_what_is_wrong(vl_folder, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="type is 'qwen3', not one of qwen2_vl, qwen2_5_vl"):
        load_vl(tiny_folder)
    with pytest.raises(ValueError, match=r"backbone.path=.*nowhere.* cannot be loaded"):
        load_vl(tmp_path / "nowhere")
    shutil.copytree(vl_folder, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"bare.* cannot be loaded"):
        load_vl(tmp_path / "bare")
    path = tmp_path / "other" / "preprocessor_config.json"
    shutil.copytree(vl_folder, path.parent)
    changed = json.loads(path.read_text(encoding="utf-8")) | {"patch_size": 14}
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\(4, 2, 2\) in config.json and \(14, 2, 2\)"):
        load_vl(path.parent)


# --- images ---------------------------------------------------------------------------------------


def test_files_arrays_and_pil_images_are_the_same_image(vl, tmp_path):
    array = noise(32, 32)
    Image.fromarray(array).save(tmp_path / "one.png")
    kinds = [array, Image.fromarray(array), tmp_path / "one.png", str(tmp_path / "one.png")]
    encoded = encode_images(vl, kinds)
    patches = encoded.pixel_values.view(4, 64, -1)
    assert all(torch.equal(patches[0], patches[number]) for number in (1, 2, 3))
    assert encoded.num_tokens(vl.merge_size) == [16] * 4


def test_four_patches_in_a_row_are_one_image_token(vl):
    """Masked patches of stage 1 are chosen by token: the rows of one must lie together."""
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[8:16, 24:32] = 255  # token of row 1, column 3 in the grid of 4 x 4
    patches = encode_images(vl, [image]).pixel_values
    bright = (patches > 0).all(dim=1).nonzero().flatten()
    assert bright.tolist() == [28, 29, 30, 31]


def test_grey_transparent_and_turned_images(tmp_path):
    Image.new("RGBA", (9, 8), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [10, 20, 30]
    assert read_image(Image.new("L", (9, 8), 7)).shape == (8, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (9, 8)).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").shape == (9, 8, 3)


def test_bad_images_are_named(vl, tmp_path):
    Image.fromarray(noise(32, 32)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    good = noise(32, 32)
    for name in ("cut.png", "text.jpg", "empty.png", "missing.png"):
        with pytest.raises(ValueError, match=rf"{name} does not decode: .") as caught:
            encode_images(vl, [good, tmp_path / name])
        assert caught.value.__cause__ is not None
    Image.fromarray(noise(32, 7)).save(tmp_path / "thin.png")
    with pytest.raises(ValueError, match=r"thin.png is 7 x 32 pixels; each side needs at least 8"):
        encode_images(vl, [good, tmp_path / "thin.png"])
    with pytest.raises(ValueError, match="image 1 is 1608 x 8 pixels; one side may be at most 200"):
        encode_images(vl, [good, noise(8, 1608)])
    with pytest.raises(ValueError, match=r"image 1 must be \(H, W, 3\) uint8, got \(32, 32\)"):
        encode_images(vl, [good, good[..., 0]])
    with pytest.raises(ValueError, match="got .* float64"):
        encode_images(vl, [good / 255])
    with pytest.raises(ValueError, match="no images"):
        encode_images(vl, [])


def test_pick_takes_whole_images(vl):
    images = [noise(32, 32, 0), noise(16, 24, 1), noise(8, 8, 2)]
    together, picked = encode_images(vl, images), encode_images(vl, [images[2], images[0]])
    for found, expected in zip(together.pick([2, 0]), picked, strict=True):
        assert torch.equal(found, expected)


# --- positions and inputs -------------------------------------------------------------------------


def mixed_batch(vl, side):
    """Rows with two images, none and one, of different sizes."""
    images = [noise(32, 32, 0), noise(16, 24, 1), noise(8, 32, 2)]
    encoded = encode_images(vl, images)
    sizes = encoded.num_tokens(vl.merge_size)
    assert sizes == [16, 6, 4]
    red, at = (vl.tokenizer.get_vocab()[word] for word in ("red", "at"))
    rows = [
        [red, *vl.image_tokens(16), at, *vl.image_tokens(6), red, red],
        [red, at, red],
        [*vl.image_tokens(4), red],
    ]
    length = max(map(len, rows)) + 2
    ids = torch.zeros(3, length, dtype=torch.long)
    for number, row in enumerate(rows):
        first = 0 if side == "right" else length - len(row)
        ids[number, first : first + len(row)] = torch.tensor(row)
    return ids, ids != 0, encoded


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_the_library(either, side):
    ids, valid, encoded = mixed_batch(either, side)
    made = vl_inputs(either, ids, valid, encoded)
    expected, _ = either.model.model.get_rope_index(
        ids,
        mm_token_type_ids=made["mm_token_type_ids"],
        image_grid_thw=encoded.image_grid_thw,
        attention_mask=valid.long(),
    )
    assert torch.equal(made["position_ids"], expected)
    assert made["position_ids"].max() > 9 and made["position_ids"][:, ~valid].eq(0).all()
    text = vl_inputs(either, ids[1:2], valid[1:2], None)
    assert sorted(text) == ["mm_token_type_ids", "position_ids"]
    assert torch.equal(text["position_ids"], made["position_ids"][:, 1:2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_four_dimensional_causal_mask_is_the_models_own(either, side):
    """Ids, positions and pixels of ours give what the model makes of a two-dimensional mask."""
    ids, valid, encoded = mixed_batch(either, side)
    made = vl_inputs(either, ids, valid, encoded)
    with torch.no_grad():
        ours = either.model(input_ids=ids, attention_mask=additive(causal_mask(valid)), **made)
        del made["position_ids"]
        own = either.model(input_ids=ids, attention_mask=valid.long(), **made)
    torch.testing.assert_close(ours.logits[valid], own.logits[valid], atol=1e-5, rtol=0)


def test_inputs_take_plain_images_and_follow_the_dtype(vl_folder):
    vl = load_vl(vl_folder, dtype="bfloat16")
    ids = torch.tensor([vl.image_tokens(16)])
    made = vl_inputs(vl, ids, torch.ones_like(ids), [noise(32, 32)])
    assert made["pixel_values"].dtype == torch.bfloat16
    assert made["position_ids"].shape == (3, 1, 18) and made["mm_token_type_ids"].sum() == 16
    assert vl.model(input_ids=ids, **made).logits.dtype == torch.bfloat16


def test_tokens_and_images_must_agree(vl):
    ids, valid, encoded = mixed_batch(vl, "right")
    with pytest.raises(ValueError, match="the ids have 26 image tokens, the 2 images 20"):
        vl_inputs(vl, ids, valid, encoded.pick([0, 2]))
    with pytest.raises(ValueError, match="the ids have 26 image tokens, the 0 images 0"):
        vl_inputs(vl, ids, valid, None)
    with pytest.raises(ValueError, match="row 0: the tokens of an image must stand in one piece"):
        vl_inputs(vl, ids, valid, encoded.pick([2, 0, 1]))


@pytest.mark.parametrize(
    "types", [[[0, 0, 1], [1, 0, 0]], [[0, 1, 0], [0, 0, 1]], [[0, 0, 0], [1, 0, 1]]]
)
def test_an_image_in_pieces_is_refused(types):
    types = torch.tensor(types)
    with pytest.raises(ValueError, match="row 1: the tokens of an image must stand in one piece"):
        mrope_positions(types, torch.ones_like(types), torch.tensor([[1, 2, 4]]), 2)
