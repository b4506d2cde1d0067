"""What the masks let through, by gradients and by padding, in a tiny Qwen3 and a tiny Qwen2.5-VL.

Card, section 10, items 1 to 3.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from datamodules.tasks.shapes_caption import ShapesCaption
from lightning_modules.backbones.vision_language import load_vl, vl_inputs
from lightning_modules.functional.attention_masks import (
    BLOCK_A,
    BLOCK_B,
    BRIDGE,
    additive,
    bidirectional_mask,
    blocks,
    bridge_mask,
    causal_mask,
    mask_tokens,
)
from lightning_modules.ops import fuse_lm_head

TASK = ShapesCaption(num_test=3)
SCENES = TASK.records("test")


class Text:
    """A Qwen3 of two layers, which reads ids."""

    def __init__(self, folder, attention="sdpa"):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
        self.body = self.layers_of = self.model.model

    def batch(self, rows, side="right"):
        sizes = [(3, 4), (6, 2), (1, 5)]
        length = max(sum(sizes[row]) + 1 for row in rows) + (len(rows) > 1)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        eos_pos = []
        for number, row in enumerate(rows):
            a, b = sizes[row]
            first = 0 if side == "right" else length - a - b - 1
            draw = torch.Generator().manual_seed(row)
            ids[number, first : first + a + b + 1] = torch.randint(
                3, 60, (a + b + 1,), generator=draw
            )
            eos_pos.append(first + a)
        valid = ids != 0
        keywords = {"position_ids": (valid.cumsum(1) - 1).clamp(min=0)}
        return ids, valid, torch.tensor(eos_pos), keywords


class Vision:
    """A Qwen2.5-VL of three layers, which reads images with ids; row 1 is text only."""

    def __init__(self, folder, layout, attention="sdpa"):
        self.vl = load_vl(folder, attn_implementation=attention)
        self.body, self.layout = self.vl.model.model, layout
        self.layers_of = self.body.language_model

    def batch(self, rows, side="right"):
        made = []
        for row in rows:
            image = None if row == 1 else TASK.render(SCENES[row])
            first, second = TASK.text_pair(SCENES[row])
            made.append((image, first[: first.index(" at ")] if row == 2 else first, second))
        ids, valid, eos_pos, images = self.layout(self.vl, made, side, extra=len(rows) > 1)
        return ids, valid, eos_pos, vl_inputs(self.vl, ids, valid, images)


@pytest.fixture(scope="module", params=["qwen3", "qwen2_5_vl"])
def make_reader(request, tiny_folder, vl_folder, layout):
    if request.param == "qwen3":
        return lambda attention="sdpa": Text(tiny_folder, attention)
    return lambda attention="sdpa": Vision(vl_folder, layout, attention)


@pytest.fixture(scope="module")
def reader(make_reader):
    return make_reader()


@contextmanager
def caught_embeddings(body):
    """What the embedding layer gives, as something with a gradient."""
    caught = []

    def keep(module, args, output):
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    handle = body.get_input_embeddings().register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


def cut_rows(layer, eos_pos):
    """Detach the bridge's row of what a layer gives; returns the handle."""

    def cut(module, args, output):
        is_bridge = torch.arange(output.shape[1]) == eos_pos[:, None]
        return torch.where(is_bridge[..., None], output.detach(), output)

    return layer.register_forward_hook(cut)


def influence(reader, make_mask, of, on, *, depth=-1, is_cut=False):
    """Largest gradient of a random sum of block ``of``'s states by what block ``on`` reads.

    Returns:
        That of token embeddings, and that of pixels (0 without images; they are in block A).
    """
    ids, valid, eos_pos, keywords = reader.batch([0, 1, 2])
    block = blocks(valid, eos_pos)
    if pixels := "pixel_values" in keywords:
        keywords["pixel_values"] = keywords["pixel_values"].clone().requires_grad_()
    with ExitStack() as stack:
        caught = stack.enter_context(caught_embeddings(reader.body))
        if is_cut:
            for layer in reader.layers_of.layers:
                stack.callback(cut_rows(layer, eos_pos).remove)
        out = reader.body(
            input_ids=ids,
            attention_mask=additive(make_mask(valid, eos_pos)),
            output_hidden_states=True,
            use_cache=False,
            **keywords,
        )
    hidden = out.hidden_states[depth]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    ((hidden * weights)[block == of]).sum().backward()
    by_pixels = keywords["pixel_values"].grad.abs().max().item() if pixels else 0.0
    return caught[0].grad.abs().amax(-1)[block == on].max().item(), by_pixels


def test_bridge_is_the_only_way_from_a_to_b(reader):
    assert influence(reader, bridge_mask, BLOCK_B, BLOCK_A, is_cut=True) == (0.0, 0.0)
    by_ids, by_pixels = influence(reader, bridge_mask, BLOCK_B, BLOCK_A)
    assert by_ids > 1e-6
    assert by_pixels > 1e-7 or isinstance(reader, Text)
    # one layer is no way: the bridge has to read A before B reads the bridge
    assert influence(reader, bridge_mask, BLOCK_B, BLOCK_A, depth=1) == (0.0, 0.0)


def test_bridge_reads_a_and_b_reads_bridge_in_one_layer(reader):
    by_ids, by_pixels = influence(reader, bridge_mask, BRIDGE, BLOCK_A, depth=1)
    assert by_ids > 1e-6
    assert by_pixels > 1e-7 or isinstance(reader, Text)
    assert influence(reader, bridge_mask, BLOCK_B, BRIDGE, depth=1)[0] > 1e-6


def test_a_learns_of_b_only_through_a_bridge_that_sees_it(reader):
    assert influence(reader, bridge_mask, BLOCK_A, BLOCK_B, depth=1)[0] == 0.0
    assert influence(reader, bridge_mask, BLOCK_A, BLOCK_B)[0] > 1e-7
    assert influence(reader, bridge_mask, BRIDGE, BLOCK_B)[0] > 1e-6

    def blind(valid, eos_pos):
        return bridge_mask(valid, eos_pos, eos_sees_b=False)

    assert influence(reader, blind, BLOCK_A, BLOCK_B)[0] == 0.0
    assert influence(reader, blind, BRIDGE, BLOCK_B)[0] == 0.0
    assert influence(reader, blind, BLOCK_B, BLOCK_A)[0] > 1e-6

    def cut_off(valid, eos_pos):
        return bridge_mask(valid, eos_pos, a_sees_eos=False)

    assert influence(reader, cut_off, BLOCK_A, BLOCK_B)[0] == 0.0
    assert influence(reader, cut_off, BLOCK_A, BRIDGE)[0] == 0.0
    assert influence(reader, cut_off, BLOCK_B, BLOCK_A)[0] > 1e-6


def test_whole_row_reads_what_is_behind_it_and_the_causal_one_does_not(reader):
    def everything(valid, eos_pos):
        return bidirectional_mask(valid)

    def before(valid, eos_pos):
        return causal_mask(valid)

    assert influence(reader, everything, BLOCK_A, BLOCK_B, depth=1)[0] > 1e-6
    assert influence(reader, before, BLOCK_A, BLOCK_B)[0] == 0.0
    assert influence(reader, before, BLOCK_B, BLOCK_A)[0] > 1e-6


def eos_states(reader, rows, side, make_mask):
    ids, valid, eos_pos, keywords = reader.batch(rows, side)
    with torch.no_grad():
        out = reader.body(
            input_ids=ids,
            attention_mask=additive(make_mask(valid, eos_pos)),
            use_cache=False,
            **keywords,
        )
    return out.last_hidden_state[torch.arange(len(rows)), eos_pos]


def whole(valid, eos_pos):
    return bidirectional_mask(valid)


@pytest.mark.parametrize("make_mask", [whole, bridge_mask])
def test_padding_and_order_change_nothing(reader, make_mask):
    alone = torch.cat([eos_states(reader, [row], "right", make_mask) for row in range(3)])
    assert (alone[0] - alone[1]).abs().max() > 1e-2, "rows do not differ, the test says nothing"
    for side in ("left", "right"):
        together = eos_states(reader, [0, 1, 2], side, make_mask)
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    turned = eos_states(reader, [2, 0, 1], "left", make_mask)
    torch.testing.assert_close(turned, alone[[2, 0, 1]], atol=1e-5, rtol=0)


def test_sdpa_equals_eager_also_at_padding(make_reader, reader):
    ids, valid, eos_pos, keywords = reader.batch([0, 1, 2], "left")
    mask = additive(bridge_mask(valid, eos_pos))
    with torch.no_grad():
        one, other = (
            part.body(input_ids=ids, attention_mask=mask, use_cache=False, **keywords)
            for part in (reader, make_reader("eager"))
        )
    assert one.last_hidden_state.isfinite().all()
    torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, atol=1e-5, rtol=0)


def test_bridge_reconstruction_through_the_fused_head(vl_folder, layout):
    """Stage 2 as it will be trained: only the K masked rows meet the head."""
    reader = Vision(vl_folder, layout)
    model = fuse_lm_head(reader.vl.model)
    ids, valid, eos_pos, keywords = reader.batch([0, 1, 2])
    taken = mask_tokens(
        ids,
        blocks(valid, eos_pos) == BLOCK_B,
        valid,
        probability=0.7,
        mask_id=reader.vl.mask_id,
        special_ids=reader.vl.special_ids,
        generator=torch.Generator().manual_seed(0),
    )
    mask = additive(bridge_mask(valid, eos_pos))
    out = model.model(input_ids=taken.input_ids, attention_mask=mask, use_cache=False, **keywords)
    read = out.last_hidden_state[taken.rows, taken.read_positions]
    loss = model.lm_head(read, taken.targets, mode="ce")
    plain = torch.nn.functional.cross_entropy(read @ model.lm_head.weight.T, taken.targets)
    torch.testing.assert_close(loss, plain)
    loss.backward()
    tower = reader.body.visual.patch_embed.proj.weight.grad
    assert tower.isfinite().all() and tower.abs().max() > 0
