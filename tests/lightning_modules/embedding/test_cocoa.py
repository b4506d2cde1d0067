"""CoCoA's losses on its own path through a real tiny Qwen2.5-VL (card, section 10)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.images import EncodedImages, join_images
from datamodules.tasks.embedding import ImageText
from lightning_modules.backbones.vision_language import VisionLanguage, vl_inputs
from lightning_modules.embedding.cocoa import CoCoA
from lightning_modules.functional.attention_masks import (
    additive,
    bidirectional_mask,
    bridge_mask,
)
from tests.lightning_modules.embedding.small_cocoa import batch, caught, cocoa, scenes


@pytest.fixture(scope="module")
def data(vl_folder: Path) -> Any:
    """Twelve scenes; tests leave them as they are."""
    return scenes(vl_folder)


@pytest.fixture
def module(vl_folder: Path, data: Any) -> CoCoA:
    """With fresh weights."""
    return cocoa(vl_folder, data)


def loss_of(module: CoCoA, stage: str, given: Any) -> Tensor:
    return module.warmup_loss(given) if stage == "warmup" else module.bridge_loss(given)


def gradients(module: CoCoA) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=2e-6, rtol=1e-4, msg=name)


# --- masked next-token prediction -----------------------------------------------------------------


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_tokens_are_read_one_place_to_the_left(stage: str, module: CoCoA, data: Any) -> None:
    given = batch(data, stage)
    ids = module.padded(given.items).input_ids
    head = module.policy.base.get_output_embeddings()
    width, words = module.policy.width, head.weight.shape[0]
    head.weight.data = torch.eye(words, width)

    def knowing(shift: int) -> float:
        """Loss of a body that knows at each place which token is ``shift`` further on."""
        known = F.one_hot(ids.roll(-shift, dims=1), width).float()

        def tell(layer: Any, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = 50.0 * known
            return output

        handle = module.policy.base.model.register_forward_hook(tell)
        module.reduce_window()
        try:
            loss_of(module, stage, given)
        finally:
            handle.remove()
        return module.reduce_window()[f"train/{stage}/loss"]

    assert knowing(1) == pytest.approx(0.0, abs=1e-6)
    assert knowing(0) > 10.0 and knowing(2) > 10.0


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(
    stage: str, vl_folder: Path, module: CoCoA, data: Any
) -> None:
    given = batch(data, stage)
    loss = loss_of(module, stage, given)
    loss.backward()
    plain = cocoa(vl_folder, data)
    plain.policy.image_decoder.load_state_dict(module.policy.image_decoder.state_dict())
    chunk, base = plain.padded(given.items), plain.policy.base
    images: Any = join_images(chunk.images)
    is_warmup = stage == "warmup"
    share = plain.text_mask if is_warmup else plain.bridge_mask
    masked = plain.mask(chunk, given.spans, share, given.seeds)
    where: Any = None
    if is_warmup:
        images, where, pixels = plain.mask_images(chunk, images, given.seeds)
        attention = additive(bidirectional_mask(chunk.mask))
    else:
        attention = additive(bridge_mask(chunk.mask, torch.tensor(given.bridges)))
    known = VisionLanguage(base, None, None, None)
    keywords = vl_inputs(known, masked.input_ids, chunk.mask, images)
    hidden = base.model(
        input_ids=masked.input_ids, attention_mask=attention, use_cache=False, **keywords
    ).last_hidden_state
    logits = hidden @ base.get_output_embeddings().weight.T
    expected = F.cross_entropy(logits[masked.rows, masked.positions - 1], masked.targets)
    if is_warmup:
        rotary = base.model.language_model.rotary_emb(hidden, keywords["position_ids"])
        made = plain.policy.image_decoder(hidden, attention, rotary)[where]
        expected = expected + plain.image_weight * F.mse_loss(made, pixels)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    ours = gradients(module)
    if not is_warmup:  # parts that a stage does not use have zeros
        unused = {name for name in ours if ".image_decoder." in name}
        assert all(not ours.pop(name).any() for name in unused) and unused
    assert_close(ours, gradients(plain))


def test_a_row_is_masked_alike_in_any_batch(module: CoCoA, data: Any) -> None:
    given = batch(data, "warmup")
    chunk = module.padded(given.items)
    masked = module.mask(chunk, given.spans, 0.5, given.seeds)
    images = join_images(chunk.images)
    assert images is not None
    noisy = module.mask_images(chunk, images, given.seeds)[0].pixel_values
    for row, item in enumerate(given.items):
        alone = module.padded([item])
        own = module.mask(alone, given.spans[row : row + 1], 0.5, given.seeds[row : row + 1])
        assert own.positions.tolist() == masked.positions[masked.rows == row].tolist()
        pixels = module.mask_images(alone, item.image, given.seeds[row : row + 1])[0].pixel_values
        assert torch.equal(pixels, noisy[64 * row : 64 * (row + 1)])
    other = module.mask(chunk, given.spans, 0.5, [seed + 1 for seed in given.seeds])
    assert other.positions.tolist() != masked.positions.tolist()


# --- information flow -----------------------------------------------------------------------------


def reached(module: CoCoA, given: Any, *, cut: bool = False) -> tuple[float, float]:
    """Largest gradient of B's log-probs by what block A reads: token embeddings and pixels."""
    items = [
        item
        if item.image is None
        else replace(
            item,
            image=EncodedImages(
                item.image.pixel_values.clone().requires_grad_(), item.image.image_grid_thw
            ),
        )
        for item in given.items
    ]
    bridges = torch.tensor(given.bridges)
    with caught(module, cut_at=bridges if cut else None) as found:
        module.bridged(items, given.spans, given.bridges, given.seeds).sum().backward()
    grad = found["embeddings"].grad.abs().amax(-1)
    in_a = torch.arange(grad.shape[1]) < bridges[:, None]
    pixels = [float(i.image.pixel_values.grad.abs().max()) for i in items if i.image is not None]
    return float(grad[in_a].max()), max(pixels)


def test_b_learns_of_a_through_eos_alone(module: CoCoA, data: Any) -> None:
    given = batch(data, "bridge")
    assert {item.image is None for item in given.items} == {True, False}, "images and texts"
    assert reached(module, given, cut=True) == (0.0, 0.0)
    by_ids, by_pixels = reached(module, given)
    assert by_ids > 1e-6 and by_pixels > 1e-8


@pytest.mark.parametrize("eos_sees_b", [True, False])
def test_a_learns_of_b_only_where_eos_sees_it(eos_sees_b: bool, vl_folder: Path, data: Any) -> None:
    module = cocoa(vl_folder, data, eos_sees_b=eos_sees_b)
    given = batch(data, "bridge")
    places = torch.arange(max(len(item.ids) for item in given.items))
    bridges = torch.tensor(given.bridges)[:, None]
    with caught(module) as found:
        module.bridged(given.items, given.spans, given.bridges, given.seeds)
    noise = torch.randn(found["hidden"].shape)
    (found["hidden"] * noise)[places < bridges].sum().backward()
    by_b = float(found["embeddings"].grad[places > bridges].abs().max())
    assert by_b > 1e-7 if eos_sees_b else by_b == 0.0


@pytest.mark.parametrize("read", ["bidirectional", "causal"])
def test_vectors_read_both_ways_or_one(read: Any, vl_folder: Path, data: Any) -> None:
    module = cocoa(vl_folder, data, read=read)
    items = data.encoding.encode(["a red ring at tl"], "query")
    with caught(module) as found:
        vectors = module.encode(module.padded(items))
    assert torch.equal(vectors[0], found["hidden"][0, -1]), "the state of EOS, which is last"
    first = torch.autograd.grad(found["hidden"][0, 0].sum(), found["embeddings"])[0]
    assert (float(first[0, -1].abs().max()) > 1e-6) == (read == "bidirectional")


def test_padding_and_order_change_no_vector(module: CoCoA, data: Any) -> None:
    scene, other = data.task.records("train")[:2]
    items = [
        "a red ring", data.task.item(scene), " ".join(["a blue bar at br"] * 6),
        data.task.item(other, "a bar"),
    ]  # fmt: skip
    alone = torch.cat([module.embed([item], batch_size=1) for item in items])
    gaps = torch.cdist(alone, alone)[~torch.eye(4, dtype=torch.bool)]
    assert float(gaps.min()) > 1e-2, "items do not differ, the test says nothing"
    torch.testing.assert_close(module.embed(items, batch_size=4), alone, atol=1e-5, rtol=0)
    turned = [3, 1, 0, 2]
    mixed = module.embed([items[place] for place in turned], batch_size=3)
    torch.testing.assert_close(mixed, alone[turned], atol=1e-5, rtol=0)


# --- masked patches -------------------------------------------------------------------------------


def test_a_masked_token_is_all_of_its_patches(module: CoCoA, data: Any) -> None:
    given = batch(data, "warmup")
    chunk = module.padded(given.items)
    images = join_images(chunk.images)
    assert images is not None
    noisy, (rows, places), true = module.mask_images(chunk, images, given.seeds)
    changed = (noisy.pixel_values != images.pixel_values).any(dim=1)
    assert int(changed.sum()) == 4 * len(rows) == 4 * len(true)
    per_token = changed.view(-1, 4)
    assert torch.equal(per_token.all(1), per_token.any(1))
    tokens = (chunk.input_ids == module.policy.config.image_token_id).nonzero()
    chosen = per_token.all(1)
    assert torch.equal(tokens[chosen], torch.stack([rows, places], 1))
    assert torch.equal(true, images.pixel_values.view(len(tokens), -1)[chosen])
    assert 0.25 < float(chosen.float().mean()) < 0.75
    drawn = noisy.pixel_values[changed]
    assert abs(float(drawn.mean())) < 0.1 and abs(float(drawn.std()) - 1) < 0.1
    module.image_mask = 1e-6
    kept = module.mask_images(chunk, images, given.seeds)[1][0]
    assert kept.tolist() == [0, 1, 2, 3], "at least one token an image"


def test_pixel_loss_is_of_masked_patches_and_zero_for_the_truth(module: CoCoA, data: Any) -> None:
    given = batch(data, "warmup")
    chunk = module.padded(given.items)
    images = join_images(chunk.images)
    assert images is not None
    _, (rows, places), _ = module.mask_images(chunk, images, given.seeds)
    is_image = chunk.input_ids == module.policy.config.image_token_id
    truth = torch.zeros(*is_image.shape, 4 * images.pixel_values.shape[1])
    truth[is_image] = images.pixel_values.view(int(is_image.sum()), -1)

    def loss(pixels: Tensor) -> float:
        handle = module.policy.image_decoder.register_forward_hook(lambda *_: pixels)
        module.reduce_window()
        try:
            module.warmup_loss(given)
        finally:
            handle.remove()
        return module.reduce_window()["train/warmup/pixel_loss"]

    assert loss(truth) == 0.0
    elsewhere = truth + 7.0
    elsewhere[rows, places] -= 7.0
    assert loss(elsewhere) == pytest.approx(0.0, abs=1e-10)
    assert loss(truth + 1.0) == pytest.approx(1.0)


def test_without_weight_or_share_there_is_no_image_decoder(vl_folder: Path, data: Any) -> None:
    given = batch(data, "warmup")
    found = []
    for options in ({"image_weight": 0.0}, {"image_mask": 0.0}):
        module = cocoa(vl_folder, data, **options)
        assert module.policy.image_decoder is None
        found.append(module.warmup_loss(given).item())
        assert "train/warmup/pixel_loss" not in module.reduce_window()
    assert found[0] == found[1] and found[0] > 0


# --- batches without images, options --------------------------------------------------------------


def test_batches_without_images(module: CoCoA, data: Any) -> None:
    rows = [("a red ring at tl", "a ring at tl", "1"), ("a blue bar", "a bar", "2")]
    items, spans, bridges = data.encoding.bridge(rows)
    given = replace(batch(data, "bridge"), items=items, spans=spans, bridges=bridges, seeds=[1, 2])
    loss = module.bridge_loss(given)
    loss.backward()
    grads = gradients(module)
    assert loss.isfinite() and len(grads) == len(list(module.parameters()))
    visual = [grad for name, grad in grads.items() if ".visual." in name]
    assert visual and not any(grad.any() for grad in visual)
    assert float(torch.stack([g.norm() for n, g in grads.items() if "layers" in n]).max()) > 0
    module.zero_grad()
    texts = module.encode(module.padded(data.encoding.encode(["a ring", "a bar"], "query")))
    texts.square().sum().backward()
    assert len(gradients(module)) == len(grads)


def test_masked_tokens_are_never_special(module: CoCoA, data: Any) -> None:
    item = ImageText("p", data.task.render(data.task.records("train")[0]), "a <eos> red <unk> ring")
    items, spans = data.encoding.warmup([item])
    masked = module.mask(module.padded(items), spans, 1.0, [0])
    known = data.encoding.tokenizer.get_vocab()
    assert masked.targets.tolist() == [known[word] for word in ("a", "red", "ring")]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"text_mask": 0.0, "bridge_mask": 1.5, "image_mask": -1.0, "image_weight": -1.0},
         ["model.text_mask=0.0", "model.bridge_mask=1.5", "model.image_mask=-1.0",
          "model.image_weight=-1.0"]),
        ({"read": "both"}, ["model.read='both'"]),
        ({"attention": "bidirectional"}, ["model.attention='bidirectional': use model.read"]),
        ({"mask_token": "<hole>"}, ["mask_token='<hole>' is no token"]),
        ({"matryoshka_dims": [8, 65]}, ["model.matryoshka_dims=[8, 65]", "64 dimensions"]),
        ({"temperature": 0.0}, ["model.temperature=0.0"]),
    ],
)  # fmt: skip
def test_bad_options_are_refused(
    vl_folder: Path, options: dict[str, Any], wanted: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        cocoa(vl_folder, **options)
    assert all(text in str(error.value) for text in wanted), error.value


def test_a_tokenizer_without_a_mask_token_needs_one_named(vl_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vl_folder, tmp_path / "vl")
    path = tmp_path / "vl" / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    del about["mask_token"]
    path.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ValueError, match="has no mask token: name .*model.mask_token='<|box_end|>"):
        cocoa(tmp_path / "vl")
    module = cocoa(tmp_path / "vl", mask_token="<|video_pad|>")
    assert module.policy.mask_id == module.policy.config.video_token_id
