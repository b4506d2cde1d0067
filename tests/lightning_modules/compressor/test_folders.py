"""A pair as one folder, and parts of a bridge that another pair starts from."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.compressor.folders import (
    DecoderOptions,
    build_pair,
    export_pair,
    load_pair,
)
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions
from lightning_modules.compressor.projector import start_bridge
from lightning_modules.options import BackboneOptions, LoraOptions
from tests.lightning_modules.compressor.small_pair import source, targets

LOW = ProjectorOptions(kind="low_rank", rank=4, match_scale=False)


def build(folders, **options):
    given = {"memory": MemoryOptions(tokens=2, segment_tokens=5), "projector": LOW, **options}
    decoder = DecoderOptions(str(folders / "decoder"), **given.pop("decoder", {}))
    return build_pair(BackboneOptions(str(folders / "compressor")), decoder, **given)


def export(pair, folders, target):
    names = [AutoTokenizer.from_pretrained(folders / name) for name in ("compressor", "decoder")]
    export_pair(pair, *names, target, info={"step": 3})


def trained(pair, labels=None):
    """One step, so that adapters and bridge differ from their start."""
    optimizer = torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=0.5)
    _, scores = pair(*source([7, 4]), *(labels or targets([5, 4])))
    scores.loss.mean().backward()
    optimizer.step()
    return pair.eval()


@pytest.mark.parametrize("train", ["frozen", "lora", "full"])
def test_a_folder_gives_equal_memories_and_log_probs(folders, tmp_path, train):
    pair = trained(build(folders, decoder={"train": train}, lora=LoraOptions(r=2)))
    export(pair, folders, tmp_path / "out")
    again = load_pair(tmp_path / "out")
    texts, labels = source([7, 4], seed=1), targets([5, 4], seed=2)
    with torch.no_grad():
        before, scores = pair(*texts, *labels)
        after, found = again(*texts, *labels)
    torch.testing.assert_close(after.embeds, before.embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logprob, scores.logprob, atol=1e-5, rtol=1e-5)
    assert again.options == pair.options and again.projector_options == LOW
    assert not again.training
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"bridge.json", "bridge.safetensors", "decoder", "model.safetensors"} <= set(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert json.loads((tmp_path / "out" / "litpost.json").read_text()) == {"step": 3}


def test_plain_transformers_loads_both_models(folders, tmp_path):
    pair = trained(build(folders, lora=LoraOptions(r=2)))
    export(pair, folders, tmp_path / "out")
    export(pair, folders, tmp_path / "out")  # replaces it
    ids, _ = source([5])
    for part, folder in ((pair.compressor, "out"), (pair.decoder, "out/decoder")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, part(ids).logits, atol=1e-5, rtol=1e-5)
        assert len(AutoTokenizer.from_pretrained(tmp_path / folder)) == part.config.vocab_size


def test_keys_and_values_come_back_too(folders, tmp_path):
    decoder = DecoderOptions(str(folders / "compressor"))
    backbone = BackboneOptions(str(folders / "compressor"))
    options = MemoryOptions(tokens=2, form="kv")
    pair = trained(build_pair(backbone, decoder, options), source([5, 4]))
    tokenizer = AutoTokenizer.from_pretrained(folders / "compressor")
    export_pair(pair, tokenizer, tokenizer, tmp_path / "out")
    texts = source([5, 4])
    with torch.no_grad():
        before, after = pair.compress(*texts), load_pair(tmp_path / "out").compress(*texts)
    for first, second in zip(before.keys_values, after.keys_values, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_a_bridge_starts_from_parts_of_another(folders, tmp_path):
    first = trained(build(folders, decoder={"train": "full"}))
    export(first, folders, tmp_path / "out")
    second = build_pair(
        BackboneOptions(str(folders / "compressor")),
        DecoderOptions(str(tmp_path / "out")),  # the pair's decoder
        MemoryOptions(tokens=2, seed=5),
        LOW,
    )
    start_bridge(second.bridge, tmp_path / "out", ["projector.up", "prompts"], freeze=True)
    own, other = dict(second.bridge.named_parameters()), dict(first.bridge.named_parameters())
    frozen = {name for name, parameter in own.items() if not parameter.requires_grad}
    assert frozen == {"projector.up.weight", "projector.up.bias", "prompts"}
    assert all(torch.equal(own[name], other[name]) for name in frozen)
    assert not torch.equal(own["projector.down.weight"], other["projector.down.weight"])
    ids, _ = targets([5])
    with torch.no_grad():
        torch.testing.assert_close(second.decoder(ids).logits, first.decoder(ids).logits)


def test_parts_that_do_not_fit_are_refused(folders, tmp_path):
    export(build(folders).eval(), folders, tmp_path / "out")
    other = build(folders, projector=ProjectorOptions(kind="low_rank", rank=6, match_scale=False))
    with pytest.raises(ValueError, match=r"projector.up.weight is \(48, 6\) here and \(48, 4\)"):
        start_bridge(other.bridge, tmp_path / "out", ["projector.up"], freeze=True)
    with pytest.raises(
        ValueError, match="parts: 'up' is no part of tokens, prompts, projector.down"
    ):
        start_bridge(other.bridge, tmp_path / "out", ["up"], freeze=True)
    with pytest.raises(ValueError, match="has no bridge.safetensors"):
        start_bridge(other.bridge, folders / "decoder", ["prompts"], freeze=True)


def test_a_folder_that_is_no_pair_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="holds no exported pair: it has no bridge.json"):
        load_pair(folders / "decoder")
    export(build(folders).eval(), folders, tmp_path / "out")
    path = tmp_path / "out" / "bridge.json"
    found = json.loads(path.read_text())
    found["memory"]["tokens"] = 7
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="bridge.safetensors does not fit .*size mismatch for tok"):
        load_pair(tmp_path / "out")
    found["memory"] = {"token": 7}
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="did you mean 'memory.tokens'"):
        load_pair(tmp_path / "out")
