"""Memory: rows do not see their batch mates, segments not each other; gradients reach M."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.compressor.memory import controlled, head_is_tied
from lightning_modules.options import LoraOptions
from tests.lightning_modules.compressor.small_pair import NARROW, make_pair, source

FORMS = [("embeds", "decoder"), ("kv", "compressor")]


def vectors(memory):
    """What the decoder reads, ``(B, M, ...)``."""
    if memory.keys_values is None:
        return [memory.embeds]
    return [value.transpose(1, 2) for pair in memory.keys_values for value in pair]


@pytest.mark.parametrize("form,decoder", FORMS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("most", [None, 4])
def test_memory_does_not_depend_on_batch_mates(folders, form, decoder, left, most):
    pair = make_pair(folders, form=form, decoder=decoder, segment_tokens=most).eval()
    ids, mask = source([9, 3, 6], left=left)
    with torch.no_grad():
        together = vectors(pair.compress(ids, mask))
        for row, length in enumerate([9, 3, 6]):
            alone = vectors(pair.compress(ids[row][mask[row]][None], torch.ones(1, length)))
            for all_rows, one in zip(together, alone, strict=True):
                width = one.shape[1]
                torch.testing.assert_close(all_rows[row, :width], one[0], atol=1e-5, rtol=1e-5)
                assert not all_rows[row, width:].any()
        swapped = vectors(pair.compress(ids[[2, 0, 1]], mask[[2, 0, 1]]))
    for before, after in zip(together, swapped, strict=True):
        torch.testing.assert_close(before[[2, 0, 1]], after, atol=1e-5, rtol=1e-5)


def test_memory_is_what_the_model_says_of_text_then_tokens(folders):
    pair = make_pair(folders, projector={"match_scale": False}).eval()
    ids, mask = source([5])
    model = pair.compressor.base
    embeds = torch.cat([model.get_input_embeddings()(ids), pair.bridge.tokens[None]], 1)
    hidden = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][:, 5:]
    memory = pair.compress(ids, mask)
    torch.testing.assert_close(memory.hidden, hidden, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        memory.embeds, pair.bridge.projector.up(hidden), atol=1e-6, rtol=1e-5
    )
    assert memory.stacked("hidden").shape == (2, 32)


def test_gradient_reaches_tokens_projector_and_adapters(folders):
    pair = make_pair(folders, lora=LoraOptions(r=2))
    memory = pair.compress(*source([5, 3]))
    memory.embeds.square().sum().backward()
    assert pair.bridge.tokens.grad.abs().min() > 0
    assert pair.bridge.projector.up.weight.grad.abs().sum() > 0
    adapters = [p for n, p in pair.compressor.named_parameters() if "lora_B" in n]
    assert adapters and all(p.grad.abs().sum() > 0 for p in adapters)
    assert all(p.grad is None for n, p in pair.compressor.named_parameters() if "lora" not in n)


@pytest.mark.parametrize("form,decoder", FORMS)
def test_segments_do_not_leak(folders, form, decoder):
    pair = make_pair(folders, form=form, decoder=decoder, segment_tokens=4)
    seen = []
    table = pair.compressor.base.get_input_embeddings()

    def keep(module, args, output):
        output.retain_grad()
        seen.append(output)

    table.register_forward_hook(keep)
    memory = pair.compress(*source([8]))
    second = sum(value[:, 2:].square().sum() for value in vectors(memory))
    second.backward()
    gradient = seen[0].grad  # (2 segments, 4 tokens, width)
    assert not gradient[0].any()
    assert gradient[1].abs().sum(-1).min() > 0


def test_one_segment_is_a_single_pass(folders):
    texts = source([8, 5])
    whole = make_pair(folders).eval().compress(*texts)
    one = make_pair(folders, segment_tokens=8).eval().compress(*texts)
    two = make_pair(folders, segment_tokens=7).eval().compress(*texts)
    assert torch.equal(whole.embeds, one.embeds)
    assert two.embeds.shape[1] == 4
    assert two.mask.tolist() == [[True] * 4, [True, True, False, False]]
    halves = make_pair(folders).eval().compress(texts[0][:1].view(2, 4), torch.ones(2, 4))
    torch.testing.assert_close(two.embeds[0], halves.embeds.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_texts_shorter_than_their_memory_are_refused_or_counted(folders):
    texts = source([8, 2])
    with pytest.raises(ValueError, match=r"text 1 .* segment of 2 tokens.*model.memory.tokens=3"):
        make_pair(folders, tokens=3).compress(*texts)
    memory = make_pair(folders, tokens=3, on_short="count").compress(*texts)
    assert memory.num_short == 1


def test_a_text_longer_than_the_positions_is_refused(folders):
    ids = torch.full((1, NARROW.max_positions), 5)
    with pytest.raises(ValueError, match="positions for 2048: cut texts with model.memory.segment"):
        make_pair(folders).compress(ids, torch.ones_like(ids))


@pytest.mark.parametrize("form,decoder", FORMS)
def test_null_models_read_another_memory(folders, form, decoder):
    pair = make_pair(folders, form=form, decoder=decoder, segment_tokens=4).eval()
    memory = pair.compress(*source([8, 3, 4]))
    shuffled, zero = controlled(memory, "shuffled"), controlled(memory, "zero")
    for own, other, none in zip(vectors(memory), vectors(shuffled), vectors(zero), strict=True):
        assert torch.equal(other, own[[1, 2, 0]])
        assert none.shape == own.shape and not none.any()
    assert shuffled.mask.tolist() == memory.mask[[1, 2, 0]].tolist()
    assert zero.mask.tolist() == memory.mask.tolist()
    assert controlled(memory, "none") is memory
    with pytest.raises(ValueError, match="at least two texts"):
        controlled(memory.select(torch.tensor([0])), "shuffled")
    with pytest.raises(
        ValueError, match="memory_control='mixed': give one of none, shuffled, zero"
    ):
        controlled(memory, "mixed")


def test_tied_heads_are_seen(folders):
    config = make_pair(folders).compressor.config
    assert not head_is_tied(config)
    config.tie_word_embeddings = True
    assert head_is_tied(config)
