"""The tiny pair: one decoder for all widths that reads any fact, compressors with a prior."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.contexts import ContextDataModule
from datamodules.engines.base import sample_seed
from datamodules.tasks.arithmetic import Arithmetic
from datamodules.tasks.twin_nouns import TwinNouns
from lightning_modules.backbones.families import family_of
from lightning_modules.backbones.tiny_pair import (
    FittingTexts,
    PairWarmStart,
    TinyPairOptions,
    fit_material,
    prepare_tiny_decoder,
    prepare_tiny_pair,
    read_share,
)
from lightning_modules.compressor.base import CompressorModule
from lightning_modules.compressor.folders import load_pair
from lightning_modules.compressor.memory import controlled
from lightning_modules.options import read_options

ROOT = Path(__file__).resolve().parents[3]
OPTIMIZER = {"weight_decay": 0.01, "betas": (0.9, 0.98), "warmup_steps": 10, "schedule": "linear"}
FIT = {"steps": 80, "decoder_steps": 100, "optimizer": OPTIMIZER}


def small_world(cls=TwinNouns, **options):
    return cls(num_first=3, num_second=3, num_colours=4, num_held_out=2, num_val=64, **options)


def prepare(task, cache_dir, *, warm_start=None, of=prepare_tiny_pair, seed=0, **tiny):
    return of(
        task, tiny=tiny, warm_start=warm_start, task_settings={}, seed=seed, cache_dir=cache_dir
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def narrow(cache):
    """A pair whose compressor is 16 wide and both of whose stages were run."""
    return prepare(small_world(), cache, warm_start=FIT, hidden_size=16)


def bridge_options(shape=None):
    shape = shape or TinyPairOptions()
    return {"memory": asdict(shape.memory), "projector": asdict(shape.projector)}


# ---------------------------------------------------------------------- options


def test_everything_follows_from_the_width():
    shapes = {width: TinyPairOptions(hidden_size=width).compressor for width in (8, 16, 40, 128)}
    assert [one.num_heads for one in shapes.values()] == [1, 1, 2, 8]
    assert [one.num_kv_heads for one in shapes.values()] == [1, 1, 2, 8]
    assert [one.head_dim for one in shapes.values()] == [8, 16, 20, 16]
    assert [one.intermediate_size for one in shapes.values()] == [32, 64, 160, 512]
    given = TinyPairOptions(num_heads=8, num_kv_heads=2, head_dim=4, intermediate_size=7).compressor
    assert (given.num_heads, given.num_kv_heads, given.head_dim) == (8, 2, 4)
    assert given.intermediate_size == 7
    assert TinyPairOptions(hidden_size=16, decoder_layers=3).decoder.num_layers == 3
    assert TinyPairOptions(hidden_size=16).decoder.hidden_size == 64


def test_wrong_options_are_named_all_at_once():
    with pytest.raises(ValueError) as error:
        TinyPairOptions(hidden_size=0, rank=0, noise=-1.0, memory_form="text")
    for part in ("hidden_size=0 ", "rank=0 ", "noise=-1.0 ", "memory_form='text' "):
        assert f"backbone.tiny.{part}" in str(error.value)
    with pytest.raises(ValueError, match=r"tiny.hidden_size=9 gives heads of 9 .*must be even"):
        TinyPairOptions(hidden_size=9)
    with pytest.raises(ValueError, match=r"tiny.num_heads=3 must be a multiple of .*heads=2"):
        TinyPairOptions(num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError) as error:
        PairWarmStart(steps=-1, batch_size=1, decoder_texts="mine")
    with pytest.raises(ValueError, match=r"backbone.warm_start.qa_ratio=2 must be in \[0, 1\]"):
        PairWarmStart(qa_ratio=2)
    for part in ("steps=-1 ", "batch_size=1 ", "decoder_texts='mine' "):
        assert f"backbone.warm_start.{part}" in str(error.value)


def test_the_learning_rate_goes_by_the_width_unless_given():
    by_width = PairWarmStart(optimizer={"lr": None, "weight_decay": 0.5})
    assert [by_width.optimizer_of(w, is_decoder=False).lr for w in (16, 32, 64)] == [
        4e-3, 3e-3, 2e-3
    ]  # fmt: skip
    given = PairWarmStart(decoder_lr=1e-3, optimizer={"lr": 5e-3})
    assert given.optimizer_of(16, is_decoder=False).lr == 5e-3
    assert given.optimizer_of(64, is_decoder=True).lr == 1e-3
    assert by_width.optimizer_of(64, is_decoder=True).weight_decay == 0.5


def test_the_config_takes_the_bridge_of_the_run():
    config = OmegaConf.create({"backbone": OmegaConf.load(ROOT / "conf/backbone/tiny_pair.yaml")})
    family = family_of({"family": config.backbone.family})
    assert read_options(family.shape, dict(config.backbone.tiny), "x").rank is None
    config.model = {
        "memory": {"tokens": 3, "form": "embeds"},
        "projector": {"rank": 8, "noise": 0.2, "match_scale": False, "normalise_bottleneck": True},
    }
    found = OmegaConf.to_container(config, resolve=True)["backbone"]
    shape = read_options(family.shape, found["tiny"], "backbone.tiny")
    assert shape.memory.tokens == 3 and shape.projector.rank == 8
    assert shape.projector.noise == 0.2 and not shape.projector.match_scale
    assert shape.shared_parts == ("prompts", "projector.up")
    fit = read_options(family.warm_start, found["warm_start"], "backbone.warm_start")
    assert fit.qa_ratio == 0
    config.model.qa_ratio = 0.3
    assert config.backbone.warm_start.qa_ratio == 0.3
    options = fit.optimizer_of(16, is_decoder=False)
    assert (options.lr, list(options.betas), options.final_fraction) == (4e-3, [0.9, 0.98], 0.05)


def test_another_kind_of_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"family='pair' needs .* data.task is Arithmetic"):
        prepare(Arithmetic(), tmp_path)


# ---------------------------------------------------------------------- stage 0


def test_the_decoder_reads_any_fact_and_expects_none(cache, narrow):
    task = small_world()
    folder = prepare(task, cache, warm_start=FIT, of=prepare_tiny_decoder)
    assert json.loads((folder / "litpost.json").read_text())["exact_match"] > 0.9
    pair, data = load_pair(folder), ContextDataModule(task=task)
    data.bind(AutoTokenizer.from_pretrained(folder))
    for one in task.evaluations("val"):  # pc, cf, neu
        assert read_share(pair, data.evaluation_batch(one.contexts)) > 0.9
    texts = [FittingTexts(task, "neutral", 0, 0).text(10_000 + i) for i in range(256)]
    batch, seeds = data.evaluation_batch(texts), [sample_seed("test", one.uid, 0) for one in texts]
    where = torch.zeros_like(batch.target_mask)
    where[:, [2, 5]] = True  # colours
    with torch.no_grad():
        memory = controlled(pair.compress(batch.source_ids, batch.source_mask, seeds), "shuffled")
        logits = pair.logits(memory, batch.target_ids, batch.target_mask, where)
    said = data.encoding.target_tokenizer.convert_ids_to_tokens(logits.argmax(-1))
    words = [one.text.split() for one in texts]
    usual = [task.typical.get((w[i], w[i + 1])) for w in words for i in (0, 3)]
    share = [word == colour for word, colour in zip(said, usual, strict=True) if colour]
    assert 0.15 < sum(share) / len(share) < 0.35  # a quarter is chance


def test_a_decoder_that_was_fitted_too_shortly_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"reads only \d+% .*warm_start.decoder_steps=2: .*rank"):
        prepare(small_world(), tmp_path, warm_start={**FIT, "steps": 0, "decoder_steps": 2})


def test_texts_are_those_of_the_regime():
    task = small_world()
    neutral, prior = (FittingTexts(task, kind, 200, 5) for kind in ("neutral", "prior"))

    def usual(texts):
        words = [one.text.split() for one in texts.contexts("train")]
        facts = [(tuple(w[i : i + 2]), w[i + 2]) for w in words for i in (0, 3)]
        known = [colour == task.typical[noun] for noun, colour in facts if noun in task.typical]
        return sum(known) / len(known), len({noun for noun, _ in facts})

    assert usual(prior) == (1.0, 7)
    share, nouns = usual(neutral)
    assert share < 0.4 and nouns == 9
    assert neutral.text(7).text == task.neutral_texts(5, 7, 1)[0]
    assert neutral.contexts("val") == []


def test_questions_change_what_is_fitted_only_where_some_are_asked(tmp_path, cache, narrow):
    task = small_world()
    plain, asking = (fit_material(PairWarmStart(qa_ratio=share), {}) for share in (0.0, 0.5))
    assert asking == {**plain, "qa_ratio": 0.5}
    assert set(plain) == {
        "steps", "decoder_steps", "decoder_texts", "batch_size", "gradient_clip", "decoder_lr",
        "optimizer",
    }  # fmt: skip
    before = prepare(task, cache, warm_start=FIT, of=prepare_tiny_decoder)
    again = prepare(task, cache, warm_start={**FIT, "qa_ratio": 0.0}, of=prepare_tiny_decoder)
    assert before == again and "answered" not in json.loads((before / "litpost.json").read_text())
    fit = {**FIT, "decoder_steps": 3, "qa_ratio": 0.5}
    with pytest.warns(UserWarning, match=r"answers only \d+% of fresh questions .*decoder_steps=3"):
        folder = prepare(task, tmp_path, warm_start=fit, of=prepare_tiny_decoder)
    assert 0 <= json.loads((folder / "litpost.json").read_text())["answered"] < 0.9


# ---------------------------------------------------------------------- stage 1 and the folder


def test_the_compressor_knows_what_is_usual(narrow):
    task = small_world()
    tokenizer = AutoTokenizer.from_pretrained(narrow)
    model = AutoModelForCausalLM.from_pretrained(narrow)
    assert model.config.hidden_size == 16 and model.config.num_attention_heads == 1
    rows = [f"{tokenizer.eos_token} {a} {b}" for a, b in task.known]
    with torch.no_grad():
        logits = model(**tokenizer(rows, return_tensors="pt")).logits[:, -1]
    said = tokenizer.convert_ids_to_tokens(logits.argmax(-1))
    right = [word == task.typical[noun] for word, noun in zip(said, task.known, strict=True)]
    assert sum(right) >= 6  # of 7; chance is a quarter


def test_widths_share_one_decoder_and_its_bridge(cache, narrow):
    wide = prepare(small_world(), cache, warm_start={**FIT, "steps": 0}, hidden_size=32)
    assert len([one for one in cache.glob("decoder-*") if one.is_dir()]) == 1
    for name in ("decoder/model.safetensors", "bridge.safetensors", "bridge.json"):
        assert (wide / name).read_bytes() == (narrow / name).read_bytes()
    assert set(load_file(narrow / "bridge.safetensors")) == {
        "prompts", "projector.up.weight", "projector.up.bias", "projector.gain"
    }  # fmt: skip
    AutoModelForCausalLM.from_pretrained(wide / "decoder")
    assert prepare(small_world(), cache, warm_start=FIT, hidden_size=16) == narrow


def test_settings_that_change_no_text_of_the_fits_share_them(cache, narrow):
    def pair_of(task):
        return prepare(task, cache, warm_start=FIT, hidden_size=16)

    assert pair_of(small_world(p_cf=0.5, num_train=640, num_test=16)) == narrow
    other = {"num_first": 4, "num_second": 3, "num_colours": 4, "num_held_out": 2}
    before = _made(cache)
    prepare(TwinNouns(**other), cache, warm_start={"steps": 2, "decoder_steps": 2})
    assert len(_made(cache)) == len(before) + 3  # decoder, compressor, pair


def _made(cache):
    return {path.name for path in cache.iterdir() if path.is_dir()}


def test_a_run_starts_from_the_folder(narrow):
    parts = TinyPairOptions().shared_parts
    module = CompressorModule(
        backbone={"path": str(narrow)}, bridge_parts=parts, **bridge_options()
    )
    module.build()
    state = load_file(narrow / "bridge.safetensors")
    own = dict(module.policy.bridge.named_parameters())
    for name, value in state.items():
        torch.testing.assert_close(own[name].data, value, rtol=0, atol=0)
        assert not own[name].requires_grad
    assert own["tokens"].requires_grad and own["tokens"].shape == (2, 16)
    other = CompressorModule(
        backbone={"path": str(narrow)}, bridge_parts=["tokens"], **bridge_options()
    )
    with pytest.raises(ValueError, match=r"tokens is \(2, 16\) here and None in"):
        other.build()


def test_the_same_seed_makes_the_same_pair(tmp_path):
    fit = {"steps": 2, "decoder_steps": 2, "batch_size": 4, "optimizer": OPTIMIZER}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = [
            prepare(small_world(), tmp_path / name, warm_start=fit, seed=seed)
            for name, seed in (("a", 0), ("b", 0), ("c", 1))
        ]
    for name in ("model.safetensors", "decoder/model.safetensors", "bridge.safetensors"):
        first, again, other = ((folder / name).read_bytes() for folder in folders)
        assert first == again != other


# ---------------------------------------------------------------------- without a fit


def test_without_warm_start_both_models_are_random(tmp_path):
    folder = prepare(small_world(), tmp_path, warm_start=None)
    assert json.loads((folder / "litpost.json").read_text())["exact_match"] is None
    values = [load_file(folder / part / "model.safetensors") for part in ("", "decoder")]
    name = "model.embed_tokens.weight"
    assert not torch.equal(values[0][name], values[1][name])  # no free match at equal widths


def test_a_task_of_bytes_gets_random_models(tmp_path):
    class Bytes(TwinNouns):
        def vocabulary(self):
            return None

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folder = prepare(small_world(Bytes), tmp_path, warm_start=FIT)
    assert json.loads((folder / "litpost.json").read_text())["exact_match"] is None
    assert AutoTokenizer.from_pretrained(folder).decode([5]) != ""


def test_a_stage_without_texts_is_told(tmp_path):
    class Mute(TwinNouns):
        def neutral_contexts(self, seed, step, count):
            return []

    fit = {**FIT, "steps": 0}
    with pytest.warns(UserWarning, match=r"no neutral texts: .*warm_start.decoder_steps=100 is"):
        folder = prepare(small_world(Mute), tmp_path, warm_start=fit)
    assert json.loads((folder / "litpost.json").read_text())["exact_match"] is None
    asked = prepare(small_world(Mute), tmp_path, warm_start={**fit, "decoder_steps": 0})
    module_of = partial(CompressorModule, backbone={"path": str(folder)}, **bridge_options())
    with pytest.raises(ValueError, match=r"train=frozen would .* 'twin_nouns' has no .*train=full"):
        module_of().build()
    for module in (
        module_of(decoder={"train": "full"}),
        module_of(backbone={"path": str(asked)}),
        module_of(decoder={"backbone": str(asked)}),
        module_of(backbone={"path": str(folder), "random_init": True}),  # a checkpoint brings it
    ):
        module.build()


@pytest.mark.parametrize("tiny", [{"rank": None, "noise": None}, {"memory_form": "kv"}])
def test_other_bridges(tmp_path, tiny):
    shape = TinyPairOptions(**tiny)
    fit = {"steps": 0, "decoder_steps": 2, "batch_size": 4, "optimizer": OPTIMIZER}
    with pytest.warns(UserWarning, match="reads only"):
        folder = prepare(small_world(), tmp_path, warm_start=fit, **tiny)
    kept = {"prompts", "projector.gain"} if shape.memory_form == "embeds" else set()
    assert set(load_file(folder / "bridge.safetensors")) == set(shape.shared_parts) == kept
    options = {"bridge_parts": shape.shared_parts, **bridge_options(shape)}
    module = CompressorModule(backbone={"path": str(folder)}, **options)
    module.build()
    assert module.policy.is_decoder_frozen
