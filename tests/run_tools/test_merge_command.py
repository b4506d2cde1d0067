"""``mode=merge``: values are checked together, the folder is written, a table is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from datamodules.texts import TextEncoding
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder
from lightning_modules.embedding.base import EmbeddingModule
from lightning_modules.embedding.sentence_transformers import write_sentence_transformers
from lightning_modules.functional.merging import METHODS, merge_states
from run_tools.merge_command import merge_command
from run_tools.merged import merge_folders
from tests.runs import main

SHAPE = TinyOptions(
    hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
)


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    made = [tmp_path / f"bag{seed}" for seed in range(3)]
    for seed, folder in enumerate(made):
        build_tiny(folder, ["a", "b"], SHAPE, seed=seed)
    return [str(folder) for folder in made]


def test_it_merges_as_merge_folders_does(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, options = models[2], {"density": 0.4, "one_d": "linear"}
    output = str(tmp_path / "new" / "out")
    asked = {
        "models": models[:2],
        "method": "ties",
        "weights": [3, 1],
        "base": base,
        "output": output,
        "options": options,
    }
    assert merge_command({"mode": "merge", "merge": asked}) == Path(output)
    expected = merge_folders(
        models[:2], tmp_path / "expected", "ties", [3, 1], base=base, options=options
    )
    got, wanted = (load_file(Path(f) / "model.safetensors") for f in (output, expected))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    printed = capsys.readouterr().out
    for text in ("ties merge of 2", "0.750", "0.250", "distance", f"backbone.path={output}"):
        assert text in printed


def test_a_merge_without_base_prints_no_distances(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"models": models, "method": "multislerp", "output": str(tmp_path / "out")}
    merge_command({"merge": asked})
    printed = capsys.readouterr().out
    assert "distance" not in printed and "0.333" in printed
    assert "norm, by that of the linear average: 1." in printed
    asked |= {"output": str(tmp_path / "measured"), "reference": models[0]}
    merge_command({"merge": asked})
    assert "distance" in capsys.readouterr().out
    got, same = (load_file(tmp_path / f / "model.safetensors") for f in ("measured", "out"))
    assert all(torch.equal(got[name], same[name]) for name in same)


def test_all_wrong_values_are_named_at_once(models: list[str], tmp_path: Path) -> None:
    asked = {
        "models": [models[0], "nowhere"],
        "method": "dare",
        "weights": [1.0, 2.0, 3.0],
        "output": models[1],
        "reference": "gone",
        "options": {"densty": 0.5, "scale": "much"},
    }
    with pytest.raises(ValueError) as caught:
        merge_command({"merge": asked})
    for text in (
        "merge.models: nowhere is no folder",
        "merge.reference: gone is no folder",
        f"merge.output={models[1]} is there already",
        "merge.weights=[1.0, 2.0, 3.0]: 2 numbers are needed",
        "merge.method='dare' needs merge.base",
        "'merge.options.densty' of dare; did you mean 'merge.options.density'?",
        "merge.options.scale='much' must be a finite number",
    ):
        assert text in str(caught.value), text
    with pytest.raises(ValueError) as caught:
        merge_command({"merge": {"models": "a", "wieghts": [1], "weights": ["x"]}})
    for text in ("merge.models='a' must be a list", "merge.wieghts", "did you mean 'weights'"):
        assert text in str(caught.value), text
    assert "merge.weights=['x'] must be a list or null" in str(caught.value)


def test_nothing_given(models: list[str], tmp_path: Path) -> None:
    for config in ({}, {"merge": None}, {"merge": {}}):
        with pytest.raises(ValueError, match=r"merge\.models names 0 .*merge\.output is required"):
            merge_command(config)
    output = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"names 1 folders; two or more .*did you mean 'slerp'"):
        merge_command({"merge": {"models": models[:1], "method": "slurp", "output": output}})
    asked = {"models": models[:1], "method": "task_arithmetic", "output": output}
    with pytest.raises(ValueError, match=r"needs merge\.base") as caught:
        merge_command({"merge": asked})
    assert "names 1" not in str(caught.value)
    asked |= {"base": models[1], "options": {"scale": 0.5}}
    assert merge_command({"merge": asked}) == Path(output)


# --- the command line -------------------------------------------------------------------------

WITHOUT_BASE = ["linear", "slerp", "multislerp", "karcher"]
METHOD_OPTIONS = {
    "ties": ["merge.options.density=0.5"],
    "dare": ["merge.options.density=0.5", "merge.options.seed=3"],
}
ENCODER = TinyEncoderOptions(
    hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, max_positions=16
)


def encoders(folder: Path, words: list[str], count: int = 3) -> list[str]:
    """Random encoders of one shape, as a run of ours exports them."""
    made = [folder / f"encoder{seed}" for seed in range(count)]
    for seed, one in enumerate(made):
        build_tiny_encoder(one, words, ENCODER, seed=seed)
        write_sentence_transformers(one, TextEncoding(), width=16, normalize=True)
    return [str(one) for one in made]


def test_every_option_has_its_key(compose: Callable[..., Any]) -> None:
    known = {name for method in METHODS.values() for name in method.options}
    assert set(compose(smoke=False).merge.options) == known | {"one_d"}


def merge_line(*overrides: str, models: list[str], output: Path) -> tuple[int, str, str]:
    given = [f"merge.models=[{','.join(models)}]", f"merge.output={output}"]
    return main("mode=merge", *given, *overrides)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("method", METHODS)
def test_the_command_line(method: str, kind: str, models: list[str], tmp_path: Path) -> None:
    assert set(WITHOUT_BASE) | {n for n, m in METHODS.items() if m.needs_base} == set(METHODS)
    folders = models if kind == "decoder" else encoders(tmp_path, ["a", "b"])
    output, own = tmp_path / "out", [f"merge.method={method}", *METHOD_OPTIONS.get(method, [])]
    if method not in WITHOUT_BASE:
        own.append(f"merge.base={folders[2]}")
    status, printed, errors = merge_line(*own, models=folders[:2], output=output)
    assert status == 0, errors
    assert f"{method} merge of 2" in printed
    assert {one.name for one in tmp_path.iterdir()} >= {"out"}
    assert not (tmp_path / "outputs").exists(), "no run folder is made"
    given = {"density": 0.5, "seed": 3} if method == "dare" else {"density": 0.5}
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders]
    expected = merge_states(
        states[:2],
        method=method,
        base=None if method in WITHOUT_BASE else states[2],
        options=given if method in METHOD_OPTIONS else None,
    )
    got = load_file(output / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
    more = {} if kind == "decoder" else {"add_pooling_layer": False}
    loaded = loader.from_pretrained(output, **more).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in got.items())


def test_a_merged_encoder_is_one_of_sentence_transformers(tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    words, output = ["a", "b", "c"], tmp_path / "out"
    folders = encoders(tmp_path, words, 2)
    assert merge_line("merge.weights=[3,1]", models=folders, output=output)[0] == 0
    names = {one.relative_to(output).as_posix() for one in output.rglob("*")}
    assert {"modules.json", "1_Pooling/config.json", "2_Normalize", "merge.json"} <= names
    model = package.SentenceTransformer(str(output), device="cpu")
    module = EmbeddingModule(backbone=str(output))
    module.configure_model()
    module.encoding = TextEncoding()
    module.encoding.bind(AutoTokenizer.from_pretrained(output))
    texts = ["a b", "c", "b a c"]
    theirs = model.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(module.embed(texts), theirs, atol=1e-6, rtol=0)


def test_a_base_may_hold_more_than_what_it_became(tmp_path: Path) -> None:
    """A BERT from elsewhere has a pooling layer and older tokenizer files; exports do not."""
    *folders, base = encoders(tmp_path, ["a", "b"])
    file = Path(base) / "model.safetensors"
    save_file(load_file(file) | {"pooler.dense.bias": torch.ones(16)}, file, {"format": "pt"})
    (Path(base) / "vocab.txt").write_text("a\nb\n")
    own = ["merge.method=task_arithmetic", f"merge.base={base}"]
    status, _, errors = merge_line(*own, models=folders, output=tmp_path / "out")
    assert status == 0, errors
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(Path(folders[0]) / "model.safetensors").keys()
    )
    status, _, errors = merge_line(models=[folders[0], base], output=tmp_path / "no")
    assert (status, (tmp_path / "no").exists()) == (1, False)
    assert "pooler.dense.bias is (16,) there and missing here" in errors


def test_folders_that_do_not_go_together(models: list[str], tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    build_tiny(wide, ["a", "b"], replace(SHAPE, intermediate_size=48), seed=0)
    words = tmp_path / "words"
    build_tiny(words, ["a", "c"], SHAPE, seed=0)
    encoder = encoders(tmp_path, ["a", "b"], 2)
    dense = Path(encoder[1]) / "1_Pooling" / "model.safetensors"
    save_file({"linear.weight": torch.ones(2)}, dense)
    output = tmp_path / "out"
    down = "model.layers.0.mlp.down_proj.weight is (16, 48) there and (16, 32) here"
    for folders, wanted in (
        ([models[0], str(wide)], f"{wide} cannot be merged with {models[0]}: {down}"),
        ([models[0], str(words)], "the tokenizers differ in tokenizer.json: "),
        ([models[0], encoder[0]], "its architecture is ['BertModel'], not ['Qwen3ForCausalLM']"),
        (encoder[::-1], f"{dense}: only the model of a folder is merged"),
    ):
        status, _, errors = merge_line(models=folders, output=output)
        assert status == 1
        assert [wanted in line for line in errors.splitlines() if "error: " in line] == [True]
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("merge.modles=[a,b]", "unknown key 'merge.modles'; did you mean 'merge.models'?"),
        ("+merge.modles=[a,b]", "unknown key 'merge.modles'; did you mean 'models'?"),
        ("merge.models=a", "merge.models='a' must be a list"),
        ("merge.method=slurp", "merge.method='slurp' is not known; allowed: 'linear'"),
        ("merge.options.densty=1", "'merge.options.densty'; did you mean 'merge.options.density'?"),
        ("+merge.options.densty=1", "unknown key 'merge.options.densty' of linear"),
        ("merge.options.density=1", "unknown key 'merge.options.density' of linear"),
        ("mode=mege", "mode='mege' must be one of"),
    ],
)
def test_wrong_words(override: str, wanted: str, models: list[str], tmp_path: Path) -> None:
    status, _, errors = merge_line(override, models=models[:2], output=tmp_path / "out")
    assert status == 1
    assert wanted in errors, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("out*"))
