"""Merged folders: they load, hold what the method makes, and unlike folders are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.functional.merging import METHODS, merge_states
from run_tools.merged import merge_folders, prepare_merge, read_report

SHAPE = TinyOptions(
    hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
)
WORDS = ["a", "b", "c"]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"expert{seed}" for seed in range(3)]
    for seed, folder in enumerate(made):
        build_tiny(folder, WORDS, SHAPE, seed=seed)
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_a_merged_folder_is_the_weighted_average_and_loads(
    folders: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    output.mkdir()  # as a prepared folder is
    assert merge_folders(folders, output, weights=[1, 1, 2]) == output
    each = [weights(folder) for folder in folders]
    merged = weights(output)
    assert merged.keys() == each[0].keys()
    for name, value in merged.items():
        expected = each[0][name] / 4 + each[1][name] / 4 + each[2][name] / 2
        assert torch.allclose(value, expected, atol=1e-6), name
    model = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(model.state_dict()["lm_head.weight"], merged["lm_head.weight"])
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (output, folders[0])]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    info = json.loads((output / "litpost.json").read_text())
    assert info["weights"] == [0.25, 0.25, 0.5]
    assert not list(tmp_path.glob("*.unfinished"))


def test_shards(folders: list[Path], tmp_path: Path) -> None:
    whole = merge_folders(folders, tmp_path / "whole")
    sharded = merge_folders(folders, tmp_path / "sharded", max_shard_bytes=3000)
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert len(list(sharded.glob("*.safetensors"))) > 2
    again = merge_folders([sharded, sharded], tmp_path / "again", max_shard_bytes=3000)
    joined = merge_folders([sharded, sharded], tmp_path / "joined")
    assert not list(joined.glob("*.index.json")), "the index of the first is not that of the merge"
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (whole, sharded, again, joined)
        ]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_refusals(folders: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"backbone\.merge names 1 folders"):
        merge_folders(folders[:1], output)
    with pytest.raises(ValueError, match="weights="):
        merge_folders(folders[:2], output, weights=[1.0])
    with pytest.raises(ValueError, match="method='slurp'"):
        merge_folders(folders[:2], output, method="slurp")
    with pytest.raises(ValueError, match="no config.json"):
        merge_folders([folders[0], tmp_path / "nothing"], output)
    wide = tmp_path / "wide"
    build_tiny(wide, [*WORDS, "d"], SHAPE, seed=0)
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(7, 16\) there and \(6, 16\) here"):
        merge_folders([folders[0], wide], output)
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(ValueError, match=r"its architecture is \['Other'\]"):
        merge_folders([folders[0], other], output)
    (other / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="no readable safetensors"):
        merge_folders([folders[0], other], output)
    (other / "model.safetensors").unlink()
    (other / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="it has no safetensors"):
        merge_folders([folders[0], other], output)
    with pytest.raises(ValueError, match="not empty"):
        merge_folders(folders, folders[2])
    assert not output.exists()


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_writes_what_it_makes_of_states(
    folders: list[Path], tmp_path: Path, method: str
) -> None:
    base = folders[2] if METHODS[method].needs_base else None
    merged = merge_folders(folders[:2], tmp_path / "out", method, [3, 1], base=base)
    first, second, start = (weights(folder) for folder in folders)
    expected = merge_states(
        [first, second], method=method, weights=[3, 1], base=start if base else None
    )
    got = weights(merged)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    AutoModelForCausalLM.from_pretrained(merged)


def test_options_and_base_reach_the_method(folders: list[Path], tmp_path: Path) -> None:
    *models, base = folders
    options = {"density": 0.3, "scale": 0.5, "one_d": "linear"}
    out = merge_folders(models, tmp_path / "out", "ties", base=base, options=options)
    states = [weights(model) for model in models]
    expected = merge_states(states, method="ties", base=weights(base), options=options)
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())
    half = tmp_path / "half"  # from the base towards one model
    merge_folders(models[:1], half, "task_arithmetic", base=base, options={"scale": 0.5})
    for name, value in weights(half).items():
        assert torch.allclose(value, (states[0][name] + weights(base)[name]) / 2, atol=1e-6)
    for file in ("litpost.json", "merge.json"):
        said = json.loads((out / file).read_text())
        assert (said["method"], said["options"], said["base"]) == ("ties", options, str(base))


def test_a_merge_of_merges_does_not_take_over_their_records(
    folders: list[Path], tmp_path: Path
) -> None:
    first = merge_folders(folders[:2], tmp_path / "first", "karcher", base=folders[2])
    shutil.copy(folders[0] / "config.json", first / "pytorch_model.bin.index.json")
    second = merge_folders([first, folders[2]], tmp_path / "second")
    assert json.loads((second / "merge.json").read_text())["merged"][0] == str(first)
    assert read_report(second).distance is None
    assert not (second / "pytorch_model.bin.index.json").exists()


def test_the_report_measures_whole_models(folders: list[Path], tmp_path: Path) -> None:
    def flat(folder: Path) -> torch.Tensor:
        found = weights(folder)
        return torch.cat([found[name].flatten().double() for name in sorted(found)])

    one, two, zero = map(flat, folders)
    plain = merge_folders(folders[:2], tmp_path / "plain", "multislerp", reference=folders[2])
    bare = merge_folders(folders[:2], tmp_path / "bare", "multislerp")
    on_base = merge_folders(folders[:2], tmp_path / "on_base", "multislerp", base=folders[2])
    assert torch.equal(flat(plain), flat(bare)), "a reference measures and changes nothing"
    assert not torch.equal(flat(plain), flat(on_base))
    for folder in (plain, on_base):
        report = read_report(folder)
        cosine = torch.cosine_similarity(one, two, dim=0)
        assert report.cosines[0][1] == pytest.approx(float(cosine))
        cosine = torch.cosine_similarity(one - zero, two - zero, dim=0)
        assert report.update_cosines[0][1] == pytest.approx(float(cosine))
        lengths = [float((model - zero).norm()) for model in (one, two)]
        assert report.distances == pytest.approx(lengths)
        assert report.distance == pytest.approx(float((flat(folder) - zero).norm()))
        assert report.norm_factors.keys() == weights(folder).keys()
        update = flat(folder) - (zero if folder == on_base else 0)
        average = (one + two) / 2 - (zero if folder == on_base else 0)
        assert report.norm_factor == pytest.approx(float(update.norm() / average.norm()))
    assert read_report(bare).distance is None
    with pytest.raises(FileNotFoundError):
        read_report(folders[0])


def test_tied_heads_are_merged_once(tmp_path: Path) -> None:
    shape = TinyOptions(**{**SHAPE.__dict__, "tie_embeddings": True})
    made = [tmp_path / f"tied{seed}" for seed in range(3)]
    for seed, folder in enumerate(made):
        build_tiny(folder, WORDS, shape, seed=seed)
    states = [weights(folder) for folder in made]
    assert "lm_head.weight" not in states[0]
    both = states[1] | {"lm_head.weight": states[1]["model.embed_tokens.weight"].clone()}
    save_file(both, made[1] / "model.safetensors", {"format": "pt"})  # as some tools write it
    for method, base in (("linear", None), ("dare", made[2])):
        merged = merge_folders(made[:2], tmp_path / method, method, base=base)
        assert "lm_head.weight" not in weights(merged)
        model = AutoModelForCausalLM.from_pretrained(merged)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    both["lm_head.weight"] += 1
    save_file(both, made[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        merge_folders(made[:2], tmp_path / "differ")
    build_tiny(made[1], WORDS, SHAPE, seed=1)
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(6, 16\) there and missing here"):
        merge_folders(made[:2], tmp_path / "untied")


def test_dtypes_and_buffers(folders: list[Path], tmp_path: Path) -> None:
    kept = weights(folders[0])
    for place, folder in enumerate(folders[:2]):
        state = {name: value.bfloat16() for name, value in weights(folder).items()}
        state["model.norm.weight"] = state["model.norm.weight"].double()
        state["model.positions"] = torch.arange(4)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        kept[f"{place}"] = state["lm_head.weight"]
    merged = weights(merge_folders(folders[:2], tmp_path / "out", "karcher"))
    assert merged["lm_head.weight"].dtype == torch.bfloat16
    assert merged["model.norm.weight"].dtype == torch.float64
    assert merged["model.positions"].tolist() == [0, 1, 2, 3]
    state["model.positions"] += 1
    save_file(state, folders[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="model.positions: tensors of torch.int64 differ"):
        merge_folders(folders[:2], tmp_path / "positions")


def change(folder: Path, file: str, **values: object) -> None:
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(said | values))


def test_tokenizers_must_be_the_same(folders: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    # what the last use has set encodes nothing
    truncation = {"max_length": 3, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
    change(folders[1], "tokenizer.json", truncation=truncation)
    merge_folders(folders, tmp_path / "fine")
    model = json.loads((folders[1] / "tokenizer.json").read_text())["model"]
    vocabulary = model["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    change(folders[1], "tokenizer.json", model=model)
    with pytest.raises(ValueError, match="tokenizers differ in tokenizer.json") as caught:
        merge_folders(folders, output)
    assert f"{folders[0]} and {folders[2]}; {folders[1]}." in str(caught.value)
    with pytest.raises(ValueError, match="tokenizers differ"):
        merge_folders([folders[0], folders[2]], output, "dare", base=folders[1])
    with pytest.raises(ValueError, match="tokenizers differ"):
        merge_folders([folders[0], folders[2]], output, reference=folders[1])
    (folders[1] / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"{folders[1]} .which has none."):
        merge_folders(folders, output)
    assert not output.exists()


def test_settings_that_show_in_no_shape(folders: list[Path], tmp_path: Path) -> None:
    for key, value, theirs in (
        ("num_attention_heads", 4, 2),
        ("rope_parameters", {"rope_theta": 5.0}, 10000.0),
        ("text_config", {"hidden_act": "relu"}, "silu"),
    ):
        odd = tmp_path / key
        shutil.copytree(folders[1], odd)
        change(odd, "config.json", **{key: value})
        with pytest.raises(ValueError, match=f"odd|{key}") as caught:
            merge_folders([folders[0], odd], tmp_path / "out")
        assert str(theirs) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_bases_options_and_adapters(folders: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(
        ValueError, match="method='ties' needs base: .*unknown key 'options.densty'"
    ):
        merge_folders(folders, output, "ties", options={"densty": 0.2})
    with pytest.raises(ValueError, match="no config.json"):
        merge_folders(folders, output, "ties", base=tmp_path / "nothing")
    with pytest.raises(ValueError, match="names 1 folders"):
        merge_folders(folders[:1], output, "karcher", base=folders[1])
    with pytest.raises(ValueError, match="names 0 folders"):
        merge_folders([], output, "ties", base=folders[1])
    state = weights(folders[1])
    del state["model.norm.weight"]
    save_file(state, folders[1] / "model.safetensors", {"format": "pt"})
    for base in (None, folders[1]):
        models = folders[:2] if base is None else [folders[0], folders[2]]
        with pytest.raises(ValueError, match=r"model\.norm\.weight is missing there and \(16,\)"):
            merge_folders(models, output, "multislerp", base=base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter: it holds adapters .*export it folded"):
        merge_folders([folders[0], adapter], output)
    shutil.copy(folders[0] / "config.json", adapter)  # a config does not make it dense
    with pytest.raises(ValueError, match="export it folded"):
        merge_folders([folders[0], adapter], output)
    assert not output.exists()


def test_values_that_are_not_finite_leave_nothing_behind(
    folders: list[Path], tmp_path: Path
) -> None:
    state = weights(folders[1])
    state["model.norm.weight"][3] = float("nan")
    save_file(state, folders[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight: model 2 has values that are not"):
        merge_folders(folders, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert0", "expert1", "expert2"]


def test_only_the_files_that_transformers_reads(folders: list[Path], tmp_path: Path) -> None:
    expected = weights(merge_folders(folders, tmp_path / "expected"))
    save_file({"layers.0.wq": torch.zeros(3)}, folders[1] / "consolidated.safetensors")
    plain = merge_folders(folders, tmp_path / "plain")
    sharded = merge_folders(folders, tmp_path / "sharded", max_shard_bytes=3000)
    save_file({"layers.0.wq": torch.zeros(3)}, sharded / "consolidated.safetensors")
    again = merge_folders([sharded, sharded], tmp_path / "again")
    for folder in (plain, again):
        got = weights(folder)
        assert got.keys() == expected.keys()
        assert all(torch.allclose(got[name], expected[name]) for name in expected)


def test_a_run_can_start_from_any_merge(folders: list[Path], tmp_path: Path) -> None:
    options = {"folders": folders[:2], "method": "task_arithmetic", "base": str(folders[2])}
    full = prepare_merge(options, tmp_path / "cache")
    half = prepare_merge(options | {"options": {"scale": 0.5}}, tmp_path / "cache")
    assert prepare_merge(options, tmp_path / "cache") == full != half
    zero, one, other = (weights(folder) for folder in (folders[2], full, half))
    for name in zero:
        assert torch.allclose(other[name] - zero[name], (one[name] - zero[name]) / 2, atol=1e-6)
    other_base = prepare_merge(options | {"base": str(folders[1])}, tmp_path / "cache")
    assert other_base not in (full, half)
    with pytest.raises(ValueError, match="did you mean 'backbone.merge.options'"):
        prepare_merge(options | {"option": {}}, tmp_path / "cache")
    with pytest.raises(ValueError, match="nowhere is no exported model"):
        prepare_merge(options | {"base": "nowhere"}, tmp_path / "cache")
