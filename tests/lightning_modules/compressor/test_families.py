"""Other families on either side: learned positions, windows of attention, scaled embeddings."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lightning_modules.backbones.causal_lm import CausalLM
from lightning_modules.compressor.decoding import greedy_decode
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions
from lightning_modules.compressor.pair import Pair
from tests.lightning_modules.compressor.small_pair import source, targets

SHAPE = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLD = {
    "vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model(name):
    torch.manual_seed(0)
    makers = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**OLD)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=8)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    }
    return CausalLM(makers[name]())


@pytest.mark.parametrize(
    "compressor,decoder,form",
    [
        ("gpt2", "llama", "embeds"),
        ("llama", "gpt2", "embeds"),
        ("gemma3", "gemma3", "embeds"),
        ("llama", "mistral", "embeds"),
        ("llama", "llama", "kv"),
    ],
)
def test_rows_stand_alone_and_decoding_agrees_with_scores(compressor, decoder, form):
    options = MemoryOptions(tokens=2, form=form, segment_tokens=6)
    pair = Pair(model(compressor), model(decoder), options, ProjectorOptions())
    texts = source([14, 5])
    pair(*texts, *targets([10, 4]))[1].loss.mean().backward()
    assert pair.bridge.tokens.grad.abs().sum() > 0
    pair.eval()
    with torch.no_grad():
        memory = pair.compress(*texts)
        alone = pair.compress(texts[0][1:, :5], texts[1][1:, :5])
        torch.testing.assert_close(memory.hidden[1, :2], alone.hidden[0], atol=1e-5, rtol=1e-5)
        found = greedy_decode(pair, memory, 12, eos_ids=[])
        scores = pair.score(memory, found.token_ids, torch.ones(2, 12))
    torch.testing.assert_close(found.logprobs, scores.logprob, atol=1e-5, rtol=1e-5)
    assert scores.correct.all()


def test_memory_is_as_large_as_what_a_scaling_embedding_gives():
    pair = Pair(model("llama"), model("gemma3"), MemoryOptions(tokens=2), ProjectorOptions())
    table = pair.decoder.base.get_input_embeddings()
    size = table(torch.arange(60)).square().mean(1).sqrt().mean()
    found = pair.compress(*source([6])).stacked().square().mean(1).sqrt()
    torch.testing.assert_close(found, size.expand(2), rtol=1e-3, atol=0)
    assert size > 3 * table.weight.square().mean(1).sqrt().mean()


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_keys_need_full_rotary_attention(name):
    with pytest.raises(ValueError, match="compressor has layers without full rotary attention"):
        Pair(model(name), model(name), MemoryOptions(tokens=2, form="kv"), ProjectorOptions())
