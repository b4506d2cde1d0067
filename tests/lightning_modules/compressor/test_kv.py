"""Keys and values as memory: positions, lengths, and two models of one architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lightning_modules.compressor.pair import check_same_architecture
from tests.lightning_modules.compressor.small_pair import EOS, make_pair, source


def kv_pair(folders, **options):
    return make_pair(folders, form="kv", decoder="compressor", **options).eval()


def test_an_untrained_memory_is_the_prefix_itself(folders):
    """With text tokens as memory tokens, source and memory at their own places, nothing is new:
    the decoder reads BOS and text behind M as the plain model does, but for the source before."""
    pair = kv_pair(folders, tokens=3)
    ids, mask = source([4, 4])
    memory = pair.compress(ids, mask)
    model = pair.decoder.base
    table = model.get_input_embeddings()
    tokens = pair.bridge.tokens[None].expand(2, -1, -1)
    start = torch.full((2, 1), EOS)
    whole = torch.cat([table(ids), tokens, table(start), table(ids)], 1)
    length = whole.shape[1]
    # nothing behind the memory may look at the source
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[7:, :4] = False
    bias = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = model(inputs_embeds=whole, attention_mask=bias).logits[:, 7:-1].log_softmax(-1)
    expected = expected.gather(2, ids[:, :, None])[:, :, 0]
    found = pair.score(memory, ids, mask).logprob
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_text_begins_right_behind_the_memory(folders):
    """Keys lie at positions 0 to m - 1 whatever the length of the source."""
    pair = kv_pair(folders)
    ids, mask = source([9, 4])
    memory = pair.compress(ids, mask)
    model = pair.compressor.base
    table = model.get_input_embeddings()
    for row, length in enumerate([9, 4]):
        embeds = torch.cat([table(ids[row, :length]), pair.bridge.tokens])[None]
        positions = torch.arange(-length, 2)[None]
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True)
        for (keys, values), layer in zip(memory.keys_values, cache.layers, strict=True):
            torch.testing.assert_close(keys[row], layer.keys[0, :, -2:], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[row], layer.values[0, :, -2:], atol=1e-5, rtol=1e-5)
    _, context = pair.begin(memory, "ae", None)
    assert context.positions.tolist() == [3, 3]  # two of memory, BOS, then the text


def test_both_forms_read_contexts_of_one_length(folders):
    texts = source([9, 4])
    for pair in (kv_pair(folders, segment_tokens=4), make_pair(folders, segment_tokens=4).eval()):
        _, context = pair.begin(pair.compress(*texts), "ae", None)
        assert context.positions.tolist() == [7, 3]


def test_positions_of_the_source_may_be_kept(folders):
    texts = source([9, 4])
    moved, kept = kv_pair(folders), kv_pair(folders, kv_positions="source")
    first, second = moved.compress(*texts), kept.compress(*texts)
    torch.testing.assert_close(first.hidden, second.hidden, atol=1e-5, rtol=1e-5)
    for (keys, values), (own_keys, own_values) in zip(
        first.keys_values, second.keys_values, strict=True
    ):
        torch.testing.assert_close(values, own_values, atol=1e-5, rtol=1e-5)
        assert (keys - own_keys).abs().max() > 1e-2


def test_rows_with_fewer_segments_read_the_same(folders):
    pair = kv_pair(folders, segment_tokens=4)
    ids, mask = source([9, 4])
    together = pair.score(pair.compress(ids, mask), ids, mask).logprob
    alone = ids[1:, :4]
    ones = torch.ones_like(alone)
    own = pair.score(pair.compress(alone, ones), alone, ones).logprob
    torch.testing.assert_close(together[1, :4], own[0], atol=1e-5, rtol=1e-5)


def test_the_memory_can_be_read_twice(folders):
    pair = kv_pair(folders)
    ids, mask = source([5, 4])
    memory = pair.compress(ids, mask)
    first = pair.score(memory, ids, mask).logprob
    assert torch.equal(first, pair.score(memory, ids, mask).logprob)
    assert memory.keys_values[0][0].shape == (2, 2, 2, 16)


def test_every_parameter_has_a_gradient(folders):
    pair = kv_pair(folders).train()
    ids, mask = source([5, 4])
    pair(ids, mask, ids, mask)[1].loss.sum().backward()
    assert not [n for n, p in pair.named_parameters() if p.requires_grad and p.grad is None]
    assert pair.bridge.tokens.grad.abs().sum() > 0
    assert pair.bridge.prompts is None and pair.bridge.projector is None


def test_different_architectures_are_refused(folders):
    with pytest.raises(ValueError, match="one architecture: num_key_value_heads is 2 in the comp"):
        make_pair(folders, form="kv")


def test_recomputed_activations_are_refused(folders):
    pair = make_pair(folders)
    pair.compressor.base.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="compressor recomputes activations"):
        check_same_architecture(pair.compressor, pair.compressor)
